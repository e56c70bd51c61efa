"""Train a byte-level BPE vocabulary: every text can be written in it and read back unchanged.

Text is cut into words (letters with at most one other character before them), single digits, runs of punctuation and
runs of white space; inside a piece the most frequent neighbours are merged until the vocabulary is full.

Source  Sennrich et al. 2016, arXiv:1508.07909 (merges); Radford et al. 2019 (bytes as the alphabet).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from plait.text.chat import CHATML
from plait.text.settings import TokenizerSettings
from plait.text.tokenizer import Tokenizer

SPECIAL_TOKENS = (
    *("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<|image|>", "<img>", "</img>", "<|video|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|document|>", *(f"<|reserved_{i}|>" for i in range(10))),
)
"""The first ids, in this order. Thinking and tool marks are whole tokens but stay visible in decoded text."""

_ALPHABET = 256
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"  # a word, with the blank, dot or bracket before it
    r"|\p{N}"  # one digit
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"  # punctuation, with the line end after it
    r"|\s*[\r\n]+"  # line ends
    r"|\s+(?!\S)|\s+"  # indentation: all of it but the blank that belongs to the next word
)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    *,
    chat_template: str | None = CHATML,
) -> Tokenizer:
    """Train a tokenizer; the same texts in the same order give the same vocabulary.

    Args:
        texts: read once; memory grows with the number of different words, not with the length.
        vocab_size: how many ids at most, special tokens and the 256 bytes included. Few texts give fewer.
        special_tokens: get ids 0, 1, ...; `<|bos|>`, `<|eos|>` and `<|pad|>`, where present, are set as such.
        chat_template: Jinja text to keep with it.

    Raises: ValueError if vocab_size leaves no room for merges, a special token is doubled, or there is no text.
    """
    least = len(special_tokens) + _ALPHABET
    if vocab_size < least:
        raise ValueError(f"vocab_size = {vocab_size} is too small: special tokens and bytes alone take {least}")
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise ValueError("special_tokens holds a token twice, or an empty one")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train(backend, trainer, texts)
    backend = _show_marks(backend)
    named = {name: backend.token_to_id(f"<|{name}|>") for name in ("bos", "eos", "pad")}
    end = named["eos"]
    return Tokenizer(
        backend,
        TokenizerSettings(
            bos_id=named["bos"],
            eos_ids=() if end is None else (end,),
            pad_id=named["pad"],
            chat_template=chat_template,
        ),
    )


def _train(backend: tokenizers.Tokenizer, trainer: trainers.BpeTrainer, texts: Iterable[str]) -> None:
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    # counting words is worth the library's own threads; the process setting returns afterwards
    setting = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        backend.train_from_iterator(counted(), trainer=trainer)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = setting
    if not characters:
        raise ValueError("there is no text to train a vocabulary on; give at least one text that is not empty")


def _show_marks(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    # the trainer marks all of them as special, which would hide a model's reasoning and calls from the reader
    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        mark = token["content"].strip("</>")
        token["special"] = not mark.startswith(("think", "tool"))
    return tokenizers.Tokenizer.from_str(json.dumps(data))
