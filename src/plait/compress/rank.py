"""Ranks candidates by what they predict before any training: the next token, and the teacher's next token.

    accuracy   = share of tokens whose likeliest next token is the right one
    agreement  = share of tokens whose likeliest next token is the teacher's
    rank by their mean, then by lower loss, then by the order in which the candidates came

The text is read in rounds: all candidates on the first piece, the better half of them on that and the next one, and so
on, so that most of the work is done on those that may win. What is found is written after every candidate and round;
a ranking that was stopped goes on there and ends as it would have.

Source   NVIDIA 2025, arXiv:2504.03624 section 3.2 (accuracy and agreement); Jamieson and Talwalkar 2016,
         arXiv:1502.07943 (halving).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.compress.plan import Plan
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.model.hybrid import Hybrid
from plait.ops.loss import SLICE_LOGITS, slices
from plait.train.metrics import write_whole

FILE = "ranking.json"
# candidates looked at, in all and in this round
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Over the tokens of some batches: counted, right, agreeing with the teacher, and the loss in nats."""

    tokens: int = 0
    right: int = 0
    agreed: int = 0
    loss: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            tokens=self.tokens + other.tokens,
            right=self.right + other.right,
            agreed=self.agreed + other.agreed,
            loss=self.loss + other.loss,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A candidate and what was measured on `tokens` tokens; shares, and mean nats per token."""

    plan: Plan
    tokens: int
    accuracy: float
    agreement: float
    loss: float


def rounds_of(n_plans: int, n_batches: int, keep: int) -> list[tuple[int, int]]:
    """(candidates, batches that each reads) of each round: half as many candidates, twice as many batches.

    Args:
        n_plans: candidates of the first round. n_batches: of the text. keep: candidates of the last round, at least.
    """
    sizes = [n_plans]
    while sizes[-1] > max(keep, 1) and len(sizes) <= n_batches.bit_length() - 1:
        sizes.append(max(-(-sizes[-1] // 2), keep))
    ends = [max(1, n_batches >> (len(sizes) - 1 - i)) for i in range(len(sizes))]
    starts = [0, *ends[:-1]]
    return [(n, end - start) for n, start, end in zip(sizes, starts, ends, strict=True)]


@torch.no_grad()
def rank(
    teacher: Hybrid,
    plans: Sequence[Plan],
    make: Callable[[Plan], Hybrid],
    batches: Sequence[Batch],
    folder: Path,
    *,
    keep: int = 3,
    progress: Progress | None = None,
) -> list[Ranked]:
    """Rank candidates, best first.

    Args:
        teacher: whose next token is to be met.
        plans: candidates, each once.
        make: a candidate's model, on the teacher's device: `prune(...).model(...)`.
        batches: text that the scores have not read; students learn from it later, so that its losses are for ranking
            only.
        folder: where ranking.json is kept; that of the same plans and batches is continued.
        keep: how many candidates are ranked on all of the text, at least.
        progress: called after every candidate with how many were looked at, of how many, over all rounds.

    Returns: the candidates of the last round, then those that fell out in the round before, and so on.
    """
    if not plans or not batches:
        raise ValueError(f"{len(plans)} candidates and {len(batches)} batches: a ranking needs at least one of each")
    rounds = rounds_of(len(plans), len(batches), keep)
    folder.mkdir(parents=True, exist_ok=True)
    done = _read(folder / FILE)
    keys = {hashlib.sha256(repr(plan).encode()).hexdigest()[:16]: plan for plan in plans}
    sums: dict[str, Sums] = {}
    alive, fallen, begin, n_seen = list(keys), [], 0, 0
    for i, (_, n) in enumerate(rounds):
        part = range(begin, begin + n)
        answers: dict[int, Tensor] = {}
        for key in alive:
            name = f"{key}/{begin}-{begin + n}"
            if name not in done:
                answers = answers or {b: likeliest(teacher, batches[b]) for b in part}
                done[name] = _measured(make(keys[key]), [batches[b] for b in part], [answers[b] for b in part])
                write_whole(folder / FILE, json.dumps({name: asdict(found) for name, found in done.items()}) + "\n")
            sums[key] = sums.get(key, Sums()) + done[name]
            n_seen += 1
            if progress is not None:
                progress(n_seen, sum(size for size, _ in rounds))
        order = list(keys)
        alive = sorted(alive, key=lambda key: (*_worth(sums[key]), order.index(key)))
        if i + 1 < len(rounds):
            alive, out = alive[: rounds[i + 1][0]], alive[rounds[i + 1][0] :]
            fallen = out + fallen
        begin += n
    return [_ranked(keys[key], sums[key]) for key in alive + fallen]


@torch.no_grad()
def likeliest(model: Hybrid, batch: Batch) -> Tensor:
    """(B, L) int32 on the CPU: the likeliest next token at each position."""
    batch = batch.to(model.device)
    x, _ = model.hidden(batch.ids, starts=batch.starts)
    return _argmax(model, x).cpu()


def _argmax(model: Hybrid, x: Tensor) -> Tensor:
    flat, head = x.flatten(0, 1), model.head_weight.to(x.dtype)
    parts = [(flat[part] @ head.T).argmax(-1) for part in slices(len(flat), SLICE_LOGITS // head.shape[0])]
    return torch.cat(parts).view(x.shape[:2]).int()


def _measured(model: Hybrid, batches: Sequence[Batch], answers: Sequence[Tensor]) -> Sums:
    total = Sums()
    for batch, answer in zip(batches, answers, strict=True):
        batch = batch.to(model.device)
        x, _ = model.hidden(batch.ids, starts=batch.starts)
        found, counted = _argmax(model, x), batch.targets != IGNORED
        total += Sums(
            tokens=int(counted.sum()),
            right=int((found == batch.targets)[counted].sum()),
            agreed=int((found == answer.to(found.device))[counted].sum()),
            loss=float(model.loss_sum(x, batch.targets)),
        )
    return total


def _worth(found: Sums) -> tuple[float, float]:
    """What to sort by, ascending."""
    return -(found.right + found.agreed) / max(found.tokens, 1), found.loss / max(found.tokens, 1)


def _ranked(plan: Plan, found: Sums) -> Ranked:
    n = max(found.tokens, 1)
    return Ranked(
        plan=plan, tokens=found.tokens, accuracy=found.right / n, agreement=found.agreed / n, loss=found.loss / n
    )


def _read(path: Path) -> dict[str, Sums]:
    if not path.is_file():
        return {}
    data: Mapping[str, Mapping[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return {name: Sums(**found) for name, found in data.items()}  # type: ignore[arg-type]
