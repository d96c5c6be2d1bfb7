"""Private APIs of torch._inductor. Importing this imports its lowerings, which takes a second.

All were seen in torch 2.11 to 2.13.
"""

from __future__ import annotations

from torch._higher_order_ops.triton_kernel_wrap import (
    create_tma_stable_metadata as create_tma_stable_metadata,
)
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table as kernel_side_table
from torch._higher_order_ops.triton_kernel_wrap import (
    triton_kernel_wrapper_mutation as triton_kernel_wrapper_mutation,
)
from torch._inductor import ir as ir
from torch._inductor.decomposition import register_decomposition as register_decomposition
from torch._inductor.lowering import add_layout_constraint as add_layout_constraint
from torch._inductor.lowering import fallback_handler as fallback_handler
from torch._inductor.lowering import lowerings as lowerings
from torch._inductor.lowering import register_lowering as register_lowering
from torch._inductor.virtualized import V as V
from torch.utils._ordered_set import OrderedSet as OrderedSet
