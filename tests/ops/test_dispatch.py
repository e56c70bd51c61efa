"""The dispatch of operations: first candidate that accepts, reference otherwise, forced by name in a block."""

import pytest
import torch

from plait.ops.dispatch import BackendError, Op, triton_serves, use


@Op
def double(x: float) -> float:
    """Twice x."""
    return 2 * x


@double.backend("big", when=lambda x: x > 10)
def _big(x: float) -> float:
    return -1.0


def test_a_candidate_serves_the_calls_it_accepts_and_the_reference_the_rest() -> None:
    assert double(3.0) == 6.0
    assert double(11.0) == -1.0


def test_use_forces_one_implementation_and_is_undone() -> None:
    with use("reference"):
        assert double(11.0) == 22.0
    assert double(11.0) == -1.0


def test_a_forced_backend_that_cannot_serve_names_those_that_exist() -> None:
    with use("big"), pytest.raises(BackendError, match="reference, big"):
        double(3.0)
    with use("triton"), pytest.raises(BackendError, match="'triton'"):
        double(11.0)
    assert double(11.0) == -1.0, "an error inside the block undoes the choice too"


def test_triton_is_not_given_vectors_with_gaps_or_repeated_numbers() -> None:
    pytest.importorskip("triton")
    matrix, vector = torch.ones(6, 4), torch.ones(6)
    with use("triton"):
        assert triton_serves(matrix[::2, ::2], vector, None)
        assert not triton_serves(matrix, vector[::2])
        assert not triton_serves(matrix, vector[:1].expand(6))


class OnGPU(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cuda", 1)  # type: ignore[assignment]


class OnFirstGPU(OnGPU):
    """On the first one."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    current = [0]

    class Switched:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device.index)

        def __exit__(self, *problem: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Switched)

    @Op
    def where(x: torch.Tensor, y: torch.Tensor | None = None) -> int:
        return -1

    @where.backend("triton", when=lambda x, y=None: triton_serves(x, y))
    def _launched(x: torch.Tensor, y: torch.Tensor | None = None) -> int:
        if y is not None and y.dim() == 0:
            raise ValueError("a kernel failed")
        return current[-1]

    first, second = (torch.ones(2, 2).as_subclass(kind) for kind in (OnFirstGPU, OnGPU))
    assert where(first) == 0 and where(second) == 1 and where(x=second, y=second) == 1
    with pytest.raises(ValueError, match="a kernel failed"):
        where(second, torch.ones(()).as_subclass(OnGPU))
    assert current == [0]
    # no kernel reads from two of them, nor from the processor's memory
    assert where(first, second) == where(second, torch.ones(2, 2)) == -1
    with use("triton"):
        assert where(torch.ones(2, 2)) == 0
