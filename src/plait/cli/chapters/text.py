"""First chapter: collect text, train a byte-level BPE on it, and turn it into token shards, some of it held out."""

import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plait.cli.chapters.story import Story
from plait.cli.drawing import size
from plait.cli.page.blocks import Pieces, Prose, Section, Table
from plait.data.corpus import Corpus, Found, find_files
from plait.data.document import Document
from plait.data.prepare import Prepared, is_valid, tokenize_documents
from plait.data.shards import Dataset
from plait.data.shuffle import key_of
from plait.text.bpe import SPECIAL_TOKENS, train_bpe
from plait.text.tokenizer import Tokenizer

# parts of the standard library that are tests, tables, or another program's insides
UNREAD = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
UNREAD |= {"turtledemo", "ensurepip", "__pycache__"}
LEAST_BYTES = 2000
HELD_OUT = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """The documents of the story, in memory. total_bytes: of all files found, of which max_text may have been taken."""

    documents: list[Document]
    n_files: int
    total_bytes: int
    skipped: Counter[str]

    @property
    def n_bytes(self) -> int:
        """Bytes of text."""
        return sum(len(document.text.encode()) for document in self.documents)


def tell(story: Story) -> Section:
    """Collect, train the vocabulary, write shards.

    Raises: ValueError naming the folder if it holds no text, or too little.
    """
    text = collect(story.text, story.scale.max_text)
    vocab_size = vocabulary_for(text.n_bytes, story.scale.vocab_size)
    kept = size(text.n_bytes)
    story.say(f"{text.n_files} files, {kept} of text; training a vocabulary of {vocab_size} and writing shards")
    # chance may hold out every document of a few
    read = [document for document in text.documents if not is_valid(document.text, HELD_OUT)] or text.documents
    prepared = tokenize_documents(
        text.documents,
        lambda: train_bpe((document.text for document in read), vocab_size),
        story.out / "data",
        valid=HELD_OUT,
        jobs=2,
    )
    tokenizer = Tokenizer.open(story.tokenizer)
    report = story.report
    report.add("text files", text.n_files)
    report.add("text", prepared.bytes, "bytes")
    report.add("vocabulary", tokenizer.vocab_size, "tokens")
    report.add("training tokens available", prepared.tokens - prepared.valid_tokens, "tokens")
    report.add("held-out tokens", prepared.valid_tokens, "tokens")
    report.add("bytes per token", prepared.bytes_per_token, "bytes")
    return Section(name="text", title="The text", blocks=_blocks(story, text, prepared, tokenizer))


def collect(folder: Path | None, max_bytes: int) -> Text:
    """Read the user's folder, or the source of the Python standard library.

    Args:
        folder: None for the standard library.
        max_bytes: take files, in an order given by their names' hashes, until so much is read.

    Raises: FileNotFoundError if there is no such folder; ValueError if there is no text in it, or almost none.
    """
    files = find_files([folder]) if folder is not None else list(_standard_library())
    skipped: Counter[str] = Counter()
    chosen: list[tuple[int, Document]] = []
    taken = 0
    for place, file in sorted(enumerate(files), key=lambda item: key_of("demo", item[1].path.name, item[0])):
        if taken >= max_bytes:
            skipped["beyond what a demo needs"] += 1
            continue
        for document in Corpus(files=[file]).read(skipped):
            chosen.append((place, document))
            taken += len(document.text.encode())
    documents = [document for _, document in sorted(chosen, key=lambda item: item[0])]
    where = folder or "the Python standard library"
    if taken < LEAST_BYTES:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items())) or "none"
        found = f"{taken} bytes of text in {len(files)} files" if documents else f"no text in {len(files)} files"
        raise ValueError(
            f"{where}: {found} (left out: {reasons}); give a folder with at least {LEAST_BYTES} bytes of "
            "plain text, code, JSONL or Parquet"
        )
    total = sum(file.path.stat().st_size for file in files)
    return Text(documents=documents, n_files=len(files), total_bytes=total, skipped=skipped)


def vocabulary_for(n_bytes: int, largest: int) -> int:
    """A vocabulary that a text of this many bytes can fill: each token should be met often enough to be learnt."""
    return max(len(SPECIAL_TOKENS) + 256 + 64, min(largest, n_bytes // 400))


def _standard_library() -> Iterator[Found]:
    root = Path(sysconfig.get_path("stdlib"))
    for found in find_files([root]):
        if found.path.suffix == ".py" and not UNREAD & set(found.path.relative_to(root).parts):
            yield found


def _blocks(story: Story, text: Text, prepared: Prepared, tokenizer: Tokenizer) -> tuple[Prose | Table | Pieces, ...]:
    source = "your folder" if story.text else "the Python standard library: real code that is on every machine"
    table = Table(
        caption="What the models read.",
        head=("", "files", "bytes", "tokens"),
        rows=(
            ("all", f"{text.n_files:,}", f"{prepared.bytes:,}", f"{prepared.tokens:,}"),
            ("held out", f"{prepared.valid_documents:,}", "", f"{prepared.valid_tokens:,}"),
        ),
        note=f"byte-level BPE of {tokenizer.vocab_size:,} tokens, {prepared.bytes_per_token:.2f} bytes per token",
    )
    n = prepared.valid_documents
    intro = Prose(
        text=f"The text is {source}. {n} document{'s' * (n != 1)}, chosen by the hash of the text, "
        f"{'is' if n == 1 else 'are'} held out; a byte-level BPE and both models learn from the others."
    )
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(text.skipped.items()))
    notes = (Prose(text=f"Left out: {left}."),) if left else ()
    return intro, *notes, table, _sample(story, tokenizer)


def _sample(story: Story, tokenizer: Tokenizer) -> Pieces:
    """A few lines of held-out text, cut at its tokens."""
    valid = Dataset.open(story.valid_data)
    longest = int(valid.lengths.argmax())
    ids = [int(token) for token in valid.document(longest)[:-1]]
    middle = ids[len(ids) // 2 : len(ids) // 2 + 160]
    whole = tokenizer.decode(middle)
    lines = whole.split("\n")
    # begin and end at whole lines where there are some
    wanted = "\n".join(lines[1:9]) if len(lines) > 3 else whole
    cut = tokenizer.encode(wanted, parse_special=False)
    pieces = tuple(piece for piece in map(lambda token: tokenizer.decode([token]), cut))
    return Pieces(caption="A held-out passage, cut into its tokens.", pieces=pieces)
