"""Text to token ids and back, for every model that comes with a tokenizer.json.

The work is done by the `tokenizers` library; this file adds the special ids and the chat template from the files beside
it, exact streaming, and clear refusals of broken files.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel

from plait.text.settings import TokenizerSettings, read_settings
from plait.text.stream import ByteStream, StreamDecoder, WindowStream, plain_bytes, token_bytes

# in some versions the library's own threads warn, or hang, in processes forked after first use. who wants speed calls
# `encode_batch` from several threads (the lock of Python is released inside); an explicit setting of the user stands
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# an embedding has one row per id, so an id beyond this is a broken file and not a large vocabulary
_MAX_ID = 1 << 24
# characters
_LONG = 1 << 12


class Tokenizer:
    """A vocabulary with its special ids and chat template. Immutable; safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings | None = None) -> None:
        """Wrap a tokenizer of the library; `Tokenizer.open` and `bpe.train_bpe` are the usual ways to get one.

        Raises: ValueError if the vocabulary is empty or its ids are unreasonably large.
        """
        # a file may ask for cutting and padding of every text; both would lose or invent tokens here
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        vocabulary = backend.get_vocab(with_added_tokens=True)
        token, largest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
        if largest > _MAX_ID:
            raise ValueError(f"token {token!r} has id {largest}, allowed are ids up to {_MAX_ID}; the file is broken")
        if largest < 0:
            raise ValueError("the vocabulary is empty; the file is broken")
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = {id for id, token in added.items() if token.special}
        self._is_byte_level = isinstance(backend.decoder, ByteLevel)
        self.vocab_size: int = largest + 1
        """The largest id plus one: how many rows an embedding needs at least."""
        self._settle(settings or TokenizerSettings())

    def _settle(self, settings: TokenizerSettings) -> None:
        self.bos_id = settings.bos_id
        """Id that may open a text, or None."""
        self.eos_ids = settings.eos_ids
        """Ids that end a text; the first is the one to write between documents."""
        self.pad_id = settings.pad_id
        """Id for padding, or None."""
        self.chat_template = settings.chat_template
        """Jinja text that turns messages into a prompt, or None."""

    @classmethod
    def open(cls, path: str | Path) -> "Tokenizer":
        """Open a folder that holds a tokenizer.json, or the file itself; all other files are optional.

        Raises: FileNotFoundError if there is none; ValueError naming the file if it cannot be understood.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            if (file.parent / "tokenizer.model").is_file():
                raise ValueError(
                    f"{file.parent} holds a SentencePiece tokenizer.model but no tokenizer.json; "
                    "convert it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
                )
            raise FileNotFoundError(f"{file} does not exist; give a tokenizer.json or a folder that holds one")
        with _refusing(f"{file} is not a usable tokenizer.json", "fetch or write the file again"):
            tokenizer = cls(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")))
        tokenizer._settle(read_settings(file.parent, tokenizer.id_of))
        return tokenizer

    def encode(self, text: str, add_special: bool = False, *, parse_special: bool = True) -> list[int]:
        """Text to ids.

        Args:
            text: any Unicode text.
            add_special: let the tokenizer put its own special tokens around (many put none).
            parse_special: read the name of a special token inside the text as that token; False takes it as ordinary
                letters, which is right for text of strangers.

        Raises: ValueError if the text holds half of a surrogate pair or the tokenizer fails on it.
        """
        with _refusing("the text cannot be encoded", "look for broken characters in it"):
            encoder, text = self._encoder(parse_special), _whole(text)
            if len(text) > _LONG:
                # a batch lets go of Python's lock, which one text does not; a server's other requests go on meanwhile
                return encoder.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
            return encoder.encode(text, add_special_tokens=add_special).ids

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """Many texts to ids, without special tokens around them; releases Python's lock. See `encode`."""
        with _refusing("a text cannot be encoded", "look for broken characters in it"):
            batch = [_whole(text) for text in texts]
            encodings = self._encoder(parse_special).encode_batch_fast(batch, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Ids to text; unknown ids give nothing, bytes that are no UTF-8 give U+FFFD.

        Raises: ValueError for an id that is no 32-bit whole number from 0.
        """
        with _refusing("ids cannot be decoded", f"ids run from 0 to {self.vocab_size - 1}"):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one by one; its pieces joined equal `decode` of all ids."""
        hidden = self._special if skip_special else frozenset[int]()
        if self._is_byte_level:
            return ByteStream(self.token_of, hidden)
        return WindowStream(self.token_of, hidden, lambda ids: self.decode(ids, skip_special))

    def id_of(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        return self._backend.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """The token (in the vocabulary's own spelling) of an id, or None for an unknown id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id <= _MAX_ID else None

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that an id adds in the middle of a text, or None for an unknown id."""
        token = self.token_of(token_id)
        if token is None or token_id in self._added:
            return None if token is None else token.encode()
        return token_bytes(token) if self._is_byte_level else plain_bytes(token)

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a mark that decoding leaves out."""
        return token_id in self._special

    @property
    def vocabulary_hash(self) -> str:
        """SHA-256 over (id, token) in order of ids: equal hashes mean that ids mean the same."""
        vocabulary = sorted((id, token) for token, id in self._backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which this class and Hugging Face libraries open."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {
            "bos_token": self._name(self.bos_id),
            "eos_token": self._name(self.eos_ids[0] if self.eos_ids else None),
            "pad_token": self._name(self.pad_id),
            "chat_template": self.chat_template,
        }
        config: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: value for name, value in names.items() if value is not None},
        }
        if len(self.eos_ids) > 1:
            config["eos_token_ids"] = list(self.eos_ids)
        _write(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))

    def _name(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.token_of(token_id)

    def _encoder(self, parse_special: bool) -> tokenizers.Tokenizer:
        if parse_special:
            return self._backend
        if self._plain is None:
            # the switch is a property of the whole object, so the other behaviour needs a second one
            plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


def continuation(tokenizer: Tokenizer, text: str, *, parse_special: bool = True) -> list[int]:
    """Ids of a text in the middle of another: without the space that some vocabularies put before every text."""
    before = tokenizer.encode("a")
    whole = tokenizer.encode("a" + text, parse_special=parse_special)
    fits = whole[: len(before)] == before
    return whole[len(before) :] if fits else tokenizer.encode(text, parse_special=parse_special)


def _whole(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from error
    return text


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _refusing(what: str, fix: str) -> Iterator[None]:
    # the library raises bare Exception, and its panics derive from BaseException
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}; {fix}") from error
