"""The text that a compression learns on: token shards, or files of text that the teacher's tokenizer turns into them.

Whatever does not fit is refused here, before anything is scored: no text, too little of it, another vocabulary.
"""

import json
import os
from pathlib import Path

from plait.compress.distill import Data
from plait.compress.job import Job
from plait.config import ConfigError
from plait.data.corpus import Corpus
from plait.data.prepare import tokenize_documents
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint
from plait.text.tokenizer import Tokenizer
from plait.train.metrics import write_whole

# share of documents held out where the text is not divided yet
HELD_OUT = 0.02
# how often the same text may be read
MOST_EPOCHS = 8.0
# bytes of text that are counted to guess how many tokens all of it has, and how far off such a guess may be
SAMPLE, OFF = 1 << 20, 1.25


def is_tokens(data: Path) -> bool:
    """Whether a folder is one that `plait tokenize` wrote."""
    return (data / "train" / "dataset.json").is_file()


def check_tokens(data: Path, teacher: Checkpoint) -> Data:
    """Open token shards and hold their vocabulary against the teacher's.

    Raises: ConfigError naming the folder and what does not fit.
    """
    if not (data / "valid" / "dataset.json").is_file():
        raise ConfigError(
            f"data={data} holds out no text to validate on; write it again with plait tokenize --valid 0.02"
        )
    found = Data(train=Dataset.open(data / "train"), valid=Dataset.open(data / "valid"))
    tokenizer, rows = tokenizer_of(teacher), teacher.config.vocab_size
    for name, part in (("train", found.train), ("valid", found.valid)):
        if not part.n_tokens:
            raise ConfigError(f"data={data / name} holds no tokens; tokenize files that hold text")
        size, written = int(str(part.record["vocab_size"])), str(part.record["vocabulary_hash"])
        if size > rows:
            raise ConfigError(
                f"data={data / name} has a vocabulary of {size}, the teacher's embedding {rows} rows; tokenize the "
                "text with the teacher's tokenizer"
            )
        if tokenizer is not None and written and written != tokenizer.vocabulary_hash:
            raise ConfigError(
                f"data={data / name} was written with another tokenizer than {teacher.folder}'s: the same numbers mean "
                "other tokens there; tokenize the text with the teacher's"
            )
    return found


def check_length(found: Data, job: Job) -> None:
    """Refuse text that is too short for what is asked of it.

    Raises: ConfigError with both numbers.
    """
    _check_train(found.train.n_tokens, job)
    rows = job.teaching.rows
    if found.valid.n_tokens < rows.seq_len:
        raise ConfigError(
            f"{found.valid.n_tokens:,} tokens are held out, fewer than one row of {rows.seq_len}; give more text"
        )


def check_text(data: Path, teacher: Checkpoint, job: Job) -> None:
    """Refuse text that is too short before any of it is written as tokens, as far as its beginning tells.

    Raises: ConfigError as `check_length` and `guessed_tokens`.
    """
    tokens, is_all = guessed_tokens(data, teacher)
    _check_train(tokens if is_all else int(OFF * tokens), job)


def _check_train(tokens: int, job: Job) -> None:
    teaching, rows = job.teaching, job.teaching.rows
    asked = (job.scoring.batches + job.ranking) * rows.tokens
    if tokens < asked:
        raise ConfigError(
            f"the text has {tokens:,} tokens, scoring and ranking read {asked:,} "
            f"({job.scoring.batches} and {job.ranking} batches of {rows.tokens:,}); give more text, or lower "
            "scoring.batches, ranking or teaching.rows"
        )
    if teaching.tokens > MOST_EPOCHS * tokens:
        raise ConfigError(
            f"tokens={teaching.tokens:,} would read the text of {tokens:,} tokens "
            f"{teaching.tokens / tokens:.0f} times; give more text, or ask for fewer tokens"
        )


def prepared(data: Path, teacher: Checkpoint, out: Path) -> Path:
    """The folder with tokens of some text, in the output folder; written if it is not there yet.

    Raises: ConfigError without a tokenizer to write them with, or if the output folder holds those of another text.
    """
    corpus = Corpus.of([data])
    tokenizer = tokenizer_of(teacher)
    if tokenizer is None:
        raise ConfigError(
            f"data={data} is text, and {teacher.folder} has no tokenizer.json to read it with; give a folder that "
            "plait tokenize wrote, or put the tokenizer beside the teacher"
        )
    facts = {"text": str(data.resolve()), "bytes": corpus.size_bytes(), "vocabulary": tokenizer.vocabulary_hash}
    made, folder = out / "data.json", out / "data"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != facts:
        raise ConfigError(f"out={out} holds tokens of another text or tokenizer; choose another folder with --out")
    if not made.is_file():
        jobs = os.cpu_count() or 1
        tokenize_documents(corpus, tokenizer, folder, valid=HELD_OUT, jobs=jobs, replace=folder.is_dir())
        write_whole(made, json.dumps(facts) + "\n")
    return folder


def guessed_tokens(data: Path, teacher: Checkpoint) -> tuple[int, bool]:
    """About how many tokens some text has, from its beginning, and whether that was all of it.

    Raises: as `prepared`.
    """
    corpus, tokenizer = Corpus.of([data]), tokenizer_of(teacher)
    if tokenizer is None:
        raise ConfigError(f"data={data} is text, and {teacher.folder} has no tokenizer.json to read it with")
    n_bytes = n_tokens = 0
    is_all = True
    for document in corpus:
        part = document.text[:SAMPLE]
        n_bytes += len(part.encode())
        n_tokens += len(tokenizer.encode(part)) + 1
        if n_bytes >= SAMPLE:
            is_all = False
            break
    if not n_tokens:
        raise ConfigError(f"data={data} holds no text; name files or folders that do")
    return n_tokens if is_all else int(corpus.size_bytes() * n_tokens / n_bytes), is_all


def tokenizer_of(teacher: Checkpoint) -> Tokenizer | None:
    """The teacher's own, if it has one."""
    return Tokenizer.open(teacher.folder) if (teacher.folder / "tokenizer.json").is_file() else None
