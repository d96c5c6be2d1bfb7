from graphquant.ops.quantize_weight.op import quantize_weight as quantize_weight
