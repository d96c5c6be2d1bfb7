from graphquant.ops.act_quantize.op import act_quantize as act_quantize
