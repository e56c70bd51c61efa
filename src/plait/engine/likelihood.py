"""How likely a model finds given continuations: log p(continuation | context), summed over its tokens, many at a time.

    log p(c | x) = sum_t log softmax(logits at the token before c_t)[c_t]

Only the positions before a continuation's tokens meet the head. Sequences of similar length run together, padded behind
their last token, where nothing looks.

Numbers  log-softmax in float32, in nats.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.model.hybrid import Hybrid
from plait.ops.linear import linear

# tokens of a batch, padding included; rows of logits that are in memory at once
BATCH_TOKENS, LOGIT_ROWS = 4096, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """context, continuation: token ids; at least one of each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuation:
            raise ValueError("a question needs at least one token of context, and one to be scored")


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """logprob: of the whole continuation, nats. tokens: how many. greedy: whether each is the model's first choice."""

    logprob: float
    tokens: int
    greedy: bool


@torch.inference_mode()
def likelihoods(
    model: Hybrid,
    questions: Sequence[Question],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """Score continuations.

    Args:
        model: any model, as it is.
        questions: in any order; a longer one than the model's context loses the beginning of its context.
        batch_tokens: of one pass, padding included, though at least one sequence runs.
        progress: called with the number of questions just answered.

    Returns: one likelihood per question, in their order.
    Raises: ValueError for a continuation that alone fills the model's context, or ids outside of its vocabulary.
    """
    found: dict[int, Likelihood] = {}
    longest, size = model.config.max_context, model.config.vocab_size
    for i, q in enumerate(questions):
        if len(q.continuation) > longest:
            raise ValueError(
                f"questions[{i}]: a continuation of {len(q.continuation)} tokens; the context is {longest}"
            )
        for token in (*q.context, *q.continuation):
            if not 0 <= token < size:
                raise ValueError(
                    f"questions[{i}] holds token id {token}, outside the vocabulary of {size}; "
                    "is this the model's own tokenizer?"
                )
    # what predicts is every token but the last; ids are cut in front
    rows = [(*q.context, *q.continuation)[-longest - 1 :] for q in questions]
    for batch in _batches([len(row) - 1 for row in rows], batch_tokens):
        sizes = [len(questions[i].continuation) for i in batch]
        for i, likelihood in zip(batch, _score(model, [rows[i] for i in batch], sizes), strict=True):
            found[i] = likelihood
        if progress is not None:
            progress(len(batch))
    return [found[i] for i in range(len(questions))]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices that run together, the longest first, so that memory is never short late."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(model: Hybrid, rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[Likelihood]:
    """Likelihoods of the last `sizes` tokens of each row."""
    width = max(map(len, rows)) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for r, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        n = len(row) - 1
        ids[r, :n] = torch.tensor(row[:-1])
        scored[r, n - size : n] = True
    targets = torch.tensor([t for row, size in zip(rows, sizes, strict=True) for t in row[len(row) - size :]])
    ids, scored, targets = (t.to(model.device) for t in (ids, scored, targets))
    # what lies behind a row's last token needs no mask: no position sees a later one
    x = model.hidden(ids)[0][scored]  # (sum of sizes, D)
    logprobs, first = [], []
    for some, wanted in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = _head(model, some).float()
        logprobs.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
        first.append(logits.argmax(1) == wanted)
    parts = zip(torch.cat(logprobs).split(list(sizes)), torch.cat(first).split(list(sizes)), sizes, strict=True)
    return [Likelihood(logprob=float(a.double().sum()), tokens=n, greedy=bool(b.all())) for a, b, n in parts]


def _head(model: Hybrid, x: Tensor) -> Tensor:
    return linear(x, model.embed.weight.to(x.dtype)) if model.head is None else model.head(x)
