"""Logits to token ids: every row with its own settings and its own randomness.

In this order, each on what the one before left:

    repetition penalty   l_i -> l_i / r where l_i > 0, l_i r where l_i < 0, for every i seen so far
    temperature          l -> l / t;  t = 0 ends here with the largest
    top-k                keep the k largest
    top-p                keep the largest whose mass before them is below p
    min-p                keep those with probability at least m times the largest one's

and then one uniform number picks from the cumulated distribution. That number is a hash of (seed, position in the
sequence): nothing is drawn in turn, so neither the batch around a row nor an interruption changes its tokens.

Shapes   B rows, V vocabulary.
Numbers  logits in float32, cumulated probabilities in float64.
Source   Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al.
         2019, arXiv:1909.05858 (penalty); Steele et al. 2014, SplitMix (the hash).
"""

import math
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from plait.engine.request import Sampling

# tokens that top-p looks at first
_HEAD = 1024
_MASK = (1 << 64) - 1


class Draw:
    """How one sequence draws its tokens: settings, seed, how long it is, and which tokens it has seen."""

    def __init__(self, sampling: Sampling, ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        """
        Args:
            sampling: its settings; without a seed one is taken from the operating system.
            ids: the prompt.
            vocab_size, device: of the logits.
        """
        self.sampling = sampling
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.position = len(ids)
        self.seen: Tensor | None = None  # (V,) bool, kept only where there is a penalty
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(ids, device=device)] = True

    def note(self, token_id: int) -> None:
        """Count a token that was chosen."""
        self.position += 1
        if self.seen is not None:
            self.seen[token_id] = True


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose the next token of every row.

    Args:
        logits: (B, V), any float dtype.
        draws: B, one per row; `note` the chosen ids afterwards.

    Returns: B ids.
    Raises: FloatingPointError if a row of logits holds no number.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, draw in enumerate(draws):
        s = draw.sampling
        key = ("greedy",) if s.temperature == 0 else (s.temperature, s.top_k, s.top_p, s.min_p)
        groups.setdefault(key, []).append(row)
    if any(draw.seen is not None for draw in draws):
        logits = torch.stack([_penalised(row, draw) for row, draw in zip(logits.float(), draws, strict=True)])
    ids = [0] * len(draws)
    for rows in groups.values():
        # most batches share one setting: then nothing is gathered
        some = logits if len(rows) == len(draws) else logits[rows]
        chosen = _choose(some, [draws[row] for row in rows])
        for row, token_id in zip(rows, chosen, strict=True):
            ids[row] = token_id
    return ids


def filtered(logits: Tensor, s: Sampling) -> Tensor:
    """Temperature, top-k, top-p and min-p of one setting, temperature > 0.

    Args:
        logits: (B, V).
        s: the setting.

    Returns: (B, V) float32, -inf at tokens that cannot be drawn; equal logits at an edge stay or go together.
    """
    logits = logits.float() / s.temperature
    ranked = None  # (B, at most V), largest first: what is left so far
    if s.top_k is not None and s.top_k < logits.shape[-1]:
        ranked = logits.topk(s.top_k).values
        logits = logits.masked_fill(logits < ranked[:, -1:], -math.inf)
    if s.top_p is not None and s.top_p < 1:
        ranked, p = _likeliest(logits, s.top_p) if ranked is None else (ranked, ranked.softmax(-1))
        n_kept = (p.cumsum(-1) - p < s.top_p).sum(-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(logits < ranked.gather(-1, n_kept - 1), -math.inf)
    if s.min_p:
        least = logits.amax(-1, keepdim=True) + math.log(s.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    x = _mixed(_mixed(seed & _MASK) + position)
    # 52 bits, so that the product with a sum never rounds up to that sum
    return (x >> 12) * 2.0**-52


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _penalised(logits: Tensor, draw: Draw) -> Tensor:
    if draw.seen is None:
        return logits
    r = draw.sampling.repetition_penalty
    return torch.where(draw.seen, torch.where(logits > 0, logits / r, logits * r), logits)


def _likeliest(logits: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, in order, and their probabilities: at least enough of them to hold `mass`."""
    log_total = logits.logsumexp(-1, keepdim=True)
    # a whole vocabulary takes long to sort, and its head nearly always suffices
    for n in (_HEAD, logits.shape[-1]):
        ranked = logits.topk(min(n, logits.shape[-1])).values
        p = (ranked - log_total).exp()
        if bool((p.sum(-1) >= mass).all()):
            break
    return ranked, p


def _choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    s = draws[0].sampling
    if s.temperature == 0:
        largest, ids = logits.max(-1)
        broken = largest.isnan()
    else:
        cumulated = filtered(logits, s).softmax(-1).double().cumsum(-1)
        total = cumulated[:, -1:]
        u = torch.tensor([uniform(draw.seed, draw.position) for draw in draws], dtype=torch.float64)
        # the first id whose sum is above the number: one of probability zero never is
        ids = torch.searchsorted(cumulated, u.to(logits.device)[:, None] * total, right=True)[:, 0]
        broken = total.isnan()
    if bool(broken.any()):
        raise FloatingPointError("the model's logits are not numbers; its weights or its precision are broken")
    return ids.tolist()
