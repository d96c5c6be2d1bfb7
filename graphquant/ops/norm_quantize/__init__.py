from graphquant.ops.norm_quantize.op import norm_quantize as norm_quantize
from graphquant.ops.norm_quantize.op import norm_quantize_keep as norm_quantize_keep
