"""Times of single kernels at the 8B layer's sizes, beside the bytes and FLOPs that none can do without."""

import functools
from collections.abc import Callable

import torch
from clock import Bench
from inputs import Tensors, cache, random, scan, update
from peers import mamba_scan
from setting import Layer

from plait.ops.conv import causal_conv1d
from plait.ops.decode_attention import decode_attention
from plait.ops.loss import linear_cross_entropy
from plait.ops.norm import add_rms_norm, gated_rmsnorm
from plait.ops.sample import sample_ids
from plait.ops.ssd import selective_state_update, ssd


def scan_work(s: Layer, tokens: int, width: int) -> tuple[float, float]:
    """FLOPs and bytes of the scan's forward: products inside chunks and with states; inputs read, y written."""
    flops = tokens * (2 * s.chunk * (s.groups * s.states + s.inner) + 4 * s.inner * s.states)
    return flops, tokens * width * (2 * s.inner + 2 * s.groups * s.states + s.heads)


def scans(bench: Bench) -> None:
    """Forward, and forward with backward, of the chunked scan."""

    def ours(x, dt, B, C, rest):  # noqa: ANN001, ANN202
        return ssd(x, dt, B=B, C=C, **rest)[0]

    _scans(bench, "plait", ours)


def peer_scans(bench: Bench, mamba: str) -> None:
    """The same by mamba_ssm where it is, and how many times as long it takes."""
    theirs = mamba_scan(mamba) if bench.setting.on_gpu else None
    bench.report.add("mamba_ssm", "measured" if theirs else "not here: only our own times and floors")
    if theirs is None:
        return
    _scans(bench, "mamba_ssm", lambda x, dt, B, C, rest: theirs(x, dt, rest["A"], B, C, rest))
    for batch, length in bench.setting.scans:
        for part in ("forward", "forward and backward"):
            name = f"scan {batch}x{length} {part}"
            a, b = bench.value(f"mamba_ssm {name}"), bench.value(f"plait {name}")
            if a is not None and b:
                bench.report.add(f"{name}: mamba_ssm's time / plait's", a / b, "x")


def _scans(bench: Bench, side: str, scanned: Callable[..., object]) -> None:
    s, layer = bench.setting, bench.setting.layer
    width = torch.finfo(s.dtype).bits // 8
    for batch, length in s.scans:
        t = scan(layer, batch, length, s.device, s.dtype)
        tokens, name = batch * length, f"scan {batch}x{length}"
        flops, n_bytes = scan_work(layer, tokens, width)
        # backward: five products for each two of forward; reads the inputs and dy again, writes their gradients
        both = n_bytes + tokens * width * (3 * layer.inner + 4 * layer.groups * layer.states + 2 * layer.heads)
        rest = {"A": t["A"], "D": t["D"], "dt_bias": t["dt_bias"], "chunk": layer.chunk}

        def call(x, dt, B, C, rest=rest):  # noqa: ANN001, ANN202
            return scanned(x, dt, B, C, rest)

        label = f"{side} {name}"
        with torch.no_grad():
            seconds = bench.seconds(lambda call=call, t=t: call(t["x"], t["dt"], t["B"], t["C"]))
        bench.add(f"{label} forward", seconds, flops=flops, n_bytes=n_bytes)
        seconds = bench.seconds(_with_backward(call, t), captures=False)
        bench.add(f"{label} forward and backward", seconds, flops=3.5 * flops, n_bytes=both)


def _with_backward(call: Callable[..., object], t: Tensors) -> Callable[[], object]:
    leaves = [t[name].detach().requires_grad_() for name in ("x", "dt", "B", "C")]

    def run() -> object:
        with torch.enable_grad():
            out = call(*leaves)
            assert isinstance(out, torch.Tensor)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


@torch.no_grad()
def updates(bench: Bench) -> None:
    """The selective state update: float32 state, and float16 with stochastic rounding."""
    s, layer = bench.setting, bench.setting.layer
    for batch in s.updates:
        times: dict[torch.dtype, float] = {}
        for state in (torch.float32, torch.float16):
            t = update(layer, batch, s.device, s.dtype, state)
            seed = None if state == torch.float32 else torch.tensor([7], device=s.device)
            name = f"state update, batch {batch}, {str(state)[6:]} state" + (", stochastic" if seed is not None else "")
            n_bytes = 2 * t["state"].numel() * t["state"].element_size()
            n_bytes += sum(one.numel() * one.element_size() for one in (t["x"], t["x"], t["dt"], t["B"], t["C"]))
            seconds = bench.seconds(lambda t=t, seed=seed: selective_state_update(**t, rounding_seed=seed))
            times[state] = bench.add(name, seconds, n_bytes=n_bytes)
        if len(times) == 2:
            ratio = times[torch.float32] / times[torch.float16]
            bench.report.add(f"state update, batch {batch}: float32's time / float16's", ratio, "x")


