from graphquant.ops.attention.op import attention as attention
