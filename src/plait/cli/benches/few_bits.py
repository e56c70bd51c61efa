"""Quantisers at the sizes of a model's widest linear layer: what each operand of a product in few bits costs.

The floor is reading the matrix once and writing the result; formats with a scale for the whole tensor must read it
twice, and random rounding computes ten rounds of multiplications for every four numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from plait.cli.benches.case import Call, Case, case_of
from plait.model.config import ModelConfig
from plait.model.layers.mlp import MLP
from plait.ops.hadamard import SIGNS
from plait.ops.nvfp4 import quantize_nvfp4
from plait.ops.operand import operand, operand_of

# tokens are rounded up to this: blocks along them come out even
WHOLE = 128
NVFP4: dict[str, object] = {"element": "e2m1", "scale": "e4m3", "block": (1, 16)}
# name, what makes the operand, whether it is of a float32 master
OPERANDS: tuple[tuple[str, dict[str, object], bool], ...] = (
    ("fp8 tensor", {"element": "e4m3"}, False),
    ("fp8 1x128", {"element": "e4m3", "scale": "pow2", "block": (1, 128)}, False),
    ("fp8 128x128, weight", {"element": "e4m3", "scale": "pow2", "block": (128, 128)}, True),
    ("mxfp8", {"element": "e4m3", "scale": "e8m0", "block": (1, 32)}, False),
    ("nvfp4", NVFP4, False),
    ("nvfp4 16x16, weight", NVFP4 | {"block": (16, 16)}, True),
    ("nvfp4 at random", NVFP4 | {"seed": 1}, False),
    ("nvfp4 of transpose, rotated, at random", NVFP4 | {"seed": 1, "hadamard": SIGNS, "transposed": True}, False),
)


def few_bits(config: ModelConfig, tokens: int, device: str = "cpu") -> Iterator[Case]:
    """Cases of one model: operands from numbers, codes from numbers, operands from codes."""
    spec = next((spec for spec in config.layers if isinstance(spec, MLP)), None)
    columns = -(-(spec.d_ff if spec else config.d_model) // WHOLE) * WHOLE
    generator = torch.Generator().manual_seed(0)

    def numbers(rows: int, master: bool = False) -> Tensor:
        x = torch.randn(-(-rows // WHOLE) * WHOLE, columns, generator=generator)
        return x.to(device, torch.float32 if master else torch.bfloat16)

    for name, how, master in OPERANDS:

        def of_numbers(rows: int, how: dict[str, object] = how, master: bool = master) -> Call:
            return (numbers(rows, master),), how

        yield case_of(f"operand {name}", operand, of_numbers, config.d_model if master else tokens)

    def kept(rows: int) -> Call:
        return (numbers(rows),), {"hadamard": SIGNS, "transposed": True}

    def opened(rows: int) -> Call:
        return quantize_nvfp4(numbers(rows), hadamard=SIGNS, transposed=True)[:2], {}

    yield case_of("nvfp4 codes of transpose, rotated", quantize_nvfp4, kept, tokens)
    yield case_of("operand of nvfp4 codes", operand_of, opened, tokens)
