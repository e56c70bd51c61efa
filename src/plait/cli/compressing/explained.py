"""`plait compress explain`: for every layer what it became, what else it could have been, and why."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from plait.cli.compressing.results import Data, Results
from plait.cli.drawing import Drawn, count, render, size
from plait.cli.page.blocks import Block, Prose, Table
from plait.compress.explain import shown

# how layers are compared
MEANS = {"mse": "MSE of the logits", "input": "MSE of the head's input", "loss": "what the loss rises by"}
UNITS = {"total_bytes": "bytes", "weight_bytes": "bytes", "prefill_s": "s", "decode_s": "s"}


def explain(out: Path) -> Drawn:
    """The explanation of a compression that has ended.

    Raises: ConfigError for a folder that holds none.
    """
    results = Results.read(out)
    facts = results.search["facts"]
    why_so = results.why
    lines = _grid(results, facts) if why_so is None else _puzzle(why_so)
    report = Drawn(f"why {out.name} is what it is")
    report.add("method", results.job.method)
    report.add("chosen", results.choice["chosen"])
    for name, loss in results.choice["losses"].items():
        report.add(f"validation loss of {name} after the short distillation", loss, "nats/token")
    for limit, at in results.profile["ceilings"].items():
        report.add(f"at most {limit}", at, UNITS.get(limit, ""))
        report.add(f"student's {limit}", results.model("student")["costs"][limit], UNITS.get(limit, ""))
    if why_so is not None:
        for why in why_so["layers"]:
            report.add(f"layer {why['layer']} {why['kind']}", why["why"])
    report.drawing = render("\n".join(lines))
    return report


def layers_table(facts: Mapping[str, Data]) -> tuple[Block, ...]:
    """For the page: a row per layer, and its alternatives in a table that opens."""
    limits = [str(limit["text"]) for limit in _list(facts["limits"])]
    blocks: list[Block] = [Prose(text=f"Chosen {facts['way']}. {'; '.join(limits)}.")]
    layers = _list(facts["layers"])
    rows = tuple(_row(why) for why in layers)
    head = ("layer", "became", "loses", "next best", "would lose", "dearer in all")
    caption = (
        "Scores are nats per token. Dearer in all: at the prices of the limits; less than nothing where whole options "
        "do not fill the budget as well."
    )
    blocks.append(Table(caption=caption, head=head, rows=rows))
    every = tuple(
        (f"{why['layer']} {why['kind']}", a["name"], f"{a['score']:.4g}", f"{a['price']:.4g}", *_uses(a))
        for why in layers
        for a in why["alternatives"]
    )
    names = tuple(_chosen(layers[0])["uses"]) if layers else ()
    head = ("layer", "option", "loses", "price", *names)
    blocks.append(Table(caption=f"All {len(every)} options.", head=head, rows=every, folded=True))
    return tuple(blocks)


def _row(why: Data) -> tuple[str, ...]:
    chosen = _chosen(why)
    first = (
        f"{why['layer']} {why['kind']}".replace(" ", "\N{NO-BREAK SPACE}"),
        chosen["name"],
        f"{chosen['score']:.3g}",
    )
    others = [a for a in why["alternatives"] if not a["chosen"]]
    if not others:
        return (*first, "", "", "")
    return (*first, others[0]["name"], f"{others[0]['score']:.3g}", f"{others[0]['price'] - chosen['price']:.3g}")


def _puzzle(facts: Data) -> list[str]:
    lines = [f"chosen {facts['way']}: {facts['score']:.4g} nats a token are expected to be lost before any training"]
    if facts["base"]:
        lines.append(f"  {facts['base']:.4g} of them by the narrower model")
    lines += [f"  {limit['text']}" for limit in facts["limits"]]
    for why in facts["layers"]:
        lines.append(f"layer {why['layer']:3} {why['kind']:9} {why['why']}")
        for a in why["alternatives"]:
            mark = ">" if a["chosen"] else " "
            lines.append(f"   {mark} {a['name']:<16} loses {a['score']:<10.4g} {'  '.join(_uses(a))}")
    return lines


def _grid(results: Results, facts: Data) -> list[str]:
    """MiniPuzzle chooses whole models: what was counted, what was ranked, and how the choice went."""
    lines = [f"{facts['cells']:,} candidates: the product of layer counts and widths"]
    lines += [f"  {n:,} go beyond {limit}" for limit, n in facts["reasons"].items()]
    lines.append(f"  {facts['smaller']:,} fit, but one with more fits too; {facts['fitting']:,} are left")
    lines.append(
        f"{len(facts['ranked']):,} ranked by next-token accuracy and agreement with the teacher on calibration text, "
        "before any training:"
    )
    chosen = results.choice["chosen"]
    for i, one in enumerate(facts["ranked"]):
        name = str(i)
        after = (
            f"  validation {results.shorts[name]:.4f} after the short distillation" if name in results.shorts else ""
        )
        mark = ">" if name == chosen else " "
        costs = one["costs"]
        lines.append(
            f" {mark} {i:2} {one['pattern']:<20} {count(costs['params']):>9} {size(costs['total_bytes']):>10}  "
            f"accuracy {one['accuracy']:.1%}  agreement {one['agreement']:.1%}  loss {one['loss']:.4f}{after}"
        )
    measure = results.job.scoring.layers_by
    importance = results.scores().layers[measure]
    kept = next(one for one in results.search["plans"] if one["name"] == chosen)["plan"]["kept"]
    pattern = results.model("teacher")["pattern"]
    lines.append(f"layers of the teacher by importance ({MEANS[measure]} without it):")
    for i, value in enumerate(importance):
        lines.append(f"  {i:3} {pattern[i]}  {value:.3g}  {'kept' if i in kept else 'goes'}")
    return lines


def _chosen(why: Data) -> Data:
    return next(a for a in why["alternatives"] if a["chosen"])


def _uses(option: Data) -> tuple[str, ...]:
    return tuple(shown(use, UNITS.get(name, "")) for name, use in option["uses"].items())


def _list(data: object) -> Sequence[Data]:
    assert isinstance(data, Sequence)
    return data
