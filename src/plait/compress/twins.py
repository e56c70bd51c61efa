"""Finds units that say the same: those whose activity over the calibration text is another's, times a number.

    j repeats i  if  |s_j - c s_i| <= 0.01 |s_j|,   c = <s_i, s_j> / <s_i, s_i>

on sketches s (taps.py). Removing j changes nothing once c times its outgoing weights are added to those of i, so a twin
is worth nothing beside its leader, the first of them, however loud it is.

Numbers  float64.
"""

import torch
from torch import Tensor

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
