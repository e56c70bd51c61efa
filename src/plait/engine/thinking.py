"""Reasoning with a budget: count its tokens, and close it in time for the answer.

    n tokens of reasoning so far, budget b:
        n < b               free
        b <= n < b + 500    closed at the next newline
        n = b + 500         closed here

To close means that the next tokens are not drawn but given: `</think>` and an empty line, after a newline where there
is none. The answer follows as always. An id that would end the answer closes the reasoning instead, so that an answer
always comes; with a budget it may not be blank, and reasoning leaves room for it below max_tokens.

Source   NVIDIA 2025, arXiv:2508.14444 (Nemotron Nano 2), budget control at inference.
"""

from bisect import bisect_left
from collections.abc import Sequence, Set
from enum import Enum

from plait.text.chat import CHATML
from plait.text.reasoning import Marks, MarkStream, marks_of, overlap
from plait.text.tokenizer import Tokenizer, continuation

GRACE = 500
"""Tokens past the budget in which a newline is waited for."""

# tokens that are left for the answer, if max_tokens are few half of them
_ANSWER = 256
_GAP = "\n\n"
# white space and a mark fit into these
_LOOK = 64


class _State(Enum):
    BEGIN = "nothing but white space so far, or a piece of the opening mark"
    OPEN = "reasoning"
    CLOSING = "tokens that are given"
    OVER = "the answer"


