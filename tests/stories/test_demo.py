"""The whole demo in miniature, on a small folder of real code: every chapter, and the page that it ends with."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import plait
from plait.cli.chapters.story import OURS
from plait.cli.demo import MARK
from plait.cli.launch import launch

SOURCE = Path(plait.__file__).parent / "ops"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("story") / "demo"
    assert launch(["demo", "--quick", "--text", str(SOURCE), "--out", str(out)]) == 0
    return out


def test_the_page_is_whole_and_every_chart_is_there(told: Path) -> None:
    html = (told / "report.html").read_text()
    tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "link", "line", "circle", "polyline"):
                tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "circle", "polyline"):
                assert tags.pop() == tag

    Balance().feed(html)
    assert not tags
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 9 and all("polyline" in chart for chart in charts[:8])
    assert ["Transformer" in chart for chart in charts] == [True] * 4 + [False] * 5
    titles = ("Loss while training", "The last half", "Decoding speed", "Cache of one sequence")
    titles += ("Loss against size", "Becoming ternary", "Loss against memory", "Loss against the time of a step")
    assert all(title in html for title in titles)
    assert html.count("<section") == 8 and html.count('class="passage"') >= 1


def test_the_page_needs_no_network_and_shows_no_accident(told: Path) -> None:
    html = (told / "report.html").read_text()
    assert not re.search(r"https?:|<script|url\(", html)
    shown = re.sub(r"<pre.*?</pre>|<style.*?</style>", "", html, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|None)\b", shown)


def test_the_twins_are_of_one_size_and_the_facts_are_kept(told: Path) -> None:
    report = json.loads((told / "report.json").read_text())
    facts = {fact["name"]: fact["value"] for fact in report["facts"]}
    assert facts["Transformer parameters"] == pytest.approx(facts["hybrid parameters"], rel=0.01)
    assert facts["tensors that differ after reading back"] == 0
    assert facts["hybrid validation loss"] < 7 and facts["Transformer validation loss"] < 7
    longest = [facts[f"{name} cache at 1024 tokens"] for name in ("hybrid", "Transformer")]
    assert longest[0] < longest[1]
    if "largest logit difference to transformers" in facts:
        assert facts["largest logit difference to transformers"] < 1e-4
    assert report["provenance"]["seed"] == 0 and len(report["curves"]["hybrid"]["training"]) == facts["training steps"]


def test_both_models_made_the_same_steps(told: Path) -> None:
    lines = {name: (told / name / "metrics.jsonl").read_text().splitlines() for name in ("hybrid", "transformer")}
    tokens = {name: [json.loads(line)["tokens"] for line in found] for name, found in lines.items()}
    assert tokens["hybrid"] == tokens["transformer"]


def test_nothing_else_is_written(told: Path) -> None:
    assert {path.name for path in told.iterdir()} == {MARK, *OURS}
    assert not [path for path in told.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_what_was_exported_loads_and_answers(told: Path) -> None:
    model = plait.load(told / "hybrid-hf", device="cpu")
    (completion,) = plait.Engine(model).generate(
        "def f(", plait.Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    )
    assert len(completion.token_ids) == 4


def test_the_compressed_form_keeps_to_its_budget_and_answers(told: Path) -> None:
    facts = {fact["name"]: fact["value"] for fact in json.loads((told / "report.json").read_text())["facts"]}
    assert facts["hybrid compressed, bytes over the whole"] <= 0.67
    model = plait.load(told / "hybrid-compressed" / "model", device="cpu")
    (completion,) = plait.Engine(model).generate(
        "def f(", plait.Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    )
    assert len(completion.token_ids) == 4


def test_fewer_bits_are_smaller_and_the_ternary_form_loads_and_answers(told: Path) -> None:
    facts = {fact["name"]: fact["value"] for fact in json.loads((told / "report.json").read_text())["facts"]}
    plain = "BF16" if "hybrid in BF16" in facts else "FP32"
    sizes = [facts[f"hybrid in {name}"] for name in (plain, "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True) and facts["hybrid in ternary"] < sizes[0]
    bits = [facts[f"hybrid in {name}, bits of a weight"] for name in ("int8", "int4")]
    assert bits == [pytest.approx(8.25, abs=0.01), pytest.approx(4.25, abs=0.01)]
    # an untrained miniature loses next to nothing by rounding
    losses = [facts[f"hybrid in {name}, validation loss"] for name in (plain, "int8", "int4")]
    assert losses[0] == pytest.approx(facts["hybrid validation loss"], rel=1e-2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[2] == pytest.approx(losses[0], rel=5e-2)
    model = plait.load(told / "hybrid-ternary", device="cpu")
    assert model.recipe.name == "ternary"
    (completion,) = plait.Engine(model).generate(
        "def f(", plait.Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    )
    assert len(completion.token_ids) == 4


def test_an_interrupted_story_leaves_a_page_of_what_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plait.cli.chapters import CHAPTERS

    def interrupted(story: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(CHAPTERS, "compare", interrupted)
    out = tmp_path / "demo"
    assert launch(["demo", "--quick", "--text", str(SOURCE), "--out", str(out)]) == 130
    html = (out / "report.html").read_text()
    assert "Stopped early" in html and html.count("<section") == 2 and html.rstrip().endswith("</html>")