@torch.no_grad()
def streams(bench: Bench) -> None:
    """What only moves bytes: norms and the convolution, forward, and the convolution's and gated norm's backward."""
    s, layer = bench.setting, bench.setting.layer
    make, width = random(s.device, s.dtype), torch.finfo(s.dtype).bits // 8
    for batch, length in s.scans[:2]:
        tokens, shape = batch * length, f"{batch}x{length}"
        x, z, w = make(batch, length, layer.inner), make(batch, length, layer.inner), make(layer.inner)
        norm = functools.partial(gated_rmsnorm, groups=layer.groups)
        numbers = width * tokens * layer.inner
        bench.add(f"gated norm {shape}", bench.seconds(lambda: norm(x, z, w)), n_bytes=3 * numbers)  # noqa: B023
        seconds = bench.seconds(_backward(norm, x, z, w), captures=False)
        # x, z and dy read, dx and dz written
        bench.add(f"gated norm {shape} backward", seconds, n_bytes=5 * numbers)
        rows, residual, v = (make(*size, layer.width) for size in ((batch, length), (batch, length), ()))
        run = lambda: add_rms_norm(rows, residual, v)  # noqa: B023, E731
        bench.add(f"add + norm {shape}", bench.seconds(run), n_bytes=4 * width * tokens * layer.width)
        channels, taps, bias = make(batch, length, layer.conv), make(layer.conv, 4), make(layer.conv)
        numbers = width * tokens * layer.conv
        run = lambda: causal_conv1d(channels, taps, bias)  # noqa: B023, E731
        bench.add(f"convolution {shape}", bench.seconds(run), n_bytes=2 * numbers)
        seconds = bench.seconds(_backward(causal_conv1d, channels, taps, bias), captures=False)
        bench.add(f"convolution {shape} backward", seconds, n_bytes=3 * numbers)


def _backward(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """The backward pass alone."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        out = call(*leaves)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


@torch.no_grad()
def attention(bench: Bench) -> None:
    """One token over a long cache, contiguous and paged."""
    s, layer = bench.setting, bench.setting.layer
    t = cache(layer, 1, s.context, s.device, s.dtype)
    n_bytes = t["k_cache"].numel() * t["k_cache"].element_size() * 2
    name = f"decode attention 1x{s.context}"
    bench.add(name, bench.seconds(lambda: decode_attention(**t)), n_bytes=n_bytes)
    page = 64 if s.on_gpu else 16
    n_pages = s.context // page
    pages = {key: t[key][:, :, : n_pages * page].unflatten(2, (n_pages, page)) for key in ("k_cache", "v_cache")}
    paged = {key: kv[0].transpose(0, 1).contiguous() for key, kv in pages.items()}
    table = torch.randperm(n_pages, device=s.device, dtype=torch.int32)[None]
    t = t | paged | {"lengths": torch.full((1,), n_pages * page, device=s.device), "page_table": table}
    bench.add(f"{name}, pages of {page}", bench.seconds(lambda: decode_attention(**t)), n_bytes=n_bytes)


def head(bench: Bench) -> None:
    """Linear cross-entropy with its gradients, and sampling."""
    s, layer = bench.setting, bench.setting.layer
    h = random(s.device, s.dtype)(s.loss_tokens, layer.width).requires_grad_()
    w = random(s.device, s.dtype, layer.width**-0.5)(layer.vocabulary, layer.width).requires_grad_()
    targets = torch.randint(0, layer.vocabulary, (s.loss_tokens,), device=s.device)
    flops = 6 * s.loss_tokens * layer.width * layer.vocabulary
    run = lambda: torch.autograd.grad(linear_cross_entropy(h, w, targets), (h, w))  # noqa: E731
    bench.add(f"cross-entropy, {s.loss_tokens} tokens, gradients", bench.seconds(run, captures=False), flops=flops)
    for batch in s.updates[:: len(s.updates) - 1 or 1]:
        logits = random(s.device, s.dtype, 3.0)(batch, layer.vocabulary)
        n_bytes, u = logits.numel() * logits.element_size(), torch.rand(batch, device=s.device, dtype=torch.float64)
        for name, temperature, k, p in (("greedy", 0.0, 0, 1.0), ("top-k 50, top-p 0.95", 0.8, 50, 0.95)):
            full = {
                "temperature": torch.full((batch,), temperature, device=s.device),
                "top_k": torch.full((batch,), k, device=s.device, dtype=torch.int32),
                "top_p": torch.full((batch,), p, device=s.device),
                "min_p": torch.zeros(batch, device=s.device),
            }
            with torch.no_grad():
                seconds = bench.seconds(lambda logits=logits, u=u, full=full: sample_ids(logits, u, **full))
            bench.add(f"sampling, batch {batch}, {name}", seconds, n_bytes=n_bytes)
