"""LAMBADA: the last word of a passage, which people guess from the whole of it and hardly from its last sentence.

Right if every token of the word is the model's first choice. Nobody guesses it by chance.

Source   Paperno et al. 2016, arXiv:1606.06031; the version of OpenAI with the original punctuation.
"""

from collections.abc import Mapping

from plait.evals.task import Example, Option, Task, greedy, text_of


def _example(row: Mapping[str, object]) -> Example:
    word = text_of(row, "continuation").strip()
    return Example(options=(Option(context=text_of(row, "context").rstrip(), continuation=f" {word}"),))


TASK = Task(
    name="lambada",
    file="lambada_openai",
    summary="the last word of a passage",
    chance=0.0,
    example=_example,
    grade=greedy,
)
