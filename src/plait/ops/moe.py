"""Mixture of experts: a sigmoid router that picks experts per token, and the experts' squared-ReLU layers.

    s = sigmoid(x W^T)                            scores, float32
    chosen = top-k of (s + bias), inside the best groups
    w = s[chosen] / (sum + 1e-20) * scale         weights come from the uncorrected scores
    y = sum_j w_j down_j( relu(up_j x)^2 )

Shapes   T tokens, D width, E experts, R chosen per token, F hidden size, X expert input width.
Numbers  router in float32; experts in x.dtype, summed in float32.
Source   Nemotron 3 report, arXiv:2512.20848; DeepSeek-V3, arXiv:2412.19437 section 2.1.2 (correction bias, groups).
"""

import torch
from torch import Tensor

from plait.ops.activation import squared_relu
from plait.ops.dispatch import Op


@Op
def route(
    logits: Tensor,
    bias: Tensor,
    *,
    n_chosen: int,
    n_groups: int = 1,
    n_top_groups: int = 1,
    normalises: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose experts for each token.

    Args:
        logits: (T, E) float32 router outputs.
        bias: (E,) float32 correction, used for the choice only.
        n_chosen: R, experts per token.
        n_groups, n_top_groups: experts lie in n_groups equal groups; only the best n_top_groups (by the sum of their
            two largest corrected scores) may be chosen from.
        normalises: divide the weights by their sum.
        scale: multiplies the weights.

    Returns: weights (T, R) float32 and expert indices (T, R) int64.
    """
    scores = logits.sigmoid()
    corrected = scores.detach() + bias
    if n_groups > 1:
        grouped = corrected.unflatten(-1, (n_groups, -1))  # (T, groups, E / groups)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # (T, groups)
        refused = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(n_top_groups, -1).indices, False)
        corrected = grouped.masked_fill(refused[..., None], -torch.inf).flatten(-2)
    chosen = corrected.topk(n_chosen, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if normalises:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, chosen


@Op
def experts(x: Tensor, weights: Tensor, chosen: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Send each token through its chosen experts and add the results by weight.

    Args:
        x: (T, X); weights: (T, R) float32; chosen: (T, R) int64.
        up: (E, F, X); down: (E, X, F).

    Returns: (T, X) in x.dtype.
    """
    T, R = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # slots (token, choice) sorted by expert
    counts = chosen.flatten().bincount(minlength=up.shape[0]).tolist()
    tokens = order // R
    sorted_x, out = x[tokens], []
    for expert, rows in enumerate(sorted_x.split(counts)):
        if rows.shape[0]:
            out.append(squared_relu(rows @ up[expert].to(x.dtype).T) @ down[expert].to(x.dtype).T)
    results = torch.cat(out).float() * weights.flatten()[order, None]
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, tokens, results).to(x.dtype)
