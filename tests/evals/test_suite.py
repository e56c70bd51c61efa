"""Suites: scores of a model that was written by hand, what stands above chance, and tokenizers that do not match."""

import json
import math
from pathlib import Path

import pytest
import tokenizers
from tests.engine.test_likelihood import bigrams
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from plait.engine.likelihood import Question
from plait.evals.suite import Score, Suite, _question, judge, mean_of, task_of
from plait.evals.task import Option
from plait.model.config import ModelConfig
from plait.model.hybrid import build
from plait.text.tokenizer import Tokenizer

# letters, blank and line end
LETTERS = "ab \n"
# after a line end and after "a", an "a" is likely; everywhere else a "b"
TABLE = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]]


class Letters:
    """A tokenizer of four letters; `special` opens texts where it is asked to."""

    vocab_size = 4

    def __init__(self, special: str = "") -> None:
        self.special = special

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        return [LETTERS.index(c) for c in self.special * add_special + text]


def _folder(folder: Path) -> Path:
    files = {
        "blimp": [("aa", "ab"), ("b", "a"), ("aaa", "bbb")],
        "lambada_openai": [("a", "b"), ("ab", "a"), ("b", "bb"), ("aa", "bba")],
    }
    fields = {"blimp": ("sentence_good", "sentence_bad"), "lambada_openai": ("context", "continuation")}
    for name, rows in files.items():
        lines = [json.dumps(dict(zip(fields[name], row, strict=True))) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_scores_are_those_computed_by_hand(tmp_path: Path) -> None:
    suite = Suite.open(_folder(tmp_path), ["blimp", "lambada"], Letters())
    # a sentence is scored from its first letter, after a line end; a word with the blank before it
    assert [(q.context, q.continuation) for q in suite.questions[0][:2]] == [((3,), (0, 0)), ((3,), (0, 1))]
    assert [(q.context, q.continuation) for q in suite.questions[1][::2]] == [((0,), (2, 1)), ((1,), (2, 1, 1))]
    told: list[tuple[str, int, int]] = []
    blimp, lambada = suite.scores(bigrams(TABLE), progress=lambda *words: told.append(words))
    # .6 x .7 > .6 x .1;  .2 < .6;  .6 x .7 x .7 > .2 x .7 x .7
    assert blimp.accuracy == pytest.approx(2 / 3) and blimp.value == pytest.approx(1 / 3)
    assert blimp.accuracy_error == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert blimp.error == pytest.approx(2 * blimp.accuracy_error)
    # a blank is never the first choice
    assert (lambada.accuracy, lambada.value, lambada.error, lambada.n) == (0, 0, 0, 4)
    assert told[-1] == ("lambada", 4, 4) and ("blimp", 6, 6) in told


def test_a_word_is_right_only_if_each_of_its_tokens_is_the_first_choice(tmp_path: Path) -> None:
    table = [[0.1, 0.1, 0.7, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25] * 4]
    (score,) = Suite.open(_folder(tmp_path), ["lambada"], Letters()).scores(bigrams(table))
    # " b" is written by itself; " a", " bb" and " bba" are not
    assert score.accuracy == 0.25


def test_a_tokenizers_own_opening_comes_before_every_text(tmp_path: Path) -> None:
    suite = Suite.open(_folder(tmp_path), ["blimp", "lambada"], Letters(special="b"))
    assert suite.questions[0][0].context == (1,)
    assert suite.questions[1][0].context == (1, 0)


def library(*, ends: bool) -> Tokenizer:
    """A tokenizer of the library in which "a" and "b" make one token; it opens a text and may end it."""
    backend = tokenizers.Tokenizer(BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, merges=[("a", "b")]))
    backend.add_special_tokens(["<s>", "</s>"])
    template = "<s> $A </s>" if ends else "$A"
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 3), ("</s>", 4)])
    return Tokenizer(backend)


def test_what_a_tokenizer_puts_behind_a_text_does_not_open_one(tmp_path: Path) -> None:
    suite = Suite.open(_folder(tmp_path), ["blimp"], library(ends=True))
    assert suite.questions[0][0] == Question(context=(3,), continuation=(0, 0))


@pytest.mark.parametrize(("ends", "context"), [(True, (3,)), (False, (0,))])
def test_a_token_across_the_border_is_scored(ends: bool, context: tuple[int, ...]) -> None:
    pair = Option(context="a", continuation="b")
    special = [3] if ends else []
    assert _question(pair, library(ends=ends), special, special or [0]) == Question(context=context, continuation=(2,))


def test_a_judge_names_each_task_and_the_mean(tmp_path: Path) -> None:
    suite = Suite.open(_folder(tmp_path), ["blimp", "lambada"], Letters())
    found = judge(suite)(bigrams(TABLE))
    assert found == pytest.approx({"blimp": 1 / 3, "lambada": 0.0, "mean": 1 / 6})


def test_the_mean_counts_tasks_alike_and_adds_their_errors() -> None:
    scores = [Score(name="a", n=10, value=0.5, error=0.3), Score(name="b", n=1000, value=0.1, error=0.4)]
    mean = mean_of(scores)
    assert mean.value == pytest.approx(0.3) and mean.error == pytest.approx(0.25) and mean.n == 1010


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'lambda' is unknown; did you mean lambada"):
        task_of("lambda")
    for names in ([], ["blimp", "lambada", "blimp"]):
        with pytest.raises(ValueError, match="tasks: give at least one of blimp, lambada.*, each once"):
            Suite.open(tmp_path, names, Letters())
    suite = Suite.open(_folder(tmp_path), ["blimp"], Letters())
    small = build(ModelConfig.from_pattern("-", vocab_size=3, d_model=8, mlp={"d_ff": 8}), "fp32")
    with pytest.raises(ValueError, match="the tokenizer has 4 ids, the model's embedding only 3 rows"):
        suite.scores(small)