class Thoughts:
    """Follows one answer through its reasoning. `settled` before a token counts, `note` when it does."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Marks,
        *,
        is_open: bool,
        budget: int | None = None,
        max_tokens: int = 1 << 30,
        strict: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: of the model.
            marks: what opens and closes reasoning.
            is_open: the prompt ends inside of reasoning; else it may come first in the answer.
            budget: tokens of reasoning, None for any number.
            max_tokens: of reasoning and answer together.
            strict: a grammar judges the answer: it begins at a token of its own, after the empty line.
        """
        self.marks = marks
        self._tokenizer, self._budget, self._strict = tokenizer, budget, strict
        self._decoder = MarkStream(tokenizer, (marks.open, marks.close))
        self.is_inside = is_open
        """Whether it begins inside of reasoning."""
        self._state = _State.OPEN if is_open else _State.BEGIN
        self._opening = continuation(tokenizer, marks.open)
        self._given: list[int] = []
        self._starts: list[int] = []  # where each token of reasoning begins, in characters
        self._length = 0
        self._tail = ""
        self._made = 0
        self._last_call = max_tokens - min(_ANSWER, max_tokens // 2)
        self._has_answer = False
        self.n_tokens = 0
        """Tokens of reasoning, without the marks."""
        if is_open:
            self._mind_budget("\n")

    @property
    def is_open(self) -> bool:
        """Whether what comes next is reasoning, or its mark: no end of the answer counts here."""
        return self._state in (_State.OPEN, _State.CLOSING)

    @property
    def is_over(self) -> bool:
        """Whether what comes next belongs to the answer, or may: a grammar must allow it."""
        return self._state is _State.OVER or (self._state is _State.BEGIN and not self._given)

    @property
    def may_open(self) -> tuple[int, ...]:
        """Ids that begin the opening mark, where it may come: a grammar must let them pass."""
        return tuple(self._opening[:1]) if self._state is _State.BEGIN else ()

    @property
    def owes_answer(self) -> bool:
        """Whether the answer must not end here, because it is blank."""
        return self._state is _State.OVER and self._budget is not None and not self._has_answer

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that come next whatever the model says."""
        return tuple(self._given)

    def settled(self, token_id: int, end_ids: Set[int]) -> int:
        """The token that comes where `token_id` was drawn."""
        if self._state is _State.OPEN and token_id in end_ids:
            self._close()
        elif self._state is _State.OPEN and self._strict:
            self._cut(token_id)
        return self._given[0] if self._given else token_id

    def note(self, token_id: int) -> bool:
        """Take the next token; returns whether it belongs to the answer."""
        piece = self._decoder.add(token_id)
        self._made += 1
        if self._given:
            self._given.pop(0)
            if self._state is _State.CLOSING:
                self._state = _State.CLOSING if self._given else _State.OVER
                return False
        state = self._state
        if state is _State.BEGIN:
            return self._begin(token_id, piece)
        if state is _State.OPEN:
            self._reason(token_id, piece)
        else:
            self._has_answer = self._has_answer or bool(piece.strip())
        return state is _State.OVER

    def _begin(self, token_id: int, piece: str) -> bool:
        self._tail += piece
        begun, mark = self._tail.lstrip(), self.marks.open
        if begun.startswith(mark):
            self._state, self._tail = _State.OPEN, begun[len(mark) :]
            self._length = len(self._tail)
            self._mind_budget("\n")
        elif self._strict and not self._given:
            # one way only: the rest of the mark, or the answer
            if token_id != self._opening[0]:
                self._over()
                return True
            self._given = self._opening[1:]
        elif not mark.startswith(begun):
            self._over()
            return True
        return False

    def _over(self) -> None:
        self._state, self._has_answer = _State.OVER, True

    def _reason(self, token_id: int, piece: str) -> None:
        mark, own = self.marks.close, self._tokenizer.decode([token_id], skip_special=False)
        # a piece may begin with a character that earlier tokens began and never ended
        self._starts.append(self._length + (len(piece) - len(own) if piece.endswith(own) else 0))
        text, self._length = self._tail + piece, self._length + len(piece)
        at = text.find(mark)
        if at < 0:
            self._tail = text[-len(mark) :]
            self.n_tokens = len(self._starts)
            self._mind_budget(piece)
            return
        self.n_tokens = bisect_left(self._starts, self._length - len(text) + at)
        rest = text[at + len(mark) :]
        if self._strict and "\n" not in rest:
            self._give(_GAP)
        else:
            self._state, self._has_answer = _State.OVER, bool(rest.strip())

    def _mind_budget(self, piece: str) -> None:
        if self._budget is None:
            return
        beyond = self.n_tokens - self._budget
        if beyond >= (0 if "\n" in piece else GRACE) or self._made >= self._last_call:
            self._close(after_newline=piece.endswith("\n"))

    def _close(self, after_newline: bool = False) -> None:
        self._give(("" if after_newline else "\n") + self.marks.close + _GAP)

    def _cut(self, token_id: int) -> None:
        """Where a token would end the mark and begin the answer too, end the mark alone."""
        text = self._tail + self._tokenizer.decode([token_id], skip_special=False)
        _, mark, rest = text.partition(self.marks.close)
        if mark and rest.strip():
            begun = overlap(self._tail, mark)
            self.n_tokens = bisect_left(self._starts, self._length - begun)
            self._give(mark[begun:] + _GAP)

    def _give(self, text: str) -> None:
        self._state, self._given = _State.CLOSING, continuation(self._tokenizer, text)


def thoughts_of(
    tokenizer: Tokenizer | None,
    prompt_ids: Sequence[int],
    *,
    thinks: bool | None = None,
    budget: int | None = None,
    max_tokens: int = 1 << 30,
    strict: bool = False,
) -> Thoughts | None:
    """What follows the reasoning of an answer to this prompt, None where there is none to follow.

    Args:
        tokenizer: of the model; None means no reasoning.
        prompt_ids: the prompt.
        thinks: False: none is looked for; True: the prompt ends inside of it; None: look at the prompt, and at the
            beginning of the answer if the chat template knows marks.
        budget, max_tokens, strict: see Thoughts.
    """
    if tokenizer is None or thinks is False:
        return None
    marks = marks_of(tokenizer.chat_template or CHATML)
    if marks is None:
        return None if not thinks else _followed(tokenizer, Marks(), True, budget, max_tokens, strict)
    end = tokenizer.decode(prompt_ids[-_LOOK:], skip_special=False).rstrip()
    if thinks is None and end.endswith(marks.close):
        return None
    return _followed(tokenizer, marks, bool(thinks) or end.endswith(marks.open), budget, max_tokens, strict)


def _followed(
    tokenizer: Tokenizer, marks: Marks, is_open: bool, budget: int | None, max_tokens: int, strict: bool
) -> Thoughts:
    return Thoughts(tokenizer, marks, is_open=is_open, budget=budget, max_tokens=max_tokens, strict=strict)
