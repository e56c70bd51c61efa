"""The same operation in mamba_ssm and fla, the Triton libraries that people use on NVIDIA GPUs.

Each adapter takes our arguments and calls theirs; results are compared with ours before anything is timed.

Source   mamba_ssm.ops.triton (ssd_combined, layernorm_gated); fla.ops.simple_gla, which is the same recurrence with
         queries C, keys B, values dt x and log-decays dt A.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from plait.cli.benches.case import Case, gradients_of
from plait.ops.ssd import discretize

Adapter = Callable[..., Tensor]


def gpu_peers(peer: str, case: Case) -> Callable[[], list[Tensor]] | None:
    """A peer's run of a case, its results in the order of ours; None if it has no such operation or no GPU is here.

    Raises: ValueError if the peer is not installed.
    """
    adapter = _ADAPTERS.get((peer, case.op))
    if adapter is None or case.call is None or not torch.cuda.is_available():
        return None
    try:
        __import__(peer)
    except ImportError:
        raise ValueError(f"--against {peer}: it is not installed") from None
    (args, kwargs), gradients = case.call, case.gradients

    def run() -> list[Tensor]:
        if not gradients:
            with torch.inference_mode():
                return [adapter(*args, **kwargs)]
        return gradients_of(adapter, args, kwargs)

    return run


def _mamba_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: object) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # type: ignore[import-not-found]

    chunk, D, bias = kw["chunk"], kw["D"], kw["dt_bias"]
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True)


def _mamba_gated(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float = 1e-5) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # type: ignore[import-not-found]

    size = x.shape[-1] // groups
    return rmsnorm_fn(x, w, None, z=z, eps=eps, group_size=size, norm_before_gate=False)


def _fla_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kw: object) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    D, bias = kw["D"], kw["dt_bias"]
    assert isinstance(D, Tensor) and (bias is None or isinstance(bias, Tensor))
    steps = discretize(dt, bias, (0.0, float("inf")), None)
    repeats = x.shape[2] // B.shape[2]
    k, q = (t.repeat_interleave(repeats, 2) for t in (B, C))
    out = chunk_simple_gla(q, k, (x * steps[..., None]).to(x.dtype), g=steps * A, scale=1.0)[0]
    return (out + D[:, None] * x).to(x.dtype)


_ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("mamba_ssm", "ssd"): _mamba_ssd,
    ("mamba_ssm", "gated_rmsnorm"): _mamba_gated,
    ("fla", "ssd"): _fla_ssd,
}
