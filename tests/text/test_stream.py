import random

import pytest
import tokenizers
from tokenizers import decoders, models

from plait.text.stream import token_bytes
from plait.text.tokenizer import Tokenizer

PUBLISHED = [
    "bpe-4096",
    "bpe-16384",
    "published/phi-2",
    "published/phi-3",
    "published/falcon",
    "published/whisper-tiny",
]
TEXTS = [
    "",
    " ",
    "  two  blanks\n\n",
    "naïve café – “quoted” …",
    "混合模型，快速。",
    "👩‍👩‍👧‍👦🏳️‍🌈 flags 🇨🇭",
    "\x00\x01 control",
    "def f():\n\treturn 1\n",
]


def streamed(tokenizer, ids, skip_special=True):
    stream = tokenizer.stream(skip_special)
    pieces = [stream.add(token_id) for token_id in ids]
    return pieces, "".join(pieces) + stream.finish()


@pytest.mark.parametrize("name", PUBLISHED)
def test_streamed_text_equals_decoded_text(shared, name):
    tokenizer = Tokenizer.open(shared / "data/tokenizers" / name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids)[1] == tokenizer.decode(ids)


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_streamed_random_ids_equal_decoded_ids(shared, name, skip_special):
    tokenizer = Tokenizer.open(shared / "data/tokenizers" / name)
    rng = random.Random(0)
    # low ids are mostly single bytes, special tokens and byte tokens, where decoding is hardest
    for limit in (40, 300, tokenizer.vocab_size + 5):
        for _ in range(60):
            ids = [rng.randrange(limit) for _ in range(rng.randrange(1, 40))]
            assert streamed(tokenizer, ids, skip_special)[1] == tokenizer.decode(ids, skip_special)


def test_half_a_character_is_never_shown(shared):
    tokenizer = Tokenizer.open(shared / "data/tokenizers/bpe-4096")
    text = "混合👩‍👩‍👧‍👦é" * 3
    pieces, whole = streamed(tokenizer, tokenizer.encode(text))
    assert whole == text
    assert len(pieces) > len(set(pieces)) > 3
    assert "\ufffd" not in "".join(pieces)


def test_a_cut_character_is_shown_as_broken_only_at_the_end(shared):
    tokenizer = Tokenizer.open(shared / "data/tokenizers/bpe-4096")
    ids = tokenizer.encode("a👩")[:-1]
    pieces, whole = streamed(tokenizer, ids)
    assert "".join(pieces) == "a"
    assert whole == tokenizer.decode(ids) == "a\ufffd"


def test_a_finished_stream_starts_afresh(shared):
    tokenizer = Tokenizer.open(shared / "data/tokenizers/published/phi-3")
    stream = tokenizer.stream()
    ids = tokenizer.encode("hello there")
    first = "".join(map(stream.add, ids)) + stream.finish()
    assert "".join(map(stream.add, ids)) + stream.finish() == first == tokenizer.decode(ids)


def test_every_byte_has_its_own_character():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(token_bytes(character) for character in alphabet) == [bytes([byte]) for byte in range(256)]


def test_a_vocabulary_without_decoder_streams_too():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    for decoder in (None, decoders.WordPiece("##"), decoders.Metaspace()):
        if decoder is not None:
            backend.decoder = decoder
        tokenizer = Tokenizer(backend)
        assert streamed(tokenizer, [0, 1, 2, 0])[1] == tokenizer.decode([0, 1, 2, 0])
