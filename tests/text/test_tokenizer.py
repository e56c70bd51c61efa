import json
import os
import subprocess
import sys

import pytest

from plait.text.tokenizer import Tokenizer

TEXTS = ["", "plain words", "  12345 x\n\ty", "混合模型 👩‍👩‍👧‍👦 é", "\x00\r\n", "<think>a</think><|im_end|>"]


@pytest.fixture
def folder(shared):
    return shared / "data/tokenizers/bpe-4096"


@pytest.fixture
def data(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def write(path, value):
    path.mkdir(parents=True, exist_ok=True)
    file = path / "tokenizer.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("name", ["bpe-4096", "bpe-16384", "bpe-32768"])
def test_shared_tokenizers_open_with_their_special_ids(shared, name):
    tokenizer = Tokenizer.open(shared / "data/tokenizers" / name)
    assert tokenizer.vocab_size == int(name.split("-")[1])
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    assert tokenizer.id_of("<|im_start|>") == 4
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.chat_template


@pytest.mark.parametrize("name", ["bpe-4096", "published/phi-2", "published/phi-3"])
def test_ids_equal_those_of_transformers(shared, name):
    from transformers import PreTrainedTokenizerFast

    path = shared / "data/tokenizers" / name
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), clean_up_tokenization_spaces=False)
    ours = Tokenizer.open(path)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=True) == theirs.encode(text, add_special_tokens=True)
    ids = ours.encode(TEXTS[-1])
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


def test_batches_equal_single_texts(folder):
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_names_of_special_tokens_can_be_taken_as_letters(folder):
    tokenizer = Tokenizer.open(folder)
    text = "a<|eos|>b"
    assert 2 in tokenizer.encode(text)
    assert 2 not in tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text
    assert tokenizer.encode_batch([text], parse_special=False) == [tokenizer.encode(text, parse_special=False)]


def test_a_file_that_asks_for_cutting_and_padding_is_not_obeyed(tmp_path, data):
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    tokenizer = Tokenizer.open(write(tmp_path, data))
    text = "one two three four five six"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_a_lone_tokenizer_json_is_enough(tmp_path, data):
    tokenizer = Tokenizer.open(write(tmp_path, data) / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.chat_template) == (None, (), None, None)


def test_saved_tokenizers_read_back_the_same_also_by_transformers(tmp_path, folder):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.open(folder)
    tokenizer.eos_ids = (2, 5)
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.open(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert again.vocabulary_hash == tokenizer.vocabulary_hash
    for field in ("vocab_size", "bos_id", "eos_ids", "pad_id", "chat_template"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_vocabularies_that_differ_in_one_id_have_different_hashes(tmp_path, folder, data):
    vocabulary = data["model"]["vocab"]
    a, b = [token for token, id in vocabulary.items() if id in (4000, 4001)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    assert Tokenizer.open(write(tmp_path, data)).vocabulary_hash != Tokenizer.open(folder).vocabulary_hash


def broken(kind, data):
    if kind == "id beyond any embedding":
        data["model"]["vocab"]["zz!!"] = 4_294_967_295
    elif kind == "negative id":
        data["model"]["vocab"]["zz!!"] = -1
    elif kind == "merge of unknown tokens":
        data["model"]["merges"].append(["zz!!", "??"])
    elif kind == "bad pattern":
        data["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}
    elif kind == "no vocabulary":
        data["model"]["vocab"], data["model"]["merges"], data["added_tokens"] = {}, [], []
    elif kind == "no model":
        del data["model"]
    return data


@pytest.mark.parametrize(
    "kind",
    ["id beyond any embedding", "negative id", "merge of unknown tokens", "bad pattern", "no vocabulary", "no model"],
)
def test_a_pathological_file_is_refused_by_name(tmp_path, data, kind):
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a usable tokenizer\.json.*write the file again"):
        Tokenizer.open(write(tmp_path, broken(kind, data)))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"model": 1}'])
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path, content):
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.open(write(tmp_path, content))


def test_a_truncated_file_is_refused_at_any_length(tmp_path, folder):
    text = (folder / "tokenizer.json").read_text()
    for cut in (1, 100, 5000, len(text) // 2, len(text) - 2):
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer.open(write(tmp_path, text[:cut]))


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.open(tmp_path)


def test_a_missing_tokenizer_says_what_to_give(tmp_path, shared):
    with pytest.raises(FileNotFoundError, match="give a tokenizer.json"):
        Tokenizer.open(tmp_path)
    with pytest.raises(ValueError, match="SentencePiece.*convert it once"):
        Tokenizer.open(shared / "data/tokenizers/published/mistral-v3")


@pytest.mark.parametrize("ids", [[-1], [1 << 40], [1.5], ["a"]])
def test_ids_that_are_none_are_refused(folder, ids):
    with pytest.raises(ValueError, match="ids run from 0 to 4095"):
        Tokenizer.open(folder).decode(ids)


def test_half_a_surrogate_pair_is_refused(folder):
    tokenizer = Tokenizer.open(folder)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match="surrogate"):
            encode("ab\ud83d")


@pytest.mark.parametrize("before", ["", "train_bpe(['some text here'] * 50, 300)\n"], ids=["encoding", "training"])
def test_forked_processes_neither_warn_nor_hang(folder, before):
    script = (
        "import os, sys\n"
        "from plait.text.tokenizer import Tokenizer\n"
        "from plait.text.bpe import train_bpe\n"
        "tokenizer = Tokenizer.open(sys.argv[1])\n"
        f"{before}"
        "tokenizer.encode_batch(['a b c'] * 100)\n"
        "child = os.fork()\n"
        "tokenizer.encode_batch(['a b c'] * 100)\n"
        "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
