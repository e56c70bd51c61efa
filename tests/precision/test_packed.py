"""The public quantisers of `plait.quant`: what they store, how many bits that is, and how near it comes back."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import plait

Q = plait.quant
Quantize = Callable[[Tensor], Sequence[Tensor | None]]

# name -> how to quantise, how to read back, bits a number for (128, 512), largest error in parts of the largest number
FORMATS: dict[str, tuple[Quantize, Callable[..., Tensor], float, float]] = {
    "fp8": (Q.fp8.quantize, Q.fp8.dequantize, 8, 2**-4),
    "fp8 rows": (lambda x: Q.fp8.quantize(x, block="row"), Q.fp8.dequantize, 8 + 32 / 512, 2**-4),
    "fp8 e5m2": (lambda x: Q.fp8.quantize(x, "e5m2"), Q.fp8.dequantize, 8, 2**-3),
    "fp8_block": (Q.fp8_block.quantize, Q.fp8_block.dequantize, 8 + 32 / 128, 2**-4),
    "fp8_block 128": (
        lambda x: Q.fp8_block.quantize(x, block=(128, 128)),
        Q.fp8_block.dequantize,
        8 + 32 / 128**2,
        2**-4,
    ),
    "mxfp8": (Q.mxfp8.quantize, Q.mxfp8.dequantize, 8.25, 2**-4),
    "mxfp4": (Q.mxfp4.quantize, Q.mxfp4.dequantize, 4.25, 2**-2),
    "nvfp4": (Q.nvfp4.quantize, Q.nvfp4.dequantize, 4.5, 2**-2),
    "nvfp4 16": (lambda x: Q.nvfp4.quantize(x, block=(16, 16)), Q.nvfp4.dequantize, 4 + 8 / 256, 2**-2),
    "int8": (Q.int8.quantize, Q.int8.dequantize, 8 + 16 / 128, 1 / 250),
    "int4": (Q.int4.quantize, Q.int4.dequantize, 4 + 16 / 64, 1 / 6),
    "ternary": (Q.ternary.quantize, Q.ternary.dequantize, 8, 1.0),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_has_the_stated_bits_and_reads_back(name: str, dtype: torch.dtype) -> None:
    quantize, dequantize, bits, error = FORMATS[name]
    x = torch.randn(128, 512).to(dtype)
    packed = quantize(x)
    stored = [t for t in packed if t is not None]
    # a scale for the whole tensor is not counted
    assert sum(t.nbytes for t in stored if t.dim() > 0) * 8 == bits * x.numel()
    y = dequantize(*packed)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert (y - x.float()).abs().max() <= error * x.float().abs().max()
    # what was rounded once is a fixed point of formats whose scales are powers of two
    if name.startswith(("mx", "fp8_block")):
        assert torch.equal(dequantize(*quantize(y)), y)


@pytest.mark.parametrize("name", FORMATS)
def test_fields_have_names_and_every_function_says_what_it_takes(name: str) -> None:
    module = getattr(Q, name.partition(" ")[0])
    packed = FORMATS[name][0](torch.randn(128, 128))
    assert getattr(packed, "codes") is packed[0]  # noqa: B009
    assert "Returns" in (module.quantize.__doc__ or "") or "result" in (module.quantize.__doc__ or "")
    assert module.dequantize.__doc__


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "mxfp8", "mxfp4", "nvfp4"])
def test_a_seed_rounds_at_random_and_repeats(name: str) -> None:
    module, x = getattr(Q, name), torch.randn(64, 256)
    a, b, c, d = (module.dequantize(*module.quantize(x, seed=s)) for s in (1, 1, 2, None))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)
    # rounding at random errs more than to the nearest, and no more than two neighbours are apart
    assert (a - x).square().mean() > (d - x).square().mean() > 0.1 * (a - x).square().mean()


def test_the_public_nvfp4_follows_transformer_engine(shared: Path) -> None:
    v = load_file(shared / "vectors/nvfp4_1d.safetensors")
    q = Q.nvfp4.quantize(v["bf16.quarter_grid.x"])
    assert torch.equal(q.codes, v["bf16.quarter_grid.te.row_codes"])
    # ModelOpt and torchao decide ties in another way: the choice is seen here
    assert not torch.equal(q.codes, v["bf16.quarter_grid.torchao.codes"])


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("length", [1, 17, 100])
def test_a_length_that_no_block_divides_is_refused_with_the_remedy(name: str, length: int) -> None:
    with pytest.raises(ValueError, match=r"pad its last dimension to a multiple of (16|32|128)"):
        getattr(Q, name).quantize(torch.zeros(4, length))
