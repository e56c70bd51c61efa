"""The chapters of `plait demo`, in the order in which they are told."""

from plait.cli.chapters import bits, compare, complete, compress, export, onward, text, train

CHAPTERS = {
    "text": text.tell,
    "train": train.tell,
    "compare": compare.tell,
    "complete": complete.tell,
    "export": export.tell,
    "bits": bits.tell,
    "compress": compress.tell,
    "onward": onward.tell,
}
