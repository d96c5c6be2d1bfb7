from graphquant.ops.pack_weight.op import is_packed as is_packed
from graphquant.ops.pack_weight.op import pack_weight as pack_weight
from graphquant.ops.pack_weight.op import unpacked as unpacked
