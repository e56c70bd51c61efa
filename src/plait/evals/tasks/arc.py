"""ARC: questions of school science with four choices (a few have three or five).

Asked as "Question: ...", a line end, "Answer:" and the choice. The easy set compares summed log-probabilities, the
challenge set log-probabilities per byte: so they are reported for hybrids and Transformers of this size.

Source   Clark et al. 2018, arXiv:1803.05457; metrics as in Gu and Dao 2023, arXiv:2312.00752 table 3.
"""

from collections.abc import Mapping

from plait.evals.task import Example, Task, choice, likeliest, likeliest_per_byte, text_of


def _example(row: Mapping[str, object]) -> Example:
    return choice(row, f"{text_of(row, 'query').rstrip()}\nAnswer:", " ")


EASY = Task(
    name="arc_easy",
    file="arc_easy",
    summary="school science, the easy questions",
    chance=0.25,
    example=_example,
    grade=likeliest,
)
CHALLENGE = Task(
    name="arc_challenge",
    file="arc_challenge",
    summary="school science, questions that neither retrieval nor counting words answers",
    chance=0.25,
    example=_example,
    grade=likeliest_per_byte,
)
