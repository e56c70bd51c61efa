import json

import pytest

from plait.cli.launch import launch
from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.text.tokenizer import Tokenizer


@pytest.fixture
def texts(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(60):
        (root / f"{i}.txt").write_text(f"number {i}: " + "the quick brown fox é👩 " * (i % 7 + 1))
    (root / "picture.png").write_bytes(b"\x89PNG\x00")
    return root


def ran(capsys, *words):
    status = launch(["tokenize", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_a_tree_becomes_shards_that_the_loader_reads(tmp_path, texts, capsys):
    status, out, _ = ran(capsys, texts, "--out", tmp_path / "out", "--train-vocab", 400, "--valid", 0.2, "--json")
    assert status == 0
    facts = {fact["name"]: fact["value"] for fact in json.loads(out.splitlines()[-1])["facts"]}
    assert facts["documents"] == 60
    assert facts["left out: binary"] == 1
    train, valid = (Dataset.open(tmp_path / "out" / name) for name in ("train", "valid"))
    assert train.n_documents + valid.n_documents == 60
    assert facts["tokens"] == train.n_tokens + valid.n_tokens
    assert facts["held out tokens"] == valid.n_tokens
    tokenizer = Tokenizer.open(tmp_path / "out/tokenizer")
    batch = Loader({"train": train}, batch_size=2, seq_len=32, seed=0).batch(0)
    assert "quick brown fox" in tokenizer.decode(batch.ids[0].tolist())
    size = sum(path.stat().st_size for path in texts.glob("*.txt"))
    assert facts["bytes per token"] == pytest.approx(size / (facts["tokens"] - 60))


def test_a_given_tokenizer_is_used(tmp_path, texts, shared, capsys):
    given = shared / "data/tokenizers/bpe-16384"
    assert ran(capsys, texts / "3.txt", "--out", tmp_path / "out", "--tokenizer", given)[0] == 0
    hashes = {Tokenizer.open(path).vocabulary_hash for path in (given, tmp_path / "out/tokenizer")}
    assert hashes == {Dataset.open(tmp_path / "out/train").record["vocabulary_hash"]}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["TEXTS"], "--out"),
        (["--out", "OUT", "--train-vocab", "400"], "SOURCES|sources"),
        (["TEXTS", "--out", "OUT"], "--tokenizer PATH and --train-vocab"),
        (["TEXTS", "--out", "OUT", "--train-vocab", "400", "--tokenizer", "x"], "--tokenizer PATH and --train-vocab"),
        (["TEXTS", "--out", "OUT", "--train-vocab", "10"], "vocab_size = 10 is too small"),
        (["TEXTS", "--out", "OUT", "--train-vocab", "400", "--valid", "1.5"], "valid=1.5"),
        (["TEXTS", "--out", "OUT", "--train-vocab", "400", "--jobs", "0"], "jobs=0"),
        (["TEXTS", "--out", "TEXTS", "--train-vocab", "400"], "texts exists"),
        (["TEXTS", "--out", "TEXTS", "--train-vocab", "400", "--force"], "holds other things"),
        (["TEXTS/0.txt", "--out", "TEXTS/1.txt/out", "--train-vocab", "400"], "cannot write in"),
        (["TEXTS/no.txt", "--out", "OUT", "--train-vocab", "400"], "no.txt does not exist"),
        (["TEXTS/picture.png", "--out", "OUT", "--train-vocab", "400"], "picture.png is binary"),
        (["EMPTY", "--out", "OUT", "--train-vocab", "400"], "no files under"),
        (["TEXTS", "--out", "OUT", "--tokenizer", "EMPTY"], "give a tokenizer.json"),
    ],
)
def test_bad_input_is_one_line_with_status_two_and_leaves_nothing(tmp_path, texts, capsys, words, named):
    (tmp_path / "empty").mkdir()
    places = {"TEXTS": texts, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    status, out, err = ran(capsys, *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert any(part in err for part in named.split("|"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "texts"]


def test_help_shows_every_field_and_the_example(capsys):
    status, out, _ = ran(capsys, "--help")
    assert status == 0
    for word in (
        "--out",
        "--tokenizer",
        "--train-vocab",
        "--field",
        "--jobs",
        "--valid",
        "--force",
        "plait tokenize my",
    ):
        assert word in out
