import random
from pathlib import Path

import pytest

from plait.data.corpus import Corpus
from plait.data.document import Document
from plait.data.prepare import fresh_folder, is_valid, tokenize_documents, train_tokenizer
from plait.data.shards import Dataset
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some words to learn from"] * 20, 320)


def documents(count, seed=0):
    rng = random.Random(seed)
    return [
        Document(text=f"{i} " + "words é👩 " * rng.randrange(1, 9), source="s", licence="CC0") for i in range(count)
    ]


def texts_of(folder):
    tokenizer, dataset = Tokenizer.open(folder.parent / "tokenizer"), Dataset.open(folder)
    dataset.verify()
    return [tokenizer.decode(dataset.document(i).tolist()[:-1], skip_special=False) for i in range(dataset.n_documents)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_document_comes_back_in_order_on_its_side(tmp_path, tokenizer, jobs, monkeypatch):
    monkeypatch.setattr("plait.data.prepare._BATCH", 200)
    wanted = documents(300)
    done = tokenize_documents(wanted, tokenizer, tmp_path / "out", valid=0.2, jobs=jobs)
    train = [document.text for document in wanted if not is_valid(document.text, 0.2)]
    valid = [document.text for document in wanted if is_valid(document.text, 0.2)]
    assert (texts_of(tmp_path / "out/train"), texts_of(tmp_path / "out/valid")) == (train, valid)
    assert 30 < len(valid) < 90
    sets = [Dataset.open(tmp_path / "out" / name) for name in ("train", "valid")]
    assert done.documents == 300 and done.tokens == sum(one.n_tokens for one in sets)
    assert (done.valid_documents, done.valid_tokens) == (len(valid), sets[1].n_tokens)
    assert done.bytes == sum(len(document.text.encode()) for document in wanted)
    assert sets[0].record["vocabulary_hash"] == tokenizer.vocabulary_hash
    assert sets[0].record["sources"]["s"]["licences"] == ["CC0"]


def test_a_long_text_is_encoded_in_pieces_and_comes_back_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("plait.data.prepare._BATCH", 50)
    text = "lines of words\n" * 40 + "x" * 333
    tokenize_documents([Document(text=text)], tokenizer, tmp_path / "out", valid=0)
    assert texts_of(tmp_path / "out/train") == [text]
    assert not (tmp_path / "out/valid").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_still_give_text_on_both_sides(tmp_path, tokenizer, count):
    for seed in range(6):
        wanted = [Document(text=f"{seed} {i} " + "many words here " * 50) for i in range(count)]
        for valid in (0.01, 0.99):
            folder = tmp_path / f"{seed} {valid}"
            tokenize_documents(wanted, tokenizer, folder, valid=valid)
            train, held_out = texts_of(folder / "train"), texts_of(folder / "valid")
            assert train and held_out
            assert sorted("".join(train + held_out)) == sorted("".join(document.text for document in wanted))


def test_names_of_special_tokens_in_a_text_are_letters(tmp_path, tokenizer):
    tokenize_documents([Document(text="a<|eos|>b")], tokenizer, tmp_path / "out", valid=0)
    tokens = Dataset.open(tmp_path / "out/train").document(0).tolist()
    assert tokens.count(tokenizer.eos_ids[0]) == 1


def test_copies_of_a_text_fall_on_one_side():
    shares = [is_valid(f"text {i}", 0.3) for i in range(2000)]
    # 600 expected, standard deviation 20
    assert abs(sum(shares) - 600) < 100
    assert shares == [is_valid(f"text {i}", 0.3) for i in range(2000)]
    # a larger share holds out what a smaller one did, and more
    assert all(is_valid(f"text {i}", 0.4) for i in range(2000) if shares[i])


def test_an_empty_corpus_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no text to write"):
        tokenize_documents([], tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_on_demand_and_only_if_ours(tmp_path, tokenizer):
    tokenize_documents(documents(5), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="out exists; choose another folder, or replace it with --force"):
        tokenize_documents(documents(5), tokenizer, tmp_path / "out")
    tokenize_documents(documents(1, seed=1), tokenizer, tmp_path / "out", valid=0, replace=True)
    assert len(texts_of(tmp_path / "out/train")) == 1
    (tmp_path / "out/diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        tokenize_documents(documents(5), tokenizer, tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_in_the_middle_keeps_the_earlier_result(tmp_path, tokenizer):
    tokenize_documents(documents(5), tokenizer, tmp_path / "out", valid=0)

    def failing():
        yield from documents(50)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        tokenize_documents(failing(), tokenizer, tmp_path / "out", replace=True)
    assert len(texts_of(tmp_path / "out/train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_cannot_be_put_in_place_leaves_the_earlier_one(tmp_path, tokenizer, monkeypatch):
    tokenize_documents(documents(5), tokenizer, tmp_path / "out", valid=0)
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".partial") and target == tmp_path / "out":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        tokenize_documents(documents(9), tokenizer, tmp_path / "out", replace=True)
    assert len(texts_of(tmp_path / "out/train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write in .*file"):
        tokenize_documents(documents(1), lambda: pytest.fail("trained"), tmp_path / "file/out")
    with pytest.raises(ValueError, match="holds other things"), fresh_folder(tmp_path / "file", replace=True):
        pass


def test_a_tokenizer_without_end_mark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end-of-text token"):
        tokenize_documents(documents(1), train_bpe(["x"], 300, ("<a>",)), tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"valid": 1.0}, {"valid": -0.1}, {"jobs": 0}])
def test_numbers_that_do_not_fit_are_named(tmp_path, tokenizer, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        tokenize_documents(documents(1), tokenizer, tmp_path / "out", **wrong)


def test_a_vocabulary_is_trained_without_what_is_held_out(tmp_path):
    names = [f"{i}.txt" for i in range(200)]
    for name in names:
        text = f"{name} zzzqqq" if is_valid(f"{name} zzzqqq", 0.5) else f"{name} aaabbb"
        (tmp_path / name).write_text(text)
    held_out = [name for name in names if is_valid((tmp_path / name).read_text(), 0.5)]
    trained = train_tokenizer(Corpus.of([tmp_path]), 330, valid=0.5)
    assert 0 < len(held_out) < 200
    assert len(trained.encode(" aaabbb")) == 1
    assert len(trained.encode(" zzzqqq")) > 3
