import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.text.bpe import SPECIAL_TOKENS, train_bpe
from plait.text.tokenizer import Tokenizer

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 20,
    "the quick brown fox jumps over the lazy dog 2024 " * 20,
    "混合模型 é 👩‍👩‍👧‍👦 " * 5,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(CORPUS, 400)


@given(text=st.text())
def test_every_text_survives(text):
    assert _TRAINED.decode(_TRAINED.encode(text, parse_special=False), skip_special=False) == text


@given(text=st.text(alphabet="<|eos>think/ \n\t0aé👩\u200d"))
def test_texts_full_of_marks_survive(text):
    for parse_special in (True, False):
        assert _TRAINED.decode(_TRAINED.encode(text, parse_special=parse_special), skip_special=False) == text


_TRAINED = train_bpe(CORPUS, 400)


def test_special_tokens_take_the_first_ids_in_order(tokenizer, shared):
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_ids) == (0, 1, (2,))
    published = Tokenizer.open(shared / "data/tokenizers/bpe-4096")
    assert [published.token_of(id) for id in range(32)] == list(SPECIAL_TOKENS)


def test_thinking_and_tool_marks_stay_visible(tokenizer):
    ids = tokenizer.encode("<think>a</think><tool_call>b</tool_call><|im_end|>")
    assert len(ids) == 7
    assert tokenizer.decode(ids) == "<think>a</think><tool_call>b</tool_call>"


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_frequent_words_become_one_token(tokenizer):
    assert len(tokenizer.encode(" quick")) == 1


def test_the_same_texts_give_the_same_vocabulary(tokenizer):
    assert train_bpe(iter(CORPUS), 400).vocabulary_hash == tokenizer.vocabulary_hash


def test_few_texts_give_a_smaller_vocabulary():
    assert train_bpe(["ab"], 5000).vocab_size == len(SPECIAL_TOKENS) + 256 + 1


def test_compression_is_near_that_of_the_published_vocabulary(shared):
    texts = [(shared / "data/starter/tinyshakespeare.txt").read_text()[:400_000]]
    ours, published = train_bpe(texts, 4096), Tokenizer.open(shared / "data/tokenizers/bpe-4096")
    assert len(ours.encode(texts[0])) < len(published.encode(texts[0]))


@pytest.mark.parametrize(
    ("texts", "size", "special", "named"),
    [
        (["a"], 100, SPECIAL_TOKENS, "vocab_size = 100 is too small.*288"),
        ([], 400, SPECIAL_TOKENS, "no text"),
        ([""], 400, SPECIAL_TOKENS, "no text"),
        (["a"], 400, ("<a>", "<a>"), "twice"),
    ],
)
def test_impossible_trainings_are_refused(texts, size, special, named):
    with pytest.raises(ValueError, match=named):
        train_bpe(texts, size, special)
