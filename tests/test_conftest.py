"""The net under the other tests holds: memory that ops forget to write is NaN."""

import pytest
import torch


@pytest.mark.parametrize("code", ["torch.empty(3)", "torch.empty_like(x)", "x.new_empty(3)", "torch.empty(size=(3,))"])
@pytest.mark.parametrize("module", ["plait.ops.norm", "plait.kernels.native"])
def test_memory_from_empty_is_nan_in_ops_and_kernels(code: str, module: str) -> None:
    assert eval(code, {"torch": torch, "x": torch.zeros(3), "__name__": module}).isnan().all()


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("plait.model.cache", "torch.empty(3)"),
        ("plait.ops.quant", "torch.empty(3, dtype=torch.int8)"),
        ("plait.ops.quant", "torch.empty(3, dtype=torch.float8_e4m3fn)"),
    ],
)
def test_other_rooms_and_formats_without_nan_are_left_alone(
    module: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *_: pytest.fail("filled"))
    eval(code, {"torch": torch, "__name__": module})


def test_a_compiled_function_is_not_disturbed() -> None:
    def fill(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x)

    x = torch.ones(3)
    assert torch.equal(torch.compile(fill, fullgraph=True, backend="eager")(x), x)
