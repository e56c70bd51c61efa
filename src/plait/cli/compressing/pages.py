"""What a compression says in the end: facts for the terminal and for other programs, and a page with charts."""

from pathlib import Path

from plait.cli.compressing import figures
from plait.cli.compressing.explained import layers_table
from plait.cli.compressing.figures import machine
from plait.cli.compressing.results import Data, Results, config_of
from plait.cli.drawing import count, size
from plait.cli.page.blocks import Block, Commands, Patterns, Prose, Section, Table
from plait.cli.page.render import page, write_json, write_whole
from plait.cli.plan import THIS
from plait.compress.explain import shown
from plait.report import Report, Value, provenance
from plait.train.metrics import clock

LEGEND = (("M", "Mamba-2"), ("*", "attention"), ("-", "feed-forward"), ("E", "experts"))
LIMITS = {
    "params": "parameters",
    "weight_bytes": "weights",
    "total_bytes": "memory",
    "prefill_s": "prefill",
    "decode_s": "a decode step",
}
UNITS = {"total_bytes": "bytes", "weight_bytes": "bytes", "prefill_s": "s", "decode_s": "s"}


def write(results: Results, out: Path) -> Report:
    """Write report.json and report.html; returns the facts."""
    report = report_of(results)
    write_json(out / "report.json", report, models=_plain(results.models), search=_plain(results.search["facts"]))
    title = f"{results.teacher}, compressed"
    student, teacher = results.model("student"), results.model("teacher")
    share = student["costs"]["params"] / teacher["costs"]["params"]
    given = report.provenance
    subtitle = (
        f"{count(student['costs']['params'])} parameters instead of {count(teacher['costs']['params'])} ({share:.0%}), "
        f"{count(results.job.teaching.tokens)} tokens of distillation; {given['device']}, {str(given['time'])[:10]}."
    )
    sections = [
        Section(name="models", title="What it costs and what it is worth", blocks=models(results)),
        Section(name="search", title="What the search was worth", blocks=figures.search(results)),
        Section(name="candidates", title="The candidates", blocks=_candidates(results)),
        Section(name="learning", title="Distillation", blocks=figures.learning(results)),
    ]
    important = figures.importance(results)
    if important:
        sections.append(Section(name="importance", title="What the teacher's parts are worth", blocks=important))
    if results.why is not None:
        why = layers_table(results.why)
        sections.append(Section(name="why", title="Why each layer is what it is", blocks=why))
    sections.append(Section(name="further", title="Further", blocks=_further(results)))
    write_whole(out / "report.html", page(title, subtitle, _opening(results), sections, given))
    return report


def report_of(results: Results) -> Report:
    """The facts: of each model what it costs and what it is worth; of the student, over the teacher."""
    given: dict[str, Value] = provenance(results.job.seed)
    report = Report(f"plait compress: {results.out / 'model'}", provenance=given)
    for model in results.models:
        name, costs = model["name"], model["costs"]
        report.add(f"{name} parameters", costs["params"])
        report.add(f"{name} bytes under the load", costs["total_bytes"], "bytes")
        if model["measured"]:
            report.add(f"{name} prefill, measured", model["measured"]["prefill_s"], "s")
            report.add(f"{name} decode step, measured", model["measured"]["decode_s"], "s")
        if _known(costs["decode_s"]):
            report.add(f"{name} decode step, predicted", costs["decode_s"], "s")
        report.add(f"{name} validation loss", model["validation_loss"], "nats/token")
        report.add(f"{name} agreement", model["agreement"])
        for task, score in model["scores"].items():
            report.add(f"{name} {task}", score)
    for what, value in ratios(results, "student").items():
        report.add(f"student {what} / teacher", value)
    best = min((m for m in results.models[1:]), key=lambda m: m["validation_loss"])
    report.add("lowest loss", best["name"])
    for name, why in results.exports().items():
        report.add(f"exports to {name}", "yes" if not why else why)
    for stage, seconds in results.seconds.items():
        report.add(f"{stage} took", seconds, "s")
    return report


