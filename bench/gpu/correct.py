"""First of all: does every Triton kernel give what its reference gives, in the dtype that is timed?"""

from collections.abc import Callable, Sequence

import torch
from clock import Bench
from inputs import Tensors, cache, random, scan, update, window
from torch import Tensor

from plait.ops.activation import gate, squared_relu
from plait.ops.conv import causal_conv1d, causal_conv1d_step
from plait.ops.decode_attention import decode_attention
from plait.ops.dispatch import use
from plait.ops.loss import linear_cross_entropy
from plait.ops.norm import add_rms_norm, gated_rmsnorm, rms_norm
from plait.ops.rope import Rope, inverse_frequencies, rotate
from plait.ops.sample import kept_logits, sample_ids
from plait.ops.ssd import selective_state_update, ssd

Call = Callable[[Tensors], Sequence[Tensor]]
# relative error allowed: a few roundings of bfloat16, and sums of many products in float32
ALLOWED = {torch.bfloat16: 0.02, torch.float32: 2e-5}


def check(bench: Bench) -> None:
    """Note each kernel's relative error; one that is wrong, or missing, is named and does not stop the others."""
    s = bench.setting
    for name, call, inputs in cases(bench):
        try:
            error = difference(call, inputs)
        except Exception as problem:
            # Triton's own errors, of a kernel that does not compile or fit, have no other ancestor
            bench.report.add(f"correct: {name}", f"NO: {type(problem).__name__}: {problem}"[:200])
            continue
        bench.report.add(f"correct: {name}", "yes" if error < ALLOWED[s.dtype] else f"NO: relative error {error:.2g}")
        bench.report.add(f"correct: {name}: relative error", error)
    bench.report.add("correct: sampling", sampling(bench))


def cases(bench: Bench) -> list[tuple[str, Call, Tensors]]:
    """(name, how to call it, its inputs)."""
    s, layer = bench.setting, bench.setting.layer
    make, L = random(s.device, s.dtype), 300 if s.on_gpu else 40
    wide = (2, L // 2, layer.inner)
    rows = {"x": make(2, L, layer.width), "residual": make(2, L, layer.width), "w": make(layer.width)}
    gated = {"x": make(*wide), "z": make(*wide), "w": make(layer.inner)}
    conv = {"x": make(2, L, layer.conv), "w": make(layer.conv, 4), "bias": make(layer.conv)}
    recurrence = scan(layer, 2, L, s.device, s.dtype)
    # a kernel's own rounding of x, B and C is part of what is timed, not the inputs' distance from float32
    keys = cache(layer, 2, 5 * L, s.device, s.dtype)
    keys["lengths"] = torch.tensor([5 * L, 3], device=s.device)
    seed = torch.tensor([7], device=s.device)
    positions = torch.arange(1000, 1000 + L, device=s.device)[None]
    speeds = inverse_frequencies(Rope(base=500000.0), layer.attention_dim)[0].to(s.device)
    loss = {
        "h": make(70, layer.width),
        "w": random(s.device, s.dtype, layer.width**-0.5)(layer.vocabulary, layer.width),
    }
    loss["targets"] = torch.randint(0, layer.vocabulary, (70,), device=s.device)
    loss["targets"][5] = -100
    return [
        ("rms norm", lambda t: [rms_norm(t["x"], t["w"])], rows),
        ("add + rms norm", lambda t: add_rms_norm(t["x"], t["residual"], t["w"]), rows),
        ("rms norm, gradients", lambda t: gradients(lambda x, w: rms_norm(x, w), t, "x", "w"), rows),
        ("gated norm", lambda t: [gated_rmsnorm(t["x"], t["z"], t["w"], groups=layer.groups)], gated),
        (
            "gated norm, gradients",
            lambda t: gradients(lambda x, z, w: gated_rmsnorm(x, z, w, groups=layer.groups), t, "x", "z", "w"),
            gated,
        ),
        ("squared ReLU", lambda t: [squared_relu(t["x"])], rows),
        ("SwiGLU", lambda t: [gate(t["x"], t["residual"], activation="silu")], rows),
        (
            "SwiGLU, gradients",
            lambda t: gradients(lambda g, x: gate(g, x, activation="silu"), t, "x", "residual"),
            rows,
        ),
        (
            "rotation",
            lambda t: [rotate(t["q"], positions, speeds)],
            {"q": make(2, L, layer.queries, layer.attention_dim)},
        ),
        ("convolution", lambda t: [causal_conv1d(t["x"], t["w"], t["bias"])], conv),
        ("convolution, gradients", lambda t: gradients(causal_conv1d, t, "x", "w", "bias"), conv),
        ("convolution step", lambda t: [causal_conv1d_step(**t), t["window"]], window(layer, 3, s.device, s.dtype)),
        ("scan", lambda t: ssd(**t, chunk=layer.chunk), recurrence),  # type: ignore[arg-type]
        ("scan, gradients", lambda t: gradients(_scanned(layer.chunk, t), t, "x", "dt", "B", "C"), recurrence),
        (
            "state update, float32",
            lambda t: [selective_state_update(**t), t["state"]],  # type: ignore[arg-type]
            update(layer, 3, s.device, s.dtype, torch.float32),
        ),
        (
            "state update, float16 state, stochastic",
            lambda t: [selective_state_update(**t, rounding_seed=seed)],  # type: ignore[arg-type]
            update(layer, 3, s.device, s.dtype, torch.float16),
        ),
        ("decode attention", lambda t: [decode_attention(**t)], keys),
        ("cross-entropy", lambda t: [linear_cross_entropy(t["h"], t["w"], t["targets"])], loss),
        (
            "cross-entropy, gradients",
            lambda t: gradients(lambda h, w: linear_cross_entropy(h, w, t["targets"]), t, "h", "w"),
            loss,
        ),
    ]


def difference(call: Call, inputs: Tensors) -> float:
    """The largest relative distance of the Triton backend's results from those of the reference in float32."""
    with use("triton"):
        ours = call({name: t.clone() for name, t in inputs.items()})
    with use("reference"):
        exact = call({name: t.float() if t.is_floating_point() else t.clone() for name, t in inputs.items()})
    errors = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(ours, exact, strict=True)]
    return max(float(error) if bool(error.isfinite()) else float("inf") for error in errors)


