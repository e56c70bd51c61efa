"""From documents to a folder that training reads: train/, valid/ and tokenizer/.

Which side a document falls on depends on its text alone, so that two copies never lie on both sides, and adding files
moves no other document. The folder is built aside and gets its name when all of it is there.
"""

import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from plait.data.corpus import Corpus
from plait.data.document import Document, Skipped
from plait.data.shuffle import key_of
from plait.data.writer import ShardWriter
from plait.text.bpe import train_bpe
from plait.text.tokenizer import Tokenizer

# characters that one call of the tokenizer gets; its records take far more memory than the ids
_BATCH = 1 << 19
# text that a vocabulary is trained on, at most; more changes little and costs time and memory
_TRAINING_BYTES = 1 << 26


@dataclass(slots=True, kw_only=True)
class Prepared:
    """What was made, and how far it has come while it is being made."""

    folder: Path
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    valid_documents: int = 0
    valid_tokens: int = 0
    seconds: float = 0.0
    skipped: Skipped = field(default_factory=Counter)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that one token holds on average (end marks left out)."""
        return self.bytes / max(self.tokens - self.documents, 1)


@contextmanager
def fresh_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill beside `folder`, and rename it to `folder` when the block ends well; else remove it.

    Raises: ValueError, before anything is done, if `folder` exists and is not to be replaced, or cannot be made.
    """
    folder = folder.absolute()
    if folder.exists() and not replace:
        raise ValueError(f"{folder} exists; choose another folder, or replace it with --force")
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} holds other things than tokens; it is not replaced, choose another folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot write in {folder.parent} ({error.strerror}); choose another output folder") from error
    try:
        yield aside
        old = aside.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {"train", "valid", "tokenizer"}


def is_valid(text: str, share: float) -> bool:
    """Whether a document with this text is held out for validation, so that `share` of all different texts are."""
    return key_of("valid", text) < share * 2.0**64


def train_tokenizer(corpus: Corpus, vocab_size: int, *, valid: float = 0.02) -> Tokenizer:
    """Train a byte-level BPE on a corpus, without what is held out; of a large corpus on a sample of documents."""
    share = min(1.0, _TRAINING_BYTES / max(corpus.size_bytes(), 1))
    return train_bpe(
        (doc.text for doc in corpus if not is_valid(doc.text, valid) and key_of("bpe", doc.text) < share * 2.0**64),
        vocab_size,
    )


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer | Callable[[], Tokenizer],
    folder: Path,
    *,
    valid: float = 0.02,
    jobs: int = 1,
    replace: bool = False,
    skipped: Skipped | None = None,
    on_progress: Callable[[Prepared], None] = lambda prepared: None,
) -> Prepared:
    """Write documents as token shards into folder/train and folder/valid, and the tokenizer into folder/tokenizer.

    If chance holds nothing out (few documents), the end of the last document becomes validation text.

    Args:
        documents: read once, in order.
        tokenizer: its first eos id goes between documents. A function that makes one (by training, say) is called
            only when it is certain that the folder can be written.
        folder: made by this call.
        valid: share of documents to hold out; 0 holds out none and writes no folder/valid.
        jobs: threads that encode.
        replace: overwrite an earlier result.
        skipped: counts of what the reader of the documents left out; goes into the result.
        on_progress: called now and then with the counts so far.

    Raises: ValueError if the folder cannot be made or exists, if there is no text at all, or if the tokenizer has no
        end-of-text token.
    """
    if not 0 <= valid < 1:
        raise ValueError(f"valid = {valid}; give a share from 0 to below 1")
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}; give at least 1")
    start = time.perf_counter()
    prepared = Prepared(folder=folder, skipped=Counter() if skipped is None else skipped)
    with fresh_folder(folder, replace=replace) as aside:
        tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer()
        if not tokenizer.eos_ids:
            raise ValueError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
        settings = {
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_ids[0],
            "vocabulary_hash": tokenizer.vocabulary_hash,
        }
        writers = [ShardWriter(aside / "train", **settings), ShardWriter(aside / "valid", **settings)]
        last: tuple[Document, list[int]] | None = None
        for document, ids in _encoded(documents, tokenizer, jobs):
            if last is not None:
                _add(writers[is_valid(last[0].text, valid)], *last)
            last = (document, ids)
            prepared.documents += 1
            prepared.bytes += len(document.text.encode())
            prepared.tokens += len(ids) + 1
            prepared.seconds = time.perf_counter() - start
            on_progress(prepared)
        if last is None:
            reasons = ", ".join(f"{count} {reason}" for reason, count in prepared.skipped.items())
            raise ValueError(f"there is no text to write (left out: {reasons or 'nothing'}); name files that hold text")
        prepared.tokens += _add_last(writers, *last, valid)
        for writer in writers:
            writer.close() if writer.n_documents else writer.drop()
        prepared.valid_documents, prepared.valid_tokens = writers[1].n_documents, writers[1].n_tokens
        tokenizer.save(aside / "tokenizer")
    prepared.seconds = time.perf_counter() - start
    return prepared


def _add(writer: ShardWriter, document: Document, ids: list[int]) -> None:
    writer.add(ids, source=document.source, licence=document.licence)


def _add_last(writers: list[ShardWriter], document: Document, ids: list[int], valid: float) -> int:
    """Write the last document, divided if a side would stay empty; return how many end marks that costs."""
    train, held_out = writers
    cut = len(ids) - min(len(ids) // 2, max(1, round(valid * (train.n_tokens + held_out.n_tokens + len(ids)))))
    if valid and cut < len(ids) and not (train.n_documents and held_out.n_documents):
        _add(train, document, ids[:cut])
        _add(held_out, document, ids[cut:])
        return 1
    _add(writers[bool(train.n_documents) and is_valid(document.text, valid)], document, ids)
    return 0


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer, jobs: int) -> Iterator[tuple[Document, list[int]]]:
    """Encode in `jobs` threads (the tokenizer lets go of Python's lock), in order, a few batches ahead."""

    def encode(batch: list[Document]) -> list[list[int]]:
        pieces = [_pieces(document.text) for document in batch]
        # text of strangers: the name of a special token in it is just letters
        ids = iter(tokenizer.encode_batch([piece for of_one in pieces for piece in of_one], parse_special=False))
        return [[token for _ in of_one for token in next(ids)] for of_one in pieces]

    with ThreadPoolExecutor(jobs, thread_name_prefix="plait-encode") as pool:
        ahead: deque[tuple[list[Document], Future[list[list[int]]]]] = deque()
        try:
            for batch in _batches(documents):
                ahead.append((batch, pool.submit(encode, batch)))
                if len(ahead) > jobs:
                    yield from _done(*ahead.popleft())
            while ahead:
                yield from _done(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _done(batch: list[Document], ids: Future[list[list[int]]]) -> Iterator[tuple[Document, list[int]]]:
    # a text of characters that the tokenizer drops leaves nothing to learn
    return ((document, found) for document, found in zip(batch, ids.result(), strict=True) if found)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    """Cut very long texts after line ends."""
    pieces: list[str] = []
    begin = 0
    while len(text) - begin > _BATCH:
        end = text.rfind("\n", begin, begin + _BATCH) + 1 or begin + _BATCH
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]
