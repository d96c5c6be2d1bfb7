from graphquant.ops.varlen_attention.op import varlen_attention as varlen_attention
