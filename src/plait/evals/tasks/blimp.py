"""BLiMP: which of two sentences is grammatical? They differ in a word or two; the likelier one is taken.

67 kinds of pairs. The whole sentences are compared by their summed log-probability, without normalisation.

Source   Warstadt et al. 2020, arXiv:1912.00582.
"""

from collections.abc import Mapping

from plait.evals.task import Example, Option, Task, likeliest, text_of


def _example(row: Mapping[str, object]) -> Example:
    pair = (text_of(row, "sentence_good"), text_of(row, "sentence_bad"))
    return Example(options=tuple(Option(context="", continuation=s) for s in pair), group=str(row.get("UID", "")))


TASK = Task(
    name="blimp",
    file="blimp",
    summary="grammar: the better of two sentences",
    chance=0.5,
    example=_example,
    grade=likeliest,
)
