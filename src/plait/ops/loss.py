"""Cross-entropy of next-token prediction that never holds (tokens x vocabulary) in float32.

    loss = sum_t weight_t * ( logsumexp_v(h_t . w_v) - h_t . w_target )

The head's product, its softmax and its gradients are formed for one slice of tokens at a time. The gradients are taken
in the forward pass, where the probabilities are at hand, and only scaled in the backward pass.

Shapes   T tokens, D width, V vocabulary.
Numbers  products in h.dtype, softmax and sums in float32; the weight's gradient is summed over slices in float32.
Source   Wijmans et al. 2024, arXiv:2411.09009 (cut cross-entropy), with slices of tokens instead of a kernel.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from plait.ops.dispatch import Op, native_serves, triton_serves

IGNORED = -100
# logits held at a time, in h.dtype: enough rows for a fast product
SLICE_LOGITS = 1 << 24
# rows held at a time on a GPU, whose products are at their best from there
GPU_ROWS = 2048
# logits whose softmax is taken at a time, in float32: what stays in cache
BLOCK_LOGITS = 1 << 18


@Op
def linear_cross_entropy(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """Summed cross-entropy of a linear head. This body is the reference: it holds all logits.

    Args:
        h: (T, D) final hidden states.
        w: (V, D) head.
        targets: (T,) int64 the token each position must predict; -100 is left out.
        scale: multiplies the sum, e.g. 1 / number of counted tokens for the mean.

    Returns: scalar float32, in nats.
    Raises: ValueError at once for a target outside 0 .. V - 1 that is not -100, or not a target for each position; on a
        GPU, which must not be waited for, the result is no number then.
    """
    check_targets(h, targets, w.shape[0])
    logits = h @ w.to(h.dtype).T
    return F.cross_entropy(logits.to(wide(h)), targets, ignore_index=IGNORED, reduction="sum") * scale


def _on_triton(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> bool:
    return h.dtype != torch.float64 and triton_serves(h, w, targets)


@linear_cross_entropy.backend("triton", when=_on_triton)
def _(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    from plait.kernels.triton.loss import cross_entropy_rows

    def loss_of(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
        return cross_entropy_rows(logits, targets, IGNORED, wants_gradient=wants_gradient).sum()

    return _in_slices(h, w, targets, GPU_ROWS, loss_of) * scale


@linear_cross_entropy.backend("sliced", when=lambda *args, **kwargs: True)
def _(h: Tensor, w: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    check_targets(h, targets, w.shape[0])
    return _in_slices(h, w, targets, SLICE_LOGITS // w.shape[0], _loss_of) * scale


LossOf = Callable[[Tensor, Tensor, bool], Tensor]


def _in_slices(h: Tensor, w: Tensor, targets: Tensor, rows: int, loss_of: LossOf) -> Tensor:
    # inside the function, a parameter asks for its gradient even when nobody will want it
    wants = torch.is_grad_enabled()
    wanted = (wants and h.requires_grad, wants and w.requires_grad)
    return _SlicedCrossEntropy.apply(h, w, targets, rows, loss_of, *wanted)


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        w: Tensor,
        targets: Tensor,
        rows: int,
        loss_of: LossOf,
        wants_dh: bool,
        wants_dw: bool,
    ) -> Tensor:
        w_low = w.to(h.dtype)
        dh = torch.empty_like(h) if wants_dh else None
        dw = torch.zeros(w.shape, dtype=wide(h), device=w.device) if wants_dw else None
        total = torch.zeros((), dtype=wide(h), device=h.device)
        for part in slices(h.shape[0], rows):
            logits = h[part] @ w_low.T
            total += loss_of(logits, targets[part], wants_dh or wants_dw)
            if dh is not None:
                torch.mm(logits, w_low, out=dh[part])
            if dw is not None:
                add_product(dw, logits.T, h[part])
        ctx.save_for_backward(dh, dw)  # type: ignore[attr-defined]
        ctx.dtype = w.dtype  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dh, dw = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            None if dh is None else (dh * grad).to(dh.dtype),
            None if dw is None else (dw * grad).to(ctx.dtype),  # type: ignore[attr-defined]
            *(None, None, None, None, None),
        )


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on a GPU inside the product, without rounding to a half format on the way."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and _adds_wide(a.dtype, a.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _adds_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch adds products of half formats to a float32 matrix on this GPU."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except (AttributeError, RuntimeError):
        return False
    return bool((total == 17).all())


def slices(n: int, size: int) -> list[slice]:
    """Parts of at most `size`, at least 1, that together are 0 .. n."""
    size = max(size, 1)
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def _loss_of(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    """Summed loss of a slice; its logits become d loss / d logits = softmax - one-hot, zero where left out."""
    if native_serves("loss", logits):
        from plait.kernels.native.loss import cross_entropy_rows

        return cross_entropy_rows(logits, targets, wants_gradient=wants_gradient).sum()
    # the softmax of a few rows stays in cache; their gradient takes the place of their logits
    blocks = slices(logits.shape[0], BLOCK_LOGITS // logits.shape[1])
    return torch.stack([_block_loss(logits[b], targets[b], wants_gradient) for b in blocks]).sum()


def _block_loss(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    ignored = targets == IGNORED
    target = targets.masked_fill(ignored, 0)[:, None]
    logp = logits.to(wide(logits)).log_softmax(-1)
    loss = -logp.gather(1, target)[:, 0].masked_fill(ignored, 0.0).sum()
    if wants_gradient:
        p = logp.exp_()
        p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
        p[ignored] = 0.0
        logits.copy_(p)
    return loss


def wide(h: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or wider if h is."""
    return torch.promote_types(h.dtype, torch.float32)


def check_targets(h: Tensor, targets: Tensor, V: int) -> None:
    """Refuse what `linear_cross_entropy` says it refuses."""
    if targets.shape != h.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden states {tuple(h.shape)}: give (T,) for (T, D)")
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= V))
    if wrong.any():
        raise ValueError(f"target {int(targets[wrong][0])} is outside the vocabulary of {V}; use -100 to leave one out")
