"""The ops. Importing this registers their schemas, fakes and CPU references, without triton."""

from graphquant.ops.attention import attention as attention
from graphquant.ops.define import OPS as OPS
from graphquant.ops.define import load_kernels as load_kernels
from graphquant.ops.int8_linear import int8_linear as int8_linear
from graphquant.ops.norm_quantize import norm_quantize as norm_quantize
from graphquant.ops.norm_quantize import norm_quantize_keep as norm_quantize_keep
from graphquant.ops.pack_weight import pack_weight as pack_weight
from graphquant.ops.quantize import quantize as quantize
from graphquant.ops.quantize_weight import quantize_weight as quantize_weight
from graphquant.ops.token_index import token_index as token_index
from graphquant.ops.varlen_attention import varlen_attention as varlen_attention
