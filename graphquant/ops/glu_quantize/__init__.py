from graphquant.ops.glu_quantize.op import glu_quantize as glu_quantize
