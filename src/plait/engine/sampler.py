"""Logits to token ids: every row with its own settings and its own randomness.

In this order, each on what the one before left:

    repetition penalty   l_i -> l_i / r where l_i > 0, l_i r where l_i < 0, for every i seen so far
    presence, frequency  l_i -> l_i - presence [c_i > 0] - frequency c_i, i being c_i times in the answer
    bias                 l_i -> l_i + b_i
    constraint           -inf at every i that the grammar of the answer does not allow here
    temperature          l -> l / t;  t = 0 ends here with the largest
    top-k                keep the k largest
    top-p                keep the largest whose mass before them is below p
    min-p                keep those with probability at least m times the largest one's

and then one uniform number picks from the cumulated distribution. That number is a hash of (seed, position in the
sequence): nothing is drawn in turn, so neither the batch around a row nor an interruption changes its tokens. On a
processor each row is computed by itself, so that its sums are the same to the last bit in every batch; on a GPU rows of
equal settings go together. Log-probabilities are of the model's own distribution, before all of this.

Shapes   B rows, V vocabulary.
Numbers  logits in float32, cumulated probabilities in float64.
Source   Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p); Keskar et al.
         2019, arXiv:1909.05858 (repetition); OpenAI's API reference (presence, frequency, bias); Steele et al. 2014,
         SplitMix (the hash).
"""

import math
import secrets
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from plait.engine.constraint import Grammar
from plait.engine.request import Logprob, Sampling
from plait.engine.thinking import Thoughts

# tokens that top-p looks at first
_HEAD = 1024
_MASK = (1 << 64) - 1


