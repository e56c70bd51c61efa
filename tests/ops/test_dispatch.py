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
