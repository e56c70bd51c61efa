"""Key/value heads, each with the query heads that share it; they are cut together, by attention_heads.py.

importance of a key/value head = root of the sum of squares over its query heads
"""

from collections.abc import Mapping

from torch import Tensor

from plait.compress.axes import attention_heads
from plait.compress.axis import Axis, Units
from plait.model.hybrid import Block


def _find(sums: Mapping[str, Tensor], where: str, block: Block, tokens: int) -> Units:
    heads = attention_heads.find(sums, where, block, tokens)
    return Units(importance={by: value.square().sum(1).sqrt() for by, value in heads.importance.items()})


AXIS = Axis(
    name="kv_heads",
    title="key/value heads",
    symbol="*",
    fields=(),
    measures=("output", "activation"),
    watch=attention_heads.watch,
    find=_find,
    cut=None,
)