def gradients(call: Callable[..., Tensor], t: Tensors, *names: str) -> Sequence[Tensor]:
    """Gradients of a weighted sum of the result by these inputs."""
    leaves = [t[name].detach().requires_grad_() for name in names]
    with torch.enable_grad():
        out = call(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        return torch.autograd.grad((out.float() * (1 if out.dim() == 0 else weights)).sum(), leaves)


def _scanned(chunk: int, t: Tensors) -> Callable[..., Tensor]:
    rest = {name: t[name] for name in ("A", "D", "dt_bias")}
    return lambda x, dt, B, C: ssd(x, dt, B=B, C=C, chunk=chunk, **rest)[0]  # type: ignore[misc]


def sampling(bench: Bench) -> str:
    """Whether the ids drawn without sorting are among those that sorting keeps, and the greedy ones the largest."""
    s, n = bench.setting, 64 if bench.setting.on_gpu else 6
    logits = random(s.device, s.dtype, 3.0)(n, s.layer.vocabulary)
    how = {
        "temperature": torch.linspace(0, 1.5, n, device=s.device),
        "top_k": torch.arange(n, device=s.device, dtype=torch.int32),
        "top_p": torch.linspace(1, 0.2, n, device=s.device),
        "min_p": torch.linspace(0, 0.05, n, device=s.device),
    }
    with use("triton"):
        ids = sample_ids(logits, torch.rand(n, device=s.device, dtype=torch.float64), **how)
    kept = kept_logits(logits, **how).gather(1, ids.clamp(min=0)[:, None])[:, 0] > -torch.inf
    right = bool((kept & (ids >= 0)).all()) and int(ids[0]) == int(logits[0].argmax())
    return "yes" if right else "NO: a token was drawn that sorting does not keep"
