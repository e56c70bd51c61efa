"""Finds units that say the same: those whose activity over the calibration text is another's, times a number.

    j repeats i  if  |s_j - c s_i| <= 0.01 |s_j|,   c = <s_i, s_j> / <s_i, s_i>

on sketches s (taps.py). Removing j changes nothing once c times its outgoing weights are added to those of i, so a twin
is worth nothing beside its leader, the first of them, however loud it is.

Layers are twins by their weights: all alike but for what multiplies their output, which may be another's times a
number. One of two such layers goes with least harm when the other one adds as much as both.

Numbers  float64.
"""

import torch
from torch import Tensor

from plait.compress.dims import outputs
from plait.model.hybrid import Hybrid

FAR = 0.01
# rows of the matrix of products at a time
ROWS = 128


def twins(sketches: Tensor) -> tuple[Tensor, Tensor]:
    """Who repeats whom.

    Args:
        sketches: (units, n), one row per unit; a row of zeros is nobody's twin.

    Returns: leader (units,) int64, itself for most, and factor (units,) float64: how many times the leader's activity.
    """
    s = sketches.double()
    norms = s.norm(dim=1)
    unit = s / norms.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    n = len(s)
    leader = torch.arange(n)
    for begin in range(0, n, ROWS):
        rows = slice(begin, min(begin + ROWS, n))
        cosines = unit[rows] @ unit[: rows.stop].T
        # 1 - cos^2 is the square of the distance, as a share
        near = (1 - cosines.square() <= FAR**2).tril(begin)
        near[torch.arange(len(near)), torch.arange(begin, rows.stop)] = True
        leader[rows] = near.int().argmax(dim=1)
    # a twin of a twin leads nobody
    leader = torch.where(leader[leader] == leader, leader, torch.arange(n))
    factor = (s * s[leader]).sum(1) / norms[leader].square().clamp(min=torch.finfo(s.dtype).tiny)
    alone = leader == torch.arange(n)
    return leader, torch.where(alone, 1.0, factor)


def merged(columns: Tensor, leader: Tensor, factor: Tensor) -> Tensor:
    """What reads each unit once its twins are merged into it, (units, ...); zero for the twins."""
    weight = factor.to(columns.dtype).view(-1, *[1] * (columns.dim() - 1))
    return torch.zeros_like(columns).index_add_(0, leader, columns * weight)


def twin_layers(model: Hybrid) -> dict[int, tuple[int, float]]:
    """Layers that a later one repeats: layer -> (the next of its twins, by what that one's output grows without it)."""
    found: dict[int, tuple[int, float]] = {}
    layers, blocks = model.config.layers, model.blocks
    for first, spec in enumerate(layers):
        for second in range(first + 1, len(layers)):
            if layers[second] == spec and not spec.sigma_reparam:
                times = _times(blocks[first].state_dict(), blocks[second].state_dict(), outputs(spec))
                if times is not None:
                    found[first] = second, 1 + times
                    break
    return found


def _times(one: dict[str, Tensor], other: dict[str, Tensor], scaled: tuple[str, ...]) -> float | None:
    """How many times the other layer's output a layer gives for the same input; None if they differ otherwise."""
    times: list[float] = []
    for name, tensor in one.items():
        a, b = tensor.flatten(), other[name].flatten()
        if not (a.any() or b.any()):
            # such as biases that were never trained: zero times anything
            continue
        # few numbers tell most layers apart
        few = slice(None, None, max(len(a) // 64, 1))
        for x, y in ((a[few].double(), b[few].double()), (a.double(), b.double())):
            c = float(x @ y / (y @ y)) if name in scaled and float(y @ y) > 0 else 1.0
            if float((x - c * y).norm()) > FAR * float(x.norm()):
                return None
        if name in scaled:
            times.append(c)
    # of two layers that add nothing, one is the other
    return 1.0 if not times else times[0] if max(times) - min(times) <= FAR * abs(times[0]) else None
