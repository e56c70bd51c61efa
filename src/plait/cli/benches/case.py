"""What the benchmark of operations needs to know of one: how to call it, its reference, its bytes and its FLOPs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.ops.dispatch import Op, use

Call = tuple[Sequence[Tensor], dict[str, object]]
# tokens of the comparison with the reference: more than a chunk of 64, and no multiple of anything
FEW = 67


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size.

    fast, slow: run it as it is dispatched, and the implementation it is timed against. backend, against: their names.
    results: what both give at a small size, pair by pair: the fast path's and the reference's.
    n_bytes, flops: the least that must be read and written, and computed.
    parts: equal things that one run does; figures are for one of them.
    op, call, gradients: what a peer needs to do the same; empty where there is no such peer.
    """

    name: str
    fast: Callable[[], object]
    slow: Callable[[], object]
    backend: str
    against: str
    results: Callable[[], list[tuple[Tensor, Tensor]]]
    n_bytes: float
    flops: float = 0.0
    parts: int = 1
    op: str = ""
    call: Call | None = None
    gradients: bool = False


def case_of(
    name: str,
    op: Op,
    make: Callable[[int], Call],
    tokens: int,
    *,
    flops: float = 0.0,
    gradients: bool = False,
    slow: str = "reference",
    few: int = FEW,
) -> Case:
    """An operation over many tokens.

    Args:
        name: for the table.
        op: it.
        make: tokens -> arguments; all float tensors among them get gradients if `gradients`.
        tokens: of the timed call.
        flops: of the timed call.
        gradients: also run the backward pass, which reads and writes everything twice more.
        slow: the backend to be timed against; results are always compared with the reference.
        few: tokens of the comparison.
    """
    call, small = make(tokens), make(few)
    out = run(op, call, gradients=False)
    n_bytes = sum(t.numel() * t.element_size() for t in (*call[0], *out))

    def forced() -> object:
        with use(slow):
            return run(op, call, gradients=gradients)

    def results() -> list[tuple[Tensor, Tensor]]:
        ours = run(op, small, gradients=gradients)
        with use("reference"):
            return list(zip(ours, run(op, small, gradients=gradients), strict=True))

    return Case(
        name=name,
        fast=lambda: run(op, call, gradients=gradients),
        slow=forced,
        backend=backend_of(op, call),
        against=slow,
        results=results,
        n_bytes=n_bytes * (3 if gradients else 1),
        flops=flops * (3 if gradients else 1),
        op=op.reference.__name__,
        call=call,
        gradients=gradients,
    )


def run(op: Op, call: Call, *, gradients: bool) -> list[Tensor]:
    """The results of a call; with gradients the first result's, and all gradients it leads to."""
    args, kwargs = call
    if not gradients:
        with torch.inference_mode():
            return _tensors(op(*args, **kwargs))
    return gradients_of(op, args, kwargs)


def gradients_of(function: Callable[..., object], args: Sequence[Tensor], kwargs: dict[str, object]) -> list[Tensor]:
    """A function's first result, and the gradients of all float arguments that it leads to."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in args]
    out = _tensors(function(*leaves, **kwargs))[0]
    wanted = [t for t in leaves if t.requires_grad]
    # any gradient that is not constant
    upstream = torch.linspace(-1.0, 1.0, out.numel(), device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


def backend_of(op: Op, call: Call) -> str:
    """The name of the implementation that serves a call."""
    args, kwargs = call
    return next((name for name, when, _ in op.candidates if when(*args, **kwargs)), "reference")


def _tensors(out: object) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]  # type: ignore[attr-defined]
