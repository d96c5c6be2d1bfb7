from graphquant.ops.token_index.op import token_index as token_index
