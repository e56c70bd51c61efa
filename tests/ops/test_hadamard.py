"""The rotation against TransformerEngine's and torchao's answers, and against what makes it a rotation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.ops.dispatch import use
from plait.ops.hadamard import SIGNS, hadamard16


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """These are the tests of the reference; faster backends are held to it in theirs."""
    with use("reference"):
        yield


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "vectors/nvfp4_rht.safetensors")


def test_signs_and_matrix_are_the_fixed_ones(vectors: dict[str, Tensor]) -> None:
    assert torch.equal(torch.tensor(SIGNS, dtype=torch.float32), vectors["te.sign"].float())
    assert torch.equal(hadamard16(torch.eye(16)) * 4, vectors["te.signed_hadamard"].float())


@pytest.mark.parametrize("case", ["f32.grid", "bf16.grid"])
def test_sums_that_are_exact_come_out_equal(vectors: dict[str, Tensor], case: str) -> None:
    y = hadamard16(vectors[f"{case}.x"].T)
    assert y.dtype == vectors[f"{case}.x"].dtype
    assert torch.equal(y, vectors[f"{case}.te.rht_of_transpose"])


@pytest.mark.parametrize("case", ["f32.normal", "bf16.normal", "f32.outliers", "bf16.outliers"])
def test_other_sums_differ_by_the_order_of_additions_at_most(vectors: dict[str, Tensor], case: str) -> None:
    y, theirs = hadamard16(vectors[f"{case}.x"].T), vectors[f"{case}.te.rht_of_transpose"]
    if y.dtype == torch.bfloat16:
        assert torch.equal(y, theirs), "bfloat16 inputs have exact sums here"
    # 15 additions of numbers no larger than amax, a quarter of them
    bound = 15 * torch.finfo(torch.float32).eps * vectors[f"{case}.x"].float().abs().max()
    assert (y.float() - theirs.float()).abs().max() <= bound


@pytest.mark.parametrize("i", range(4))
def test_other_signs_give_the_matrices_of_torchao(vectors: dict[str, Tensor], i: int) -> None:
    v = {name: vectors[f"random.{i}.{name}"] for name in ("sign", "rht_matrix", "x", "y")}
    signs = tuple(int(s) for s in v["sign"])
    assert torch.equal(hadamard16(torch.eye(16), signs), v["rht_matrix"].float())
    assert torch.equal(hadamard16(v["x"], signs), v["y"])


def test_the_matrix_is_orthogonal() -> None:
    m = hadamard16(torch.eye(16))
    assert torch.equal(m @ m.T, torch.eye(16)) and torch.equal(m.T @ m, torch.eye(16))


def test_products_of_rotated_operands_are_the_products() -> None:
    a, b = torch.randn(5, 48, dtype=torch.float64).float(), torch.randn(7, 48)
    torch.testing.assert_close(hadamard16(a) @ hadamard16(b).T, a @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("near", "far"), [(1, 2), (2, 4), (4, 8)])
def test_near_numbers_are_added_before_far_ones(near: int, far: int) -> None:
    x = torch.zeros(16)
    # 2^24 + 1 is no float32: the 1 is lost if it is added before 2^24 is taken away again
    x[0], x[near], x[far] = 2.0**24, 1.0, -(2.0**24)
    assert hadamard16(x, (1,) * 16)[0] == 0
    x[near], x[far] = -(2.0**24), 1.0
    assert hadamard16(x, (1,) * 16)[0] == 0.25


@pytest.mark.parametrize("n", [1, 8, 17])
def test_lengths_that_are_no_multiple_of_16_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        hadamard16(torch.zeros(2, n))


def test_strange_signs_are_refused() -> None:
    for signs in ((1,) * 15, (2,) * 16):
        with pytest.raises(ValueError, match="each 1 or -1"):
            hadamard16(torch.zeros(16), signs)
