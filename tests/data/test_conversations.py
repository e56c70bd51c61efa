"""Conversations in rows: what counts, that none is lost, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from plait.data.conversations import Conversations, packed, read_conversations
from plait.data.document import SourceError
from plait.data.packing import IGNORED
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer
from plait.text.turns import Turns


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a question and an answer, or two"] * 3, 320)


def drawn(n: int = 40, most: int = 12, seed: int = 0) -> list[Turns]:
    """Conversations whose ids are all different, answers at random places."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(2, most + 1, (1,), generator=generator))
        said = (torch.rand(length, generator=generator) < 0.4).tolist()
        ids = tuple(range(100 * i + 1, 100 * i + 1 + length))
        found.append(Turns(ids=ids, said=(False, True, *said[2:])))
    return found


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def talk(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": text}]}


def test_targets_are_the_next_ids_where_the_assistant_speaks_and_only_there() -> None:
    turns = {one.ids[0]: one for one in drawn()}
    data = Conversations(list(turns.values()), batch_size=4, seq_len=16, seed=3, pad_id=7)
    seen = []
    for step in range(data.n_steps_per_epoch()):
        batch = data.batch(step)
        assert bool(batch.starts[:, 0].all())
        for row in range(4):
            at = 0
            while at < 16:
                one = turns.get(int(batch.ids[row, at]))
                assert bool(batch.starts[row, at])
                if one is None:
                    assert bool((batch.ids[row, at:] == 7).all() and (batch.targets[row, at:] == IGNORED).all())
                    assert not batch.starts[row, at + 1 :].any()
                    break
                n = len(one.ids)
                assert tuple(batch.ids[row, at : at + n].tolist()) == one.ids
                expected = [one.ids[t + 1] if t + 1 < n and one.said[t + 1] else IGNORED for t in range(n)]
                assert batch.targets[row, at : at + n].tolist() == expected
                assert not batch.starts[row, at + 1 : at + n].any()
                seen.append(one.ids[0])
                at += n
    # the last batch of an epoch goes on with the next
    assert set(seen) == set(turns) and len(seen) < 1.5 * len(turns)


def test_every_number_lies_in_one_row_that_it_fits() -> None:
    lengths = [int(x) for x in torch.randint(1, 33, (500,))]
    rows = packed(lengths, torch.randperm(500).tolist(), 32)
    assert sorted(index for row in rows for index in row) == list(range(500))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 32 and sum(filled) / (32 * len(rows)) > 0.85


def test_a_batch_follows_from_seed_and_step_alone_and_epochs_differ() -> None:
    turns = drawn()
    one, two, other = (Conversations(turns, batch_size=2, seq_len=16, seed=s) for s in (0, 0, 1))
    later = one.batch(11)
    assert torch.equal(later.ids, two.batch(11).ids) and torch.equal(one.batch(0).ids, two.batch(0).ids)
    assert not torch.equal(later.ids, other.batch(11).ids)
    n = len(one.rows)
    order = [
        [tuple(one.batch(s).ids[r].tolist()) for s in range(n) for r in range(2)][i * n : i * n + n] for i in (0, 1)
    ]
    assert sorted(order[0]) == sorted(order[1]) and order[0] != order[1]


def test_without_repetition_every_token_counts_once() -> None:
    turns = drawn()
    data = Conversations(turns, batch_size=8, seq_len=16, seed=0, repeat=False)
    counted = sum(int((data.batch(s).targets != IGNORED).sum()) for s in range(data.n_steps_per_epoch()))
    assert counted == sum(sum(one.said[1:]) for one in turns)


def test_files_are_read_split_and_long_ones_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [talk(f"answer {i}") for i in range(60)]
    path = write(tmp_path / "a.jsonl", *rows[:30], "", talk("long " * 80))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows[30:]).encode()))
    found = read_conversations([path, tmp_path / "b.jsonl.gz"], tokenizer, seq_len=80, held_out=0.3)
    assert len(found.train) + len(found.held_out) == 60 and 8 <= len(found.held_out) <= 28
    assert dict(found.skipped) == {"longer than 80 tokens": 1}
    assert not set(found.train) & set(found.held_out)
    again = read_conversations([path], tokenizer, seq_len=80)
    assert len(again.train) == 30 and again.held_out == ()
    data = [Conversations(turns, batch_size=1, seq_len=80, seed=0).identity for turns in (found.train, again.train)]
    assert data[0] != data[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", r"line 2 is no JSON"),
        ({"text": "x"}, r'line 2 has no list "messages", but text'),
        ({"messages": []}, r'line 2 has no list "messages"'),
        ({"messages": ["x"]}, r"line 2: messages\[0\] is a str, not an object"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 2: no message has the role assistant"),
        ({"messages": [{"role": "assistant"}]}, r"line 2: messages\[0\] \(assistant\) has no content"),
        (talk("x") | {"tools": "x"}, r'line 2: "tools" is a str'),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_by_its_number(
    tmp_path: Path, tokenizer: Tokenizer, row: object, words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        read_conversations([write(tmp_path / "a.jsonl", talk("x"), row)], tokenizer, seq_len=64)


def test_nothing_to_train_on_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no conversation to train on .1 longer than 4 tokens."):
        read_conversations([write(tmp_path / "a.jsonl", talk("x"))], tokenizer, seq_len=4)
    with pytest.raises(ValueError, match="the files are empty"):
        read_conversations([write(tmp_path / "b.jsonl")], tokenizer, seq_len=4)
    with pytest.raises(ValueError, match="rows as long as the longest"):
        Conversations(drawn(), batch_size=1, seq_len=3, seed=0)