def ratios(results: Results, name: str) -> dict[str, float]:
    """A model over the teacher: bytes, parameters, speeds (larger is faster), loss, mean score."""
    one, teacher = results.model(name), results.model("teacher")
    found = {what: one["costs"][field] / teacher["costs"][field] for what, field in _SHARES.items()}
    if _known(one["costs"]["decode_s"]):
        found["predicted speed of decode"] = teacher["costs"]["decode_s"] / one["costs"]["decode_s"]
    if one["measured"] and teacher["measured"]:
        for what, field in (("speed of prefill", "prefill_s"), ("speed of decode", "decode_s")):
            found[what] = teacher["measured"][field] / one["measured"][field]
    found["validation loss"] = one["validation_loss"] / teacher["validation_loss"]
    if teacher["scores"].get("mean"):
        found["mean score"] = one["scores"]["mean"] / teacher["scores"]["mean"]
    return found


_SHARES = {"parameters": "params", "bytes": "total_bytes"}


def _opening(results: Results) -> list[Block]:
    found, job = ratios(results, "student"), results.job
    ceilings = results.profile["ceilings"]
    limits = ", ".join(f"{LIMITS[name]} {shown(at, UNITS.get(name, ''))}" for name, at in ceilings.items())
    clock_of = "" if not any(name.endswith("_s") for name in ceilings) else f" on {machine(job.device)}"
    words = [
        f"Asked for: at most {limits}{clock_of}, under {job.load.batch} sequence{'s' * (job.load.batch > 1)} of "
        f"{job.load.context:,} tokens, weights in {job.numbers.weights}.",
        f"The student has {found['bytes']:.0%} of the teacher's bytes there and {found['validation loss']:.3f} times "
        "its loss on held-out text.",
    ]
    if "speed of decode" in found:
        words.append(_speed(results, found))
    if "mean score" in found:
        words.append(f"It keeps {found['mean score']:.0%} of the teacher's mean score above chance.")
    better = [
        m["name"] for m in results.models[2:] if m["validation_loss"] < results.model("student")["validation_loss"]
    ]
    if better and job.full:
        words.append(f"On the same tokens {', '.join(better)} came out better: the search was worth nothing here.")
    rows = [(name, results.model(name)["pattern"], _sizes(results.model(name))) for name in ("teacher", "student")]
    letters = {letter for _, pattern, _ in rows for letter in pattern}
    legend = tuple((letter, words) for letter, words in LEGEND if letter in letters)
    return [Prose(text=" ".join(words)), Patterns(models=tuple(rows), legend=legend)]


def _speed(results: Results, found: dict[str, float]) -> str:
    """How fast the student writes: measured, beside what was predicted and asked for."""
    job, measured = results.job, found["speed of decode"]
    here = f"It writes {measured:.2f} times as fast, measured here"
    if "predicted speed of decode" not in found:
        return f"{here}."
    told = f"{here}; {found['predicted speed of decode']:.2f} times were predicted for {machine(job.device)}"
    asked = job.budget.min_speedup
    if job.device == THIS and asked is not None and measured < asked:
        return f"{told} and {asked:g} asked for: what was measured is too slow for the budget."
    return f"{told}."


def models(results: Results) -> tuple[Block, ...]:
    tasks = list(results.models[0]["scores"])
    head = ["", "parameters", "bytes", "prefill", "decode step", "faster", "predicted", "loss", "agreement", *tasks]
    rows = tuple(_row(results, model, tasks) for model in results.models)
    load = results.verified["measured_load"]
    asked = results.verified["load"]
    if load is None:
        note = "speeds predicted"
    else:
        short = "" if load == asked else f", asked for at {asked['context']:,}: too long for this machine"
        note = f"speeds measured in turns at {load['context']:,} tokens of context, {load['batch']} at once{short}"
    full = "as many tokens as the student" if results.job.full else "the short distillation only"
    caption = (
        "Bytes are weights, keys, values and states under the load. Predicted: a decode step on "
        f"{machine(results.job.device)} at {asked['context']:,} tokens. Agreement: how often the likeliest next token "
        f"is the teacher's. Baselines had {full}."
    )
    return (Table(caption=caption, head=tuple(head), rows=rows, note=note), *figures.models(results))


