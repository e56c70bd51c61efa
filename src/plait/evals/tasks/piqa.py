"""PIQA: how to do something with everyday things; two ways, of which one works.

Asked as "Question: ...", a line end, "Answer:" and the way; the larger summed log-probability is taken.

Source   Bisk et al. 2020, arXiv:1911.11641.
"""

from collections.abc import Mapping

from plait.evals.task import Example, Task, choice, likeliest, text_of


def _example(row: Mapping[str, object]) -> Example:
    return choice(row, f"{text_of(row, 'query').rstrip()}\nAnswer:", " ")


TASK = Task(
    name="piqa",
    file="piqa",
    summary="everyday physics: which of two ways works",
    chance=0.5,
    example=_example,
    grade=likeliest,
)
