"""First chapter: collect text, train a byte-level BPE on it, and turn it into token shards, some of it held out."""

import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from plait.cli.chapters.story import Story, Text
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


def tell(story: Story) -> Section:
    """Train the vocabulary on the collected text, write shards."""
    text, read, said = divided(story.collected)
    vocab_size = vocabulary_for(sum(len(piece.encode()) for piece in read), story.scale.vocab_size)
    kept = size(text.n_bytes)
    story.say(f"{text.n_files} files, {kept} of text; training a vocabulary of {vocab_size} and writing shards")
    prepared = tokenize_documents(
        text.documents,
        lambda: train_bpe(read, vocab_size),
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
    return Section(name="text", title="The text", blocks=_blocks(story, text, prepared, tokenizer, said))


def divided(text: Text) -> tuple[Text, list[str], str]:
    """What the vocabulary learns from: text that is not held out.

    Where chance would hold out nothing, or everything, `tokenize_documents` holds out the end of the last document
    instead; the longest is put there.

    Returns: the text in the order to write it; what to train the vocabulary on; what the page says of it.
    """
    if not _is_mixed(text.documents[:-1]):
        at = max(range(len(text.documents)), key=lambda i: len(text.documents[i].text))
        text = replace(text, documents=[*text.documents[:at], *text.documents[at + 1 :], text.documents[at]])
    *others, last = text.documents
    kept = [document.text for document in others if not is_valid(document.text, HELD_OUT)]
    if _is_mixed(others):
        kept += [] if is_valid(last.text, HELD_OUT) else [last.text]
        said = "Documents chosen by the hash of the text are held out"
        return text, kept, f"{said}; a byte-level BPE and both models learn from the others"
    # where the held-out end begins is known only in tokens, so after the vocabulary; it has at most half of them
    half = last.text[: (len(last.text) + 1) // 2]
    if others and not kept:
        said = "All is held out but the beginning of the longest document; both models learn from that"
        return text, [half], f"{said}, a byte-level BPE from its first half"
    said = "The end of the longest document is held out; both models learn from the rest"
    if sum(map(len, kept)) >= len(last.text):
        return text, kept, f"{said}, a byte-level BPE from the other documents"
    where = "the other documents and the first half of this one" if kept else "its first half"
    return text, [*kept, half], f"{said}, a byte-level BPE from {where}"


def _is_mixed(documents: list[Document]) -> bool:
    """Whether chance holds out some of them, but not all."""
    return len({is_valid(document.text, HELD_OUT) for document in documents}) == 2


def collect(folder: Path | None, max_bytes: int, without: Path | None = None) -> Text:
    """Read the user's folder, or the source of the Python standard library.

    Args:
        folder: None for the standard library.
        max_bytes: take files, in an order given by their names' hashes, until so much is read.
        without: a folder whose files are not taken.

    Raises: FileNotFoundError if there is no such folder; ValueError if there is no text in it, or almost none.
    """
    files = find_files([folder]) if folder is not None else list(_standard_library())
    if without is not None:
        files = [file for file in files if without.resolve() not in file.path.resolve().parents]
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


def _blocks(
    story: Story, text: Text, prepared: Prepared, tokenizer: Tokenizer, said: str
) -> tuple[Prose | Table | Pieces, ...]:
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
    intro = Prose(text=f"The text is {source}. {said}.")
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
