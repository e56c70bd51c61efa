"""The engine: prompts in, completions out, in batches or as a stream of text."""

import logging
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from plait.engine import graph
from plait.engine.answer import Answer
from plait.engine.constraint import Constraint, Grammars
from plait.engine.core import Core, Limits
from plait.engine.request import Completion, FinishReason, Load, Request, Sampling
from plait.engine.runner import Row, decode, groups, prefill, room
from plait.engine.sampler import Draw
from plait.engine.sequence import Delta, Handle
from plait.engine.session import Session
from plait.engine.speculate import Lookup, SmallModel
from plait.engine.thinking import thoughts_of
from plait.model.cache import Cache
from plait.model.hybrid import Hybrid
from plait.text.chat import CHATML
from plait.text.reasoning import MarkStream
from plait.text.tokenizer import Tokenizer
from plait.text.tools import marks_of_tools

log = logging.getLogger(__name__)


class Array(Protocol):
    """A tensor or array of one dimension that holds token ids, of whatever library."""

    def tolist(self) -> object:
        """Its values as Python's own numbers."""
        ...


Prompt = str | Sequence[int] | Array


class Engine:
    """Generates with one model. Not for several threads at once."""

    def __init__(
        self,
        model: Hybrid,
        tokenizer: Tokenizer | None = None,
        max_batch: int = 64,
        prefill_chunk: int = 2048,
        limits: Limits | None = None,
        draft: Hybrid | None = None,
    ) -> None:
        """
        Args:
            model: any model of Plait, used as it is.
            tokenizer: for prompts and answers as text; None opens the one beside the model's checkpoint, if any.
            max_batch: sequences that run together.
            prefill_chunk: tokens of prompts per forward pass, over all sequences: bounds the memory of prefill.
            limits: of the running batch, which `submit` and `step` serve; None is Limits(max_running=max_batch).
            draft: a smaller model of the same vocabulary that guesses tokens, if limits.guesses says how many; None
                looks them up in the text.

        Raises: ValueError if the tokenizer knows more ids than the model, for sizes below 1, or for a draft model of
            another vocabulary.
        """
        for field, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{field}={value}: must be at least 1")
        if tokenizer is None and model.origin is not None and (model.origin / "tokenizer.json").is_file():
            tokenizer = Tokenizer.open(model.origin)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only {model.config.vocab_size} "
                "rows; this is not the model's own tokenizer"
            )
        if draft is not None and draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"draft: it has {draft.config.vocab_size} ids, the model {model.config.vocab_size}; "
                "a model that guesses must have the same vocabulary"
            )
        self.model, self.tokenizer, self._draft = model, tokenizer, draft
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self._captured = graph.Steps(model)
        self.limits = Limits(max_running=max_batch) if limits is None else limits
        self._batch: Core | None = None
        self._grammars: Grammars | None = None
        self._making = threading.Lock()

    def submit(self, request: Request) -> Handle:
        """Take a request into the running batch, at the next `step`.

        Raises: ValueError naming what is wrong with it: ids that are none, or a prompt that the cache cannot hold.
        """
        self.encode(request.prompt_ids, "prompt_ids")
        return self.core.submit(request)

    @property
    def core(self) -> Core:
        """The running batch; its memory is taken when it is first asked for."""
        if self._batch is None:
            self._batch = Core(self.model, self._choice, self.limits)
        return self._batch

    @property
    def grammars(self) -> Grammars:
        """What makes grammars of constraints for this model; for any thread.

        Raises: ValueError if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "constraint: there is no tokenizer to follow it with; put tokenizer.json beside the weights"
            )
        with self._making:
            if self._grammars is None:
                ends = {*self.model.config.eos_ids, *self.tokenizer.eos_ids}
                self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size, ends)
            return self._grammars

    def close(self) -> None:
        """End the process that tries grammars, if there is one; all else goes with the engine."""
        if self._grammars is not None:
            self._grammars.close()

    @property
    def capacity(self) -> int | None:
        """Tokens that one request can have, prompt and answer together; None for any number."""
        return self.core.pool.capacity

    def step(self) -> list[Delta]:
        """Read some of the waiting prompts and make a token of every running answer.

        Returns: what came of it, at most one delta for each answer; an answer's last has a finish_reason.
        """
        return self.core.step()

    def cancel(self, handle: Handle) -> None:
        """End a request; the next step gives its last deltas. Nothing if it has ended."""
        self.core.cancel(handle)

    def cancel_all(self) -> None:
        """End all requests."""
        for sequence in self.core.sequences():
            self.core.cancel(sequence.handle)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._batch is not None and self._batch.has_work()

    def load(self) -> Load:
        """How busy it is, and counters."""
        return self.core.load()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> Iterator[Completion]:
        """Complete prompts, many at a time.

        Args:
            prompts: texts, or lists or 1-D integer arrays of token ids; or one of any.
            sampling: settings for all, or one per prompt; None is Sampling().

        Yields: a completion per prompt, in the order of the prompts.
        Raises: ValueError, before anything runs, naming the prompt that is empty or holds what is no id of the model.
        """
        several = _several(prompts)
        settings = [sampling or Sampling()] * len(several) if not isinstance(sampling, Sequence) else list(sampling)
        if len(settings) != len(several):
            raise ValueError(f"sampling has {len(settings)} settings for {len(several)} prompts; give one, or one each")
        encoded = [self.encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(several)]
        rows = [self._row(ids, setting) for ids, setting in zip(encoded, settings, strict=True)]
        self._mind_context(rows)
        return self._run(rows)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, session: Session | None = None) -> "TextStream":
        """Complete one prompt and show the text as it comes.

        Args:
            prompt: a text, or token ids.
            sampling: settings; None is Sampling().
            session: if its tokens are the beginning of the prompt, only the rest is read; it holds, at the end, all of
                the prompt and the answer but the last token.

        Returns: an iterator of texts, one per token and often ""; `.completion` when it has ended.
        Raises: ValueError as `generate`.
        """
        ids = self.encode(prompt, "prompt")
        session = session or Session()
        row = self._row(ids, sampling or Sampling(), n_cached=session.reusable(ids))
        self._mind_context([row])
        return TextStream(row, self._steps(row, session))

    def encode(self, prompt: Prompt, where: str = "prompt") -> list[int]:
        """A prompt's ids, checked.

        Raises: ValueError naming `where` for an empty prompt, what is no id of the model, or a text without tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{where} is a text, but there is no tokenizer; put the model's tokenizer.json beside its weights, "
                    "or give token ids"
                )
            ids = self.tokenizer.encode(prompt, add_special=True)
        else:
            ids = _ids(prompt, where)
        if not ids:
            raise ValueError(f"{where} is empty; a model needs at least one token to continue")
        n_ids = self.model.config.vocab_size
        for at, token_id in enumerate(ids):
            if not 0 <= token_id < n_ids:
                raise ValueError(f"{where}[{at}] is token id {token_id}; the model's ids run from 0 to {n_ids - 1}")
        return ids

    def _choice(self, request: Request, index: int) -> Row:
        """The row of a request's answer."""
        ids = list(request.prompt_ids)
        n_cached = 0 if request.session is None else request.session.reusable(ids)
        return self._row(ids, request.sampling, n_cached, request, index)

    def _row(
        self, ids: list[int], sampling: Sampling, n_cached: int = 0, request: Request | None = None, index: int = 0
    ) -> Row:
        tokenizer, config = self.tokenizer, self.model.config
        if sampling.stop and tokenizer is None:
            raise ValueError(f"stop={sampling.stop!r} needs a tokenizer, and there is none; use stop_ids")
        ends = {*sampling.stop_ids}
        if not sampling.ignore_eos:
            ends |= {*config.eos_ids, *(() if tokenizer is None else tokenizer.eos_ids)}
        thoughts = grammar = None
        if request is not None:
            constraint = request.constraint
            if constraint is not None and not isinstance(constraint, Constraint):
                raise ValueError(f"constraint={constraint!r}: expected a plait.engine.constraint.Constraint")
            grammar = None if constraint is None else self.grammars.compile(constraint)
            thoughts = thoughts_of(
                tokenizer,
                ids,
                thinks=request.thinks,
                budget=request.thinking_token_budget,
                max_tokens=sampling.max_tokens,
                strict=grammar is not None,
            )
        draw = Draw(
            sampling,
            ids,
            config.vocab_size,
            self.model.device,
            index=index,
            end_ids=ends,
            thoughts=thoughts,
            grammar=grammar,
        )
        marks = None if thoughts is None else thoughts.marks
        shown = () if marks is None else (marks.open, marks.close)
        decoder = None
        if tokenizer is not None:
            # what no request asked for is shown as it always was
            calls = marks_of_tools(tokenizer.chat_template or CHATML) if request is not None else ()
            decoder = MarkStream(tokenizer, (*shown, *calls))
        answer = Answer(decoder, sampling.stop, marks=marks, is_open=thoughts is not None and thoughts.is_inside)
        drafter = None
        if request is not None and self.limits.guesses:
            drafter = Lookup() if self._draft is None else SmallModel(self._draft, draw)
        return Row(ids, sampling, draw=draw, answer=answer, end_ids=frozenset(ends), n_cached=n_cached, drafter=drafter)

    def _mind_context(self, rows: Sequence[Row]) -> None:
        trained = self.model.config.max_context
        longest = max(len(row.prompt) + row.sampling.max_tokens for row in rows)
        if longest > trained:
            log.warning(
                "up to %d tokens of context; the model was trained for %d, beyond may be worse", longest, trained
            )

    def _decode(self, rows: Sequence[Row], cache: Cache, logits: Tensor) -> Generator[list[int], None, None]:
        if self._captured.serves(rows):
            return graph.decode(self.model, rows, cache, logits, self._captured)
        return decode(self.model, rows, cache, logits)

    def _answers(self, group: Sequence[Row]) -> Generator[list[int], None, None]:
        if self._captured.serves(group):
            return graph.generate(self.model, group, self.prefill_chunk, self._captured)
        cache = self.model.cache(len(group), capacity=room(group, self.model.config.max_context))
        logits = prefill(self.model, [row.prompt for row in group], cache, self.prefill_chunk)
        return decode(self.model, group, cache, logits)

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row]) -> Iterator[Completion]:
        waiting = {}
        due = 0
        for members in groups([len(row.prompt) for row in rows], self.max_batch, self.prefill_chunk):
            group = [rows[i] for i in members]
            for row in group:
                row.begin()
            for _ in self._answers(group):
                pass
            waiting |= dict(zip(members, group, strict=True))
            while due in waiting:
                yield waiting.pop(due).completion()
                due += 1

    @torch.inference_mode()
    def _steps(self, row: Row, session: Session) -> Generator[str, None, None]:
        cache = session.cache if row.n_cached else None
        # a failure on the way leaves an empty session, never one that disagrees with its cache
        session.forget()
        cache = self.model.cache(1) if cache is None else cache
        cache.reserve(room([row], self.model.config.max_context))
        row.begin()
        logits = prefill(self.model, [row.prompt[row.n_cached :]], cache, self.prefill_chunk)
        fed = list(row.prompt)
        shown = 0
        steps = self._decode([row], cache, logits)
        # captured steps bring the cache up to date only at their end
        current = not self._captured.serves([row])
        try:
            for ids in steps:
                if current:
                    session.ids, session.cache = fed, cache
                yield from row.pieces[shown:]
                shown = len(row.pieces)
                session.forget()
                fed.extend(ids)
        except GeneratorExit:
            steps.close()
            session.ids, session.cache = fed, cache
            raise
        finally:
            row.cache_bytes = cache.n_bytes()
        # the last token was drawn but not fed
        session.ids, session.cache = fed[:-1], cache


