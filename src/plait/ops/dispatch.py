"""How an operation finds its fastest implementation: the reference, and candidates that say when they fit.

`@Op` wraps the reference. `@op.backend(name, when=...)` adds a candidate. A call takes the first candidate whose `when`
accepts the arguments, else the reference; `with use("reference")` forces one by name, for tests and measurements.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_forced: ContextVar[str | None] = ContextVar("plait_backend", default=None)
_HAS_TRITON = find_spec("triton") is not None


def _choice() -> str | None:
    # the compiler cannot read a context variable, and what it makes outlives the block that forces a backend
    return None if torch.compiler.is_compiling() else _forced.get()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve this call."""


class Op(Generic[P, R]):
    """An operation: call it like the function it wraps."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.candidates: list[tuple[str, Callable[P, bool], Callable[P, R]]] = []

    def backend(self, name: str, *, when: Callable[P, bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register an implementation that serves the calls `when` accepts; earlier registrations win."""

        def register(fn: Callable[P, R]) -> Callable[P, R]:
            self.candidates.append((name, when, _where_tensors_are(fn) if name == "triton" else fn))
            return fn

        return register

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        forced = _choice()
        if forced is None:
            for _, when, fn in self.candidates:
                if when(*args, **kwargs):
                    return fn(*args, **kwargs)
            return self.reference(*args, **kwargs)
        if forced == "reference":
            return self.reference(*args, **kwargs)
        for name, when, fn in self.candidates:
            if name == forced and when(*args, **kwargs):
                return fn(*args, **kwargs)
        offered = ", ".join(["reference", *(name for name, _, _ in self.candidates)])
        raise BackendError(f"backend {forced!r} cannot serve this call of {self.reference.__name__}; it has: {offered}")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force every op called inside the block to use one backend.

    Args:
        backend: "reference", or the name of a registered backend.

    Raises: BackendError at the first call that this backend cannot serve.
    """
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def is_free() -> bool:
    """Whether no backend is forced, so that several operations may be served by one."""
    return _choice() is None


def native_serves(source: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels of native/SOURCE.cpp are compiled and take these tensors (CPU, float32 or bfloat16)."""
    from plait.kernels.native.library import serves

    return serves(source, *tensors)


def triton_serves(*tensors: Tensor | None) -> bool:
    """Whether Triton is here and these tensors are on a GPU, or anywhere when a test forces it (the interpreter).

    The kernels take vectors (biases, decays, lengths) for dense: one with gaps or repeated numbers is not served.
    """
    given = [t for t in tensors if t is not None]
    dense = all(t.dim() != 1 or t.is_contiguous() for t in given)
    together = all(t.is_cuda and t.device == given[0].device for t in given)
    return _HAS_TRITON and dense and (_choice() == "triton" or together)


def _where_tensors_are(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` with the first tensor's GPU as the current one: Triton launches there, wherever its arguments are.

    Backward passes need nothing of it: autograd runs them on the GPU of the forward pass.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # a compiler sees to it itself
        if not torch.compiler.is_compiling():
            first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
            if first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return fn(*args, **kwargs)
        return fn(*args, **kwargs)

    return run
