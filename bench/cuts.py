"""Compares ways to cut Mamba-2 heads, before any distillation: what the loss becomes by ranking, measure and repair.

python bench/cuts.py CHECKPOINT SHARDS --rows 32 --length 512 --save bench/results/cuts.jsonl

aware        heads ranked inside their group, as many from each
blind        ranked over all; the first of those that stay then share the B and C of the first group, and so on
activation   the published score, of the x slice                         output  what a head sends to the stream
plain        entries are taken                                           repaired   twins merged, norms rescaled

Scores are taken on half of the rows, losses on the other half.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from plait.compress.axis import spread
from plait.compress.dims import mamba2_rows, taking
from plait.compress.edits import edited
from plait.compress.plan import Plan, shrunk
from plait.compress.prune import prune
from plait.compress.score import Scores, score
from plait.data.loader import Loader
from plait.data.shards import Dataset
from plait.formats.checkpoint import Checkpoint
from plait.model.layers.mamba2 import Mamba2
from plait.report import Report
from plait.train.objective import mean_loss
from plait.train.pretrain import NextToken


def blind(teacher: Checkpoint, plan: Plan, scores: Scores, by: str) -> Checkpoint:
    """The plan's sizes with heads ranked over all groups."""
    tensors = dict(teacher.tensors)
    for layer, (spec, wanted) in enumerate(zip(teacher.config.layers, plan.config.layers, strict=True)):
        if isinstance(spec, Mamba2) and isinstance(wanted, Mamba2):
            order = scores.of("mamba_heads", layer, by).flatten().argsort(descending=True, stable=True)
            heads = order[: wanted.n_heads].sort().values
            rows = mamba2_rows(spec, spread(heads, spec.head_dim), torch.arange(spec.n_groups * spec.d_state), heads)
            for (name, dim), edit in taking("M", rows).items():
                full = f"blocks.{layer}.{name}"
                if full in tensors:
                    tensors[full] = edited(tensors[full], {dim: edit})
    return replace(teacher, config=plan.config, tensors=tensors)


def measure(args: argparse.Namespace) -> Report:
    """Cut to several numbers of heads in every way."""
    teacher = Checkpoint.open(args.checkpoint)
    model = teacher.model(device="cpu")
    loader = Loader({"text": Dataset.open(args.shards)}, batch_size=1, seq_len=args.length, seed=args.seed)
    objective = NextToken(loader, identity={})
    rows = [objective.batches(i)[0] for i in range(args.rows)]
    seen, held = rows[::2], rows[1::2]
    scores = score(model, seen, axes=["mamba_heads"])
    report = Report(f"cutting Mamba-2 heads of {Path(args.checkpoint).name}, nats per token")
    report.add("teacher", mean_loss(model, objective, held), "nats")
    layers = [spec for spec in teacher.config.layers if isinstance(spec, Mamba2)]
    for share in (0.75, 0.5, 0.25):
        n = max(round(layers[0].n_heads * share / layers[0].n_groups), 1) * layers[0].n_groups
        plan = shrunk(teacher.config, sizes={"M": {"n_heads": n}})
        for by in ("activation", "output"):
            ways = {
                "blind, plain": blind(teacher, plan, scores, by),
                "aware, plain": prune(teacher, plan, scores, by={"mamba_heads": by}, merge=False, rescale=False),
                "aware, repaired": prune(teacher, plan, scores, by={"mamba_heads": by}),
            }
            for name, cut in ways.items():
                loss = mean_loss(cut.model(device="cpu"), objective, held)
                report.add(f"{n} of {layers[0].n_heads} heads, {by}, {name}", loss, "nats")
    return report


def main() -> None:
    """Read the arguments, do it, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("shards", help="a folder of token shards")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="also write the report as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(args)
    print(report.table())
    if args.save:
        report.save_jsonl(args.save)


if __name__ == "__main__":
    main()
