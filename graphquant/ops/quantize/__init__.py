from graphquant.ops.quantize.op import quantize as quantize
