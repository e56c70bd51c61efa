"""Conversations from JSON lines to batches: whole ones side by side in rows, of which only answers count.

A line is {"messages": [{"role", "content"}, ...], "tools": [...]}; other fields are left alone. Conversations are put
into rows of equal length, each into the first that has room; rows stay as they are, their order is new in each epoch,
so batch number `step` is a pure function of (seed, step). What is left of a row is filled with padding, a document of
its own in which nothing counts.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plait.data.document import Skipped, SourceError
from plait.data.loader import Batch
from plait.data.packing import IGNORED
from plait.data.shuffle import key_of, permutation
from plait.data.sources.compressed import open_bytes
from plait.text.tokenizer import Tokenizer
from plait.text.turns import Turns, encode_turns

# rows with room that are looked through for the next conversation
OPEN_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What was read: conversations to train on and held out ones, and why others were left out."""

    train: tuple[Turns, ...]
    held_out: tuple[Turns, ...]
    skipped: Skipped


def read_conversations(paths: Sequence[Path], tokenizer: Tokenizer, *, seq_len: int, held_out: float = 0.0) -> Read:
    """Read and encode files of conversations.

    Args:
        paths: JSONL files (.zst and .gz are unpacked).
        tokenizer: whose chat template writes them.
        seq_len: longer ones are left out, and counted.
        held_out: this share of them, chosen by their text, is for validation.

    Raises: SourceError naming file and line for what is no conversation; ValueError if none are left to train on.
    """
    found: tuple[list[Turns], list[Turns]] = ([], [])
    skipped: Skipped = Counter()
    for path in paths:
        for where, line in _lines(path):
            turns = _encoded(line, where, tokenizer)
            if len(turns.ids) > seq_len:
                skipped[f"longer than {seq_len} tokens"] += 1
            else:
                found[key_of("valid", line) < held_out * 2.0**64].append(turns)
    if not found[0]:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        raise ValueError(
            f"{', '.join(map(str, paths))}: no conversation to train on ({reasons or 'the files are empty'}"
            f"{', all held out' if found[1] else ''}); give longer rows (seq_len) or other files"
        )
    return Read(train=tuple(found[0]), held_out=tuple(found[1]), skipped=skipped)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line.decode("utf-8", errors="replace")


def _encoded(line: str, where: str, tokenizer: Tokenizer) -> Turns:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError("bad JSON", f"{where} is no JSON ({error}); JSONL holds one object per line") from error
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise SourceError("no messages", f'{where} has no list "messages", but {has}; write a conversation per line')
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise SourceError("bad tools", f'{where}: "tools" is a {type(tools).__name__}; give a list of schemas')
    for i, message in enumerate(row["messages"]):
        if not isinstance(message, dict):
            raise SourceError("bad message", f"{where}: messages[{i}] is a {type(message).__name__}, not an object")
    try:
        return encode_turns(tokenizer, row["messages"], tools=tools or None)
    except ValueError as error:
        raise SourceError("bad conversation", f"{where}: {error}") from error


class Conversations:
    """Batches of packed conversations; the interface of a Loader."""

    def __init__(
        self,
        turns: Sequence[Turns],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        pad_id: int = 0,
        repeat: bool = True,
    ) -> None:
        """
        Args:
            turns: at least one, none longer than `seq_len`.
            batch_size, seq_len: rows and tokens of a batch.
            seed: gives which conversations share a row, and the order of rows.
            pad_id: any id; nothing is learnt of it.
            repeat: False leaves rows beyond the first epoch uncounted: for validation.

        Raises: ValueError for no conversations, or one that fits no row.
        """
        if not turns or max(len(one.ids) for one in turns) > seq_len:
            longest = max((len(one.ids) for one in turns), default=0)
            raise ValueError(
                f"{len(turns)} conversations, the longest of {longest} tokens, in rows of {seq_len}: give at least "
                "one, and rows as long as the longest"
            )
        self.batch_size, self.seq_len, self.pad_id, self.seed = batch_size, seq_len, pad_id, seed
        self._turns, self._repeat = turns, repeat
        lengths = [len(one.ids) for one in turns]
        self.rows = packed(lengths, permutation(len(turns), key_of("conversations", seed)).tolist(), seq_len)
        self._order: tuple[int, np.ndarray] = 0, permutation(len(self.rows), key_of("rows", seed, 0))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch, padding included."""
        return self.batch_size * self.seq_len

    @property
    def identity(self) -> str:
        """SHA-256 of all ids and of what counts."""
        digest = hashlib.sha256()
        for one in self._turns:
            digest.update(np.asarray(one.ids, "<i8").tobytes() + bytes(one.said))
        return digest.hexdigest()

    def n_steps_per_epoch(self) -> int:
        """Batches after which every conversation was met once."""
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Batch number `step`, from 0."""
        shape = self.batch_size, self.seq_len
        ids, starts = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.bool_)
        targets = np.full(shape, IGNORED, np.int64)
        for row in range(self.batch_size):
            epoch, place = divmod(step * self.batch_size + row, len(self.rows))
            at = 0
            for index in self.rows[int(self._epoch(epoch)[place])]:
                one = self._turns[index]
                end = at + len(one.ids)
                ids[row, at:end], starts[row, at] = one.ids, True
                if self._repeat or epoch == 0:
                    # the first token of a conversation is predicted by nothing
                    targets[row, at : end - 1] = np.where(one.said[1:], one.ids[1:], IGNORED)
                at = end
            if at < self.seq_len:
                starts[row, at] = True
        return Batch(ids=torch.from_numpy(ids), targets=torch.from_numpy(targets), starts=torch.from_numpy(starts))

    def _epoch(self, number: int) -> np.ndarray:
        known, order = self._order
        if known != number:
            order = permutation(len(self.rows), key_of("rows", self.seed, number))
            self._order = number, order
        return order


def packed(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Which numbers lie in which row: each, in the given order, in the first of a few open rows that has room.

    Args:
        lengths: of each, at most `size`.
        order: of all numbers below len(lengths).
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}
    for index in order:
        row = next((row for row, left in room.items() if left >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = size
            if len(room) > OPEN_ROWS:
                del room[min(room, key=room.__getitem__)]
        rows[row].append(index)
        if row in room:
            room[row] -= lengths[index]
    return rows
