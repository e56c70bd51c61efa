"""`plait compress`: a tiny teacher end to end, what it says before it begins, and what it refuses."""

import json
import tempfile
from pathlib import Path

import pytest
from tests.train.tiny import VOCAB, tiny_model, write_documents

from plait.cli.compress import run
from plait.cli.compressing.asked import Inputs, count_of, job_of
from plait.cli.compressing.results import Results
from plait.cli.convert import Inputs as ConvertInputs
from plait.cli.convert import run as convert
from plait.cli.launch import launch
from plait.compress.budget import BudgetError
from plait.compress.job import Job
from plait.compress.pipeline import CHOICE
from plait.compress.replace import KEEP, NONE
from plait.compress.score import Scores
from plait.config import ConfigError
from plait.config import load as read
from plait.data.writer import ShardWriter
from plait.formats.checkpoint import CheckpointError, load, save
from plait.model.hybrid import build
from plait.report import Report
from plait.text.bpe import train_bpe
from plait.train.metrics import write_whole

SETTINGS = """
keep = 2
ranking = 2
candidates = 4
baselines = ["depth"]
[lessons]
steps = 2
[scoring]
batches = 2
layer_batches = 1
[teaching]
short = 192
precision = "fp32"
validation_batches = 2
[teaching.rows]
seq_len = 24
batch_size = 4
"""
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps in the sun until the evening comes. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher, data and settings."""
    folder = tmp_path_factory.mktemp("compress")
    save(tiny_model("M-*-M-"), folder / "teacher", format="native")
    for name, n in (("train", 200), ("valid", 40)):
        write_documents(folder / "data" / name, n)
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


def asked(place: Path, *more: str, **options: object) -> Inputs:
    given = {
        "teacher": str(place / "teacher"),
        "more": more,
        "data": place / "data",
        "params": "22k",
        "device": "a10g",
        "context": "128",
        "tokens": "960",
        "settings": place / "settings.toml",
        "out": place / "out",
    }
    return Inputs(**{**given, **options})  # type: ignore[arg-type]


def test_a_teacher_and_a_budget_give_a_student_a_page_and_reasons(place: Path) -> None:
    report = run(asked(place))
    facts = {fact.name: fact.value for fact in report.facts}
    assert facts["student parameters"] <= 22_000 < facts["teacher parameters"]  # type: ignore[operator]
    assert facts["exports to native"] == "yes"
    model = load(place / "out" / "model")
    assert model.config.cost().params == facts["student parameters"]
    page = (place / "out" / "report.html").read_text()
    for words in ("What the search was worth", "The candidates", "What the teacher", "<svg"):
        assert words in page
    assert ">nan" not in page
    data = json.loads((place / "out" / "report.json").read_text())
    assert [one["name"] for one in data["models"]] == ["teacher", "student", "depth"]
    # again: everything is there, and explaining needs no more
    again = run(asked(place))
    assert [f for f in again.facts if f.name != "report"][0].value == facts["teacher parameters"]
    why = run(Inputs(teacher="explain", more=(str(place / "out"),)))
    assert "candidates" in why.table() and "kept" in why.table()
    assert read(Job, place / "out" / "job.json") == job_of(asked(place), ())


def test_a_choice_per_layer_is_explained_layer_by_layer(place: Path) -> None:
    out = place / "puzzle"
    run(asked(place, "baselines=[]", "keep=3", out=out, method="puzzle"))
    why = run(Inputs(teacher="explain", more=(str(out),)))
    assert sum(fact.name.startswith("layer ") for fact in why.facts) == 6
    assert "next best" in why.table() and "Why each layer is what it is" in (out / "report.html").read_text()
    # what is explained is the plan that was chosen, which need not be the first that was found
    results = Results.read(out)
    assert len(results.search["plans"]) > 1
    for one in results.search["plans"]:
        write_whole(results.stages["choose"] / CHOICE, json.dumps({**results.choice, "chosen": one["name"]}))
        told = Results.read(out).why
        assert told is not None and told["way"] == one["facts"]["way"]
        became = {why["layer"]: next(a["name"] for a in why["alternatives"] if a["chosen"]) for why in told["layers"]}
        assert [layer for layer, name in became.items() if name != NONE] == one["plan"]["kept"]
        changed = {str(layer) for layer, name in became.items() if name not in (KEEP, NONE)}
        assert changed == set(one["plan"]["replaced"])


def test_a_dry_run_of_a_choice_per_layer_tells_of_its_library(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = {"method": "puzzle", "dry_run": True, "out": place / "nothing", "device": "this"}
    # smaller than the smallest of the grid
    with pytest.raises(BudgetError, match="none of the"):
        run(asked(place, **{**options, "params": "8k", "method": "minipuzzle"}))  # type: ignore[arg-type]
    facts = {fact.name: fact.value for fact in run(asked(place, **{**options, "params": "8k"})).facts}  # type: ignore
    n, learn = facts["options of all layers"], facts["of them learn"]
    assert n - learn == 2 * 6 and facts["library hours"] > 0 and "of them ranked" not in facts  # type: ignore[operator]
    assert facts["hours"] == pytest.approx(sum(v for k, v in facts.items() if k.endswith(" hours")))  # type: ignore
    assert not list(tmp_path.iterdir()) and not (place / "nothing").exists()


def test_settings_of_a_file_stand_where_no_option_is_given(place: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('device = "h100"\n' + SETTINGS + "[load]\ncontext = 333\nbatch = 3\nanswer = 5\n")
    plain = {"settings": settings, "context": None, "device": None}
    job = job_of(asked(place, **plain), ())
    assert (job.device, job.load.context, job.load.batch, job.load.answer) == ("h100", 333, 3, 5)
    job = job_of(asked(place, **{**plain, "context": "2k", "batch": 1, "device": "A10G"}), ())
    assert (job.device, job.load.context, job.load.batch, job.load.answer) == ("a10g", 2048, 1, 5)
    job = job_of(asked(place, **{**plain, "settings": place / "settings.toml"}), ())
    assert (job.device, job.load.context, job.load.batch, job.load.answer) == ("this", 8192, 1, 0)


def test_a_dry_run_counts_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(place / "teacher"), "--params", "22k", "--data", str(place / "data"), "--device", "a10g"]
    words += ["--context", "128", "--tokens", "960", "--settings", str(place / "settings.toml")]
    words += ["--out", str(place / "nothing"), "--dry-run", "--json"]
    assert launch(words) == 0
    facts = {f["name"]: f["value"] for f in json.loads(capsys.readouterr().out.splitlines()[-1])["facts"]}
    assert facts["candidates"] > facts["within the budget"] > 0 and facts["student tokens"] == 960
    assert facts["hours"] > 0 and facts["short tokens"] == 3 * 192
    assert not (place / "nothing").exists()


def test_a_dry_run_of_several_sizes_tells_of_every_stage(place: Path) -> None:
    options = {"params": None, "elastic": (0.8, 0.6), "dry_run": True, "out": place / "nothing"}
    plain, both = (
        {fact.name: fact.value for fact in run(asked(place, compare=compares, **options)).facts}
        for compares in (False, True)
    )
    assert plain["elastic tokens"] == 960 and "alone tokens" not in plain and both["alone tokens"] == 2 * 960
    # 2 batches for the widths, 1 for the removal of each of 6 layers
    assert plain["score tokens"] == (2 + 6) * 96 and both["hours"] > both["elastic hours"] > 0  # type: ignore[operator]
    assert plain["0.6 parameters, at most about"] <= 0.6 * plain["whole parameters"]  # type: ignore[operator]
    assert not (place / "nothing").exists()
    with pytest.raises(BudgetError, match="none of the"):
        run(asked(place, **{**options, "elastic": (0.01,)}))


def test_layers_are_compared_as_asked(place: Path) -> None:
    out = place / "by-loss"
    run(asked(place, "scoring.layers_by=loss", "scoring.rounds=2", out=out, until="search"))
    scores = Scores.load(next(out.glob("stages/score-*/scores.safetensors")))
    loss = scores.layers["loss"]
    assert scores.order[0] == min(range(len(loss)), key=loss.__getitem__) and len(scores.order) == 2
    # a grid leaves out the layers that the loss misses least
    plan = json.loads(next(out.glob("stages/search-*/search.json")).read_text())["plans"][0]["plan"]
    kept = [i for i in plan["kept"] if scores.config.pattern[i] == "M"]
    mambas = sorted((i for i in range(6) if scores.config.pattern[i] == "M"), key=loss.__getitem__)
    assert kept == sorted(mambas[len(mambas) - len(kept) :])


def test_a_machine_that_was_measured_tells_the_time(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "Box.jsonl"
    for speed in (10.0, 20.0):
        report = Report("limits")
        for name, value in (("memory", 2.0**34), ("read, 1 thread", speed), ("GEMM 64^3 BF16, 1 thread", 50.0)):
            report.add(name, value)
        report.save_jsonl(path)
        run(asked(place, device=str(path), out=tmp_path / "out", until="profile", params=None, min_speedup=1.1))
    found = [json.loads(one.read_text()) for one in (tmp_path / "out").glob("stages/profile-*/profile.json")]
    # another content of the file is another machine: half the time at twice the bytes a second
    slow, fast = sorted((one["teacher"]["decode_s"] for one in found), reverse=True)
    assert slow == pytest.approx(2 * fast)


def test_several_sizes_of_one_training_are_cut_out_by_convert(place: Path, tmp_path: Path) -> None:
    out = place / "elastic"
    report = run(asked(place, params=None, elastic=(0.8, 0.6), compare=True, out=out))
    facts = {fact.name: fact.value for fact in report.facts}
    assert abs(facts["0.8 gap"]) < 20 and facts["0.6 parameters"] < 0.6 * facts["whole parameters"]  # type: ignore
    convert(ConvertInputs(source=out / "model", target=tmp_path / "small", to="hf", slice="0.6"))
    assert load(tmp_path / "small").config.cost().params == facts["0.6 parameters"]
    with pytest.raises(ConfigError, match=r"no size of .* did you mean '0.6'"):
        convert(ConvertInputs(source=out / "model", target=tmp_path / "other", to="hf", slice="0.66"))
    with pytest.raises(ConfigError, match="is no elastic model"):
        convert(ConvertInputs(source=place / "teacher", target=tmp_path / "other", to="hf", slice="0.6"))


def test_text_is_read_with_the_teachers_tokenizer(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"{i} " + TEXT * 3)
    tokenizer = train_bpe((TEXT,), 300)
    tokenizer.save(tmp_path / "tokenizer")
    model = tiny_model("M-*-M-")
    wide = model.config.from_dict({**model.config.to_dict(), "vocab_size": tokenizer.vocab_size})
    save(build(wide, "fp32"), tmp_path / "teacher", format="native", tokenizer=tmp_path / "tokenizer")
    more = {"teacher": str(tmp_path / "teacher"), "data": text, "params": "35k", "out": tmp_path / "out"}
    dry = run(asked(place, "ranking=1", dry_run=True, **more))
    assert any(fact.name == "tokens of text" for fact in dry.facts)
    run(asked(place, "ranking=1", "baselines=[]", until="score", **more))
    assert (tmp_path / "out" / "data" / "train" / "dataset.json").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(TEXT * 90)
    with pytest.raises(ConfigError, match="holds tokens of another text"):
        run(asked(place, "ranking=1", **{**more, "data": other}))
    # too little of it is refused before it is written as tokens
    (other / "a.txt").write_text(TEXT)
    for dry in (True, False):
        with pytest.raises(ConfigError, match=r"the text has \d+ tokens, scoring and ranking read 288"):
            run(asked(place, "ranking=1", **{**more, "data": other, "out": tmp_path / "short", "dry_run": dry}))
    assert not (tmp_path / "short").exists()
    # tokens of another vocabulary
    with ShardWriter(tmp_path / "foreign" / "train", 250, eos_id=0, vocabulary_hash="abc") as writer:
        writer.add([1, 2, 3] * 500)
    with ShardWriter(tmp_path / "foreign" / "valid", 250, eos_id=0, vocabulary_hash="abc") as writer:
        writer.add([1, 2, 3] * 50)
    with pytest.raises(ConfigError, match="another tokenizer"):
        run(asked(place, **{**more, "data": tmp_path / "foreign"}))


def test_what_cannot_work_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BudgetError, match=r"(?s)none of the .* candidates fits: params.*nearest.*params"):
        run(asked(place, params="100", out=out))
    with pytest.raises(BudgetError, match=r"(?s)no model is within params 100.*nearest.*params"):
        run(asked(place, params="100", out=out, method="puzzle"))
    with pytest.raises(
        BudgetError, match=r"(?s)decode_s in .*nearest.*decode_s .*The teacher, for comparison: decode_s"
    ):
        run(asked(place, params=None, min_speedup=900.0, out=out))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(asked(place, teacher=str(place / "data"), out=out))
    with pytest.raises(ConfigError, match=r"the text has .* tokens, scoring and ranking read"):
        run(asked(place, "scoring.batches=5000", out=out))
    with pytest.raises(ConfigError, match="would read the text of"):
        run(asked(place, tokens="10M", out=out))
    with pytest.raises(ConfigError, match="holds out no text"):
        (tmp_path / "half").mkdir()
        write_documents(tmp_path / "half" / "train", 20)
        run(asked(place, data=tmp_path / "half", out=out))
    with ShardWriter(tmp_path / "large" / "train", VOCAB + 9, eos_id=0) as writer:
        writer.add([VOCAB + 8, 1, 2])
    with ShardWriter(tmp_path / "large" / "valid", VOCAB + 9, eos_id=0) as writer:
        writer.add([1, 2, 3])
    with pytest.raises(ConfigError, match="vocabulary of 73, the teacher's embedding 64 rows"):
        run(asked(place, data=tmp_path / "large", out=out))
    with pytest.raises(ConfigError, match="which budget"):
        run(asked(place, params=None, out=out))
    with pytest.raises(ConfigError, match="cannot be trained"):
        run(asked(place, precision="int8", out=out))
    with pytest.raises(ConfigError, match="say where their data lie"):
        run(asked(place, tasks=("blimp",), out=out))
    save(load(place / "teacher", recipe="int8-32"), tmp_path / "codes", format="native")
    with pytest.raises(ConfigError, match="codes, which cannot be cut"):
        run(asked(place, teacher=str(tmp_path / "codes"), out=out))
    assert not (out / "stages").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"again": ("scores",)}, "did you mean 'score'"),
        ({"until": "nowhere"}, "is no stage"),
        ({"device": "a10"}, "did you mean a10g"),
        ({"data": None}, "which text"),
        ({"more": ("puzzle",)}, "settings are given as key=value"),
        ({"teacher": "explain", "more": ()}, "which compression"),
        ({"elastic": (1.5,)}, "give shares"),
        ({"compare": True}, "belongs to --elastic"),
    ],
)
def test_words_that_do_not_fit_are_refused_at_once(place: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(place, **options)


@pytest.mark.parametrize(("text", "n"), [("20M", 20_000_000), ("1.5b", 1_500_000_000), ("300_000", 300_000)])
def test_numbers_of_things_are_read(text: str, n: int) -> None:
    assert count_of(text, "tokens") == n
    with pytest.raises(ConfigError, match="tokens='x"):
        count_of("x" + text, "tokens")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes" / "compress").glob("*.toml")), ids=str)
def test_recipes_that_come_with_plait_are_whole(path: Path) -> None:
    job = read(Job, path, ["budget.params=1", "teaching.tokens=70000000000"])
    assert job.teaching.main_steps > 0