class Draw:
    """How one sequence draws its tokens: settings, seed, how long it is, and which tokens it has seen."""

    def __init__(
        self,
        sampling: Sampling,
        ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        *,
        index: int = 0,
        end_ids: Set[int] = frozenset(),
        thoughts: Thoughts | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        """
        Args:
            sampling: its settings; without a seed one is taken from the operating system.
            ids: the prompt.
            vocab_size, device: of the logits.
            index: which of several answers to the prompt; each has its own random numbers.
            end_ids: ids that finish it; inside of reasoning they end the reasoning instead.
            thoughts: follows its reasoning.
            grammar: what its answer must obey, fresh; reasoning is free.

        Raises: ValueError for a bias on what is no id of the model.
        """
        self.sampling, self.end_ids, self.thoughts, self.grammar = sampling, end_ids, thoughts, grammar
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.seed = _mixed(seed + _mixed(index)) if index else seed
        self.position = len(ids)
        self.logprobs: list[Logprob] = []
        """One of each new token, if asked for."""
        self.seen: Tensor | None = None  # (V,) bool, kept only where there is a penalty
        self.counts: Tensor | None = None  # (V,) float32, the same
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(ids, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        self._bias = _bias(sampling, vocab_size, device)

    @property
    def is_plain(self) -> bool:
        """Whether the settings of `plait.ops.sample` say all about it, so that a captured step may draw for it."""
        kept = (self.seen, self.counts, self._bias, self.thoughts, self.grammar, self.sampling.logprobs)
        return all(part is None for part in kept)

    @property
    def done(self) -> bool:
        """Nothing may follow: the answer is all that its grammar allows."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def failure(self) -> str | None:
        """Why no token could be drawn, None while all is well."""
        return None if self.grammar is None else self.grammar.failure

    def note(self, token_id: int) -> None:
        """Count a token that was chosen."""
        self.position += 1
        if self.seen is not None:
            self.seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1
        answers = self.thoughts is None or self.thoughts.note(token_id)
        if self.grammar is not None and answers and token_id not in self.end_ids:
            self.grammar.note(token_id)

    def adjusted(self, logits: Tensor) -> Tensor:
        """Penalties, bias and constraint on (V,) float32 logits; not in place."""
        s = self.sampling
        if self.seen is not None:
            r = s.repetition_penalty
            logits = torch.where(self.seen, torch.where(logits > 0, logits / r, logits * r), logits)
        if self.counts is not None:
            logits = logits - s.presence_penalty * (self.counts > 0) - s.frequency_penalty * self.counts
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        thoughts = self.thoughts
        if self.grammar is not None and (thoughts is None or thoughts.is_over):
            allowed = self.grammar.allowed()
            if allowed is not None:
                allowed[list(() if thoughts is None else thoughts.may_open)] = True
                logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
        elif thoughts is not None and thoughts.owes_answer and self.end_ids:
            logits = logits.index_fill(0, torch.tensor(sorted(self.end_ids), device=logits.device), -math.inf)
        return logits

    def settled(self, token_id: int) -> int:
        """The id that really comes next where `token_id` was drawn: reasoning may have to close."""
        return token_id if self.thoughts is None else self.thoughts.settled(token_id, self.end_ids)


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Choose the next token of every row.

    Args:
        logits: (B, V), any float dtype.
        draws: B, one per row; `note` the chosen ids afterwards, and look at its `failure` before, at `done` after.

    Returns: B ids.
    Raises: FloatingPointError if a row of logits holds no number.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    changed = logits
    for row, draw in enumerate(draws):
        s = draw.sampling
        apart = row if logits.is_cpu else 0
        key = ("greedy",) if s.temperature == 0 else (s.temperature, s.top_k, s.top_p, s.min_p, apart)
        groups.setdefault(key, []).append(row)
        if not draw.is_plain:
            changed = logits.float().clone() if changed is logits else changed
            changed[row] = draw.adjusted(changed[row])
    ids = [0] * len(draws)
    for rows in groups.values():
        # most batches share one setting: then nothing is gathered
        some = changed if len(rows) == len(draws) else changed[rows]
        drawn = chosen(some, draws[rows[0]].sampling, [(draws[row].seed, draws[row].position) for row in rows])
        for row, token_id in zip(rows, drawn, strict=True):
            ids[row] = draws[row].settled(token_id)
    for row, draw in enumerate(draws):
        if draw.sampling.logprobs is not None:
            draw.logprobs.append(logprob(logits[row], ids[row], draw.sampling.logprobs))
    return ids


def logprob(logits: Tensor, token_id: int, n_top: int) -> Logprob:
    """How likely a token was, and the likeliest ones.

    Args:
        logits: (V,) as the model gave them.
        token_id: the token.
        n_top: how many of the likeliest.
    """
    p = logits.float().log_softmax(-1)
    top = p.topk(min(n_top, len(p)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Logprob(token_id=token_id, logprob=float(p[token_id]), top=tuple(pairs))


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


def _bias(sampling: Sampling, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Ids and what is added to their logits."""
    pairs = dict(sampling.logit_bias)
    if not pairs:
        return None
    if max(pairs) >= vocab_size:
        raise ValueError(
            f"logit_bias: there is no token id {max(pairs)}; the model's ids run from 0 to {vocab_size - 1}"
        )
    return torch.tensor(list(pairs), device=device), torch.tensor(list(pairs.values()), device=device).float()


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


def chosen(logits: Tensor, s: Sampling, numbers: Sequence[tuple[int, int]]) -> list[int]:
    """Draw a token of every row by one setting.

    Args:
        logits: (B, V), penalties and the like applied.
        s: temperature and filters.
        numbers: seed and position of each row.

    Raises: FloatingPointError if a row of logits holds no number.
    """
    if s.temperature == 0:
        largest, ids = logits.max(-1)
        broken = largest.isnan()
    else:
        cumulated = filtered(logits, s).softmax(-1).double().cumsum(-1)
        total = cumulated[:, -1:]
        u = torch.tensor([uniform(seed, position) for seed, position in numbers], dtype=torch.float64)
        # the first id whose sum is above the number: one of probability zero never is
        ids = torch.searchsorted(cumulated, u.to(logits.device)[:, None] * total, right=True)[:, 0]
        broken = total.isnan()
    if bool(broken.any()):
        raise FloatingPointError("the model's logits are not numbers; its weights or its precision are broken")
    return ids.tolist()