def _row(results: Results, model: Data, tasks: list[str]) -> tuple[str, ...]:
    costs, measured = model["costs"], model["measured"]
    times = measured or costs
    teacher = results.models[0]["measured"] or results.models[0]["costs"]
    return (
        model["name"],
        count(costs["params"]),
        size(costs["total_bytes"]),
        _s(times["prefill_s"]),
        _s(times["decode_s"]),
        f"{teacher['decode_s'] / times['decode_s']:.2f}" if _known(times["decode_s"]) else "",
        _s(costs["decode_s"]),
        f"{model['validation_loss']:.4f}",
        f"{model['agreement']:.1%}",
        *(f"{model['scores'][task]:.3f}" for task in tasks),
    )


def _candidates(results: Results) -> tuple[Block, ...]:
    facts, plans = results.search["facts"], results.search["plans"]
    blocks: list[Block] = []
    if "cells" in facts:
        reasons = ", ".join(f"{n:,} for {LIMITS.get(limit, limit)}" for limit, n in facts["reasons"].items())
        blocks.append(
            Prose(
                text=f"{facts['cells']:,} combinations of layers and widths were counted; beyond the budget were "
                f"{reasons or 'none'}. {facts['smaller']:,} fit, but so does one with more; {len(facts['ranked'])} "
                "were ranked by how often they predict the next token, and the teacher's, before any training."
            )
        )
    losses = results.shorts
    order = sorted(losses, key=lambda name: losses[name])
    rows = []
    for one in [*plans, *results.search["baselines"]]:
        name, told = one["name"], one["facts"]
        rows.append(
            (
                f"{name}{' (chosen)' if name == results.choice['chosen'] else ''}",
                _pattern(one),
                count(told["costs"]["params"]),
                size(told["costs"]["total_bytes"]),
                f"{told['agreement']:.1%}" if "agreement" in told else told.get("way", ""),
                f"{losses[name]:.4f}",
                str(order.index(name) + 1),
            )
        )
    before = "chosen" if results.job.method == "puzzle" else "agreement before"
    head = ("", "layers", "parameters", "bytes", before, "loss after the short distillation", "rank then")
    caption = "Candidates in the order of the search, and baselines, after the same short distillation."
    return (*blocks, Table(caption=caption, head=head, rows=tuple(rows)), *figures.candidates(results))


def _further(results: Results) -> tuple[Block, ...]:
    out = results.out.as_posix()
    rows = tuple((name, clock(seconds)) for name, seconds in results.seconds.items())
    exports = results.exports()
    said = [f"{name}: {'yes' if not why else why}" for name, why in exports.items()]
    lines = (
        (f'plait generate {out}/model "Once"', "Let the student write"),
        (f"plait compress explain {out}", "Why it is what it is"),
        (f"plait convert {out}/model student-hf --to hf", "In the format of Hugging Face"),
    )
    table = Table(caption="Stages and the time they took.", head=("", "time"), rows=rows, folded=True)
    return (Prose(text="Formats that can hold it: " + "; ".join(said) + "."), Commands(lines=lines), table)


def _sizes(model: Data) -> str:
    return f"{count(model['costs']['params'])} parameters, width {config_of(model).d_model}"


def _pattern(one: Data) -> str:
    config = one["plan"]["config"]
    return config["pattern"] if "pattern" in config else "".join(layer["kind"] for layer in config["layers"])


def _known(seconds: float | None) -> bool:
    return seconds is not None and seconds == seconds


def _s(seconds: float | None) -> str:
    if not _known(seconds):
        return "unknown"
    assert seconds is not None
    return shown(float(f"{seconds:.3g}"), "s")


def _plain(data: object) -> object:
    """JSON without infinities and nan, which it does not have."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None if data != data else str(data)
    return data