class TextStream:
    """The text of one answer as it comes: iterate over it; close it to stop early."""

    def __init__(self, row: Row, steps: Generator[str, None, None]) -> None:
        self._row, self._steps = row, steps

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._steps)

    def close(self) -> None:
        """Stop here. What was held back of the text comes into the completion."""
        self._steps.close()
        self._row.finish(FinishReason.CANCELLED)

    @property
    def completion(self) -> Completion:
        """The answer.

        Raises: RuntimeError while it is still being made.
        """
        if self._row.reason is None:
            raise RuntimeError("the stream has not ended; read it to its end, or close it")
        return self._row.completion()


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):
        return [prompts]  # type: ignore[list-item]
    several = list(prompts)  # type: ignore[arg-type]
    if not several:
        raise ValueError("prompts is empty; give at least one prompt")
    if all(isinstance(_plain(part), int | float) for part in several):
        return [several]  # type: ignore[list-item]
    for i, prompt in enumerate(several):
        if not isinstance(prompt, str) and not isinstance(_plain(prompt), Sequence):
            raise ValueError(f"prompts[{i}] is {prompt!r}; expected a text or a list of token ids")
    return several  # type: ignore[return-value]


def _ids(prompt: Sequence[int] | Array, where: str) -> list[int]:
    """Token ids as Python's integers; raises ValueError naming the first that is none."""
    values = _plain(prompt)
    if not isinstance(values, Iterable):
        raise ValueError(f"{where} is {values!r}; expected a text or a list of token ids")
    ids: list[int] = []
    for at, value in enumerate(map(_plain, values)):
        # True and False are integers to Python, but nobody means an id by them
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{where}[{at}] is {value!r}; a prompt is a text or a flat list of whole token ids")
        ids.append(value)
    return ids


def _plain(value: object) -> object:
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else tolist()
