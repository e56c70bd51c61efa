"""What an answer must obey: a JSON schema, a regular expression or a grammar, as a mask over the next token.

The llguidance library follows the grammar byte by byte and tells which tokens may come next; no other can be drawn. A
vocabulary is given to it as the bytes of each token, so any tokenizer serves whose tokens are bytes: byte-level ones,
and those with a mark for spaces and tokens such as `<0x0A>`.

Grammars come from strangers. Each new one is tried first in a process of its own (trial.py), whose time and memory are
bounded, and what it may cost per token is bounded too.
"""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from plait.engine.trial import LIMITS, Trial
from plait.text.tokenizer import Tokenizer, continuation

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json", "regex", "lark"]

LONGEST = 1 << 16
"""Characters of a constraint."""
DEEPEST = 48
"""Levels of a JSON schema."""

_KEPT = 256


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole answer must match.

    kind: "json" (text is a JSON schema), "regex" (as of Rust: no look-around, no back-references), or "lark" (a
    context-free grammar as of llguidance).
    """

    kind: Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"constraint: kind={self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"constraint: {self.kind} = {self.text!r}: expected a text of at least one character")
        if len(self.text) > LONGEST:
            raise ValueError(
                f"constraint: the {self.kind} is {len(self.text)} characters long, allowed are {LONGEST}; write less"
            )


def of_schema(schema: object) -> Constraint:
    """A constraint to a JSON schema.

    Raises: ValueError for what is no schema, or is too deep or too long.
    """
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"constraint: a JSON schema is an object, this is a {type(schema).__name__}")
    if _depth(schema, DEEPEST + 1) > DEEPEST:
        raise ValueError(f"constraint: the JSON schema has more than {DEEPEST} levels; make it flatter")
    try:
        return Constraint("json", json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"constraint: the JSON schema cannot be written: {error}") from None


def of_choices(choices: Sequence[str]) -> Constraint:
    """A constraint to one of some texts."""
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"constraint: choices={choices!r}: expected texts of at least one character")
    return Constraint("lark", "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


class Grammar:
    """One answer on its way through a constraint."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        """Args: matcher: fresh. vocab_size: rows of logits."""
        self._matcher, self._vocab_size = matcher, vocab_size
        self.failure: str | None = None
        """Why it cannot go on, None while it can."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing could be added."""
        return self.failure is None and self._matcher.is_stopped()

    def allowed(self) -> Tensor | None:
        """(V,) bool, which tokens may come next; None when it has failed."""
        # one byte per token
        codes = bytearray(self._matcher.compute_logit_bias())
        self._look()
        if self.failure is not None:
            return None
        return torch.frombuffer(codes, dtype=torch.uint8)[: self._vocab_size].bool()

    def note(self, token_id: int) -> None:
        """Take the next token."""
        if self.failure is None:
            self._matcher.consume_token(token_id)
            self._look()

    def fork(self) -> "Grammar":
        """A copy that goes its own way from here."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    def _look(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            self.failure = f"the answer's constraint could not be followed: {reason}; make it simpler"


class Grammars:
    """Makes grammars for one model. For several threads at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        """
        Args:
            tokenizer: of the model.
            vocab_size: rows of its logits.
            end_ids: which may end an answer once it is whole.
        """
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        # a model without any end gets an id that it cannot draw
        self._end_ids = sorted({i for i in end_ids if i < vocab_size}) or [vocab_size]
        self._lock = threading.Lock()
        self._trial: Trial | None = None
        self._vocabulary: LLTokenizer | None = None
        self._known: OrderedDict[Constraint, Grammar | str] = OrderedDict()

    def compile(self, constraint: Constraint) -> Grammar:
        """A fresh grammar. The first time may take a second; call it where nobody waits for it.

        Raises: ValueError saying what is wrong with the constraint, or that it would take too long;
            ModuleNotFoundError naming what to install.
        """
        known = self._known.get(constraint)
        if known is None:
            with self._lock:
                known = self._known.get(constraint)
                if known is None:
                    known = self._known[constraint] = self._made(constraint)
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        else:
            with contextlib.suppress(KeyError):
                # strangers' new ones must not push out what is in use; it may have gone in between
                self._known.move_to_end(constraint)
        if isinstance(known, str):
            raise ValueError(known)
        return known.fork()

    def close(self) -> None:
        """End the process that tries grammars."""
        if self._trial is not None:
            self._trial.close()

    def _made(self, constraint: Constraint) -> Grammar | str:
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "constraints (JSON schemas, regular expressions, grammars) need llguidance; pip install 'plait[serve]'"
            ) from error
        if self._vocabulary is None or self._trial is None:
            words = Words(self._tokenizer, self._vocab_size, self._end_ids)
            self._vocabulary = LLTokenizer(words, eos_token=self._end_ids)  # type: ignore[arg-type]
            self._trial = Trial(words.tokens, words.special_token_ids, self._end_ids)
        text = grammar_text(constraint)
        refused = self._trial.run(text)
        if refused:
            return f"constraint: the {constraint.kind} cannot be used: {refused}"
        matcher = LLMatcher(self._vocabulary, text, limits=LLParserLimits(**LIMITS), log_level=0)
        grammar = Grammar(matcher, self._vocab_size)
        grammar._look()
        return grammar if grammar.failure is None else grammar.failure


def grammar_text(constraint: Constraint) -> str:
    """The constraint as the library reads it.

    Raises: ValueError for a JSON schema that is not JSON.
    """
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    try:
        # white space between values must end: a model that likes it too much would never come to the next one
        return LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_pattern": r"[ \n]{0,20}"})
    except ValueError as error:
        raise ValueError(f"constraint: the json is no JSON schema: {error}") from None


class Words:
    """A vocabulary as llguidance wants it: the bytes of each token."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_ids[0], tokenizer.bos_id
        n = max(vocab_size, end_ids[-1] + 1)
        tokens = [tokenizer.bytes_of(i) or b"" for i in range(n)]
        # no text holds this byte, which the library takes for a mark of its own
        self.tokens = [b"" if token.startswith(b"\xff") else token for token in tokens]
        # what is hidden from the reader cannot be part of an answer that obeys
        self.special_token_ids = [i for i in range(n) if tokenizer.is_special(i)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return continuation(self._tokenizer, text, parse_special=False)


def _depth(value: object, limit: int) -> int:
    """Levels of nested lists and mappings, counted up to a limit."""
    level, depth = [value], 0
    while level and depth < limit:
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner += item.values()
            elif isinstance(item, list | tuple):
                inner += item
        level, depth = inner, depth + 1
    return depth
