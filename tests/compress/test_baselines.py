"""Baselines fit the budget, and one step less would not; what they cut by is not what the search knows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.compress.teachers import batches, checkpoint, logits, student, teacher

from plait.compress import baselines
from plait.compress.baselines import Baseline
from plait.compress.budget import Budget, BudgetError
from plait.compress.costs import Costs, Load
from plait.compress.magnitude import chances, magnitudes
from plait.compress.plan import whole
from plait.compress.prune import prune
from plait.compress.roofline import Roofline
from plait.compress.score import Scores, score
from plait.formats.checkpoint import Checkpoint
from plait.model.plan import MACHINES

MODEL = teacher("M-*EM-")
CONFIG = MODEL.config
COSTS = Costs(load=Load(context=256), clock=Roofline(machine=MACHINES["h100"]))
TOTAL = COSTS.total(CONFIG)
IMPORTANCE = (3.0, 1.0, 5.0, 2.0, 4.0, 0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Scores]:
    scores = replace(score(MODEL, batches()), layers={"mse": IMPORTANCE})
    return checkpoint(MODEL, tmp_path_factory.mktemp("baselines")), scores


def budget_of(memory: float) -> Budget:
    return Budget(total_bytes=TOTAL.total_bytes * memory, min_speedup=1.05).against(TOTAL)


def every(source: Checkpoint, scores: Scores, budget: Budget) -> list[Baseline]:
    return [
        baselines.depth(CONFIG, scores, budget, COSTS),
        baselines.width(CONFIG, budget, COSTS),
        baselines.magnitude(source, scores, budget, COSTS),
        baselines.random(CONFIG, scores, budget, COSTS, seed=3),
    ]


@pytest.mark.parametrize("memory", [0.85, 0.6])
def test_every_baseline_fits_and_can_be_cut_and_run(made: tuple[Checkpoint, Scores], memory: float) -> None:
    source, scores = made
    budget = budget_of(memory)
    for one in every(source, scores, budget):
        assert budget.verdict(one.plan.config, COSTS).ok, one.name
        assert one.plan.config != CONFIG
        published = {"merge": False, "rescale": False} if one.as_published else {}
        cut = prune(source, one.plan, one.scores or scores, **published)
        model = student(cut)
        assert model.config == one.plan.config and bool(logits(model, batches(1)).isfinite().all())


def test_depth_lets_the_fewest_least_important_layers_go(made: tuple[Checkpoint, Scores]) -> None:
    _, scores = made
    order = [5, 1, 3, 0, 4, 2]
    for gone in range(1, 6):
        # exactly what fits, to the byte
        kept = tuple(sorted(order[gone:]))
        alone = replace(CONFIG, layers=tuple(CONFIG.layers[i] for i in kept))
        budget = Budget(total_bytes=COSTS.total(alone).total_bytes)
        assert baselines.depth(CONFIG, scores, budget, COSTS).plan.kept == kept
    first = baselines.depth(CONFIG, replace(scores, order=(2, 0)), Budget(params=TOTAL.params - 1), COSTS)
    assert first.plan.kept == (0, 1, 3, 4, 5)


def test_width_keeps_all_layers_and_is_the_widest_that_fits(made: tuple[Checkpoint, Scores]) -> None:
    budget = budget_of(0.7)
    plan = baselines.width(CONFIG, budget, COSTS).plan
    assert plan.kept == tuple(range(6)) and plan.config.d_model < 20
    wider = [baselines._scaled(CONFIG, plan.kept, 1 - step / 64).config for step in range(64)]
    at = next(i for i, config in enumerate(wider) if config == plan.config)
    assert not any(budget.verdict(config, COSTS).ok for config in wider[:at])


def test_random_is_the_same_for_a_seed_and_another_for_another(made: tuple[Checkpoint, Scores]) -> None:
    _, scores = made
    one, two, other = (baselines.random(CONFIG, scores, budget_of(0.7), COSTS, seed=seed) for seed in (1, 1, 2))
    assert one.plan == two.plan and one.plan != other.plan
    assert one.scores and two.scores and one.scores.layers == two.scores.layers


def test_a_budget_that_keeps_the_teacher_keeps_it(made: tuple[Checkpoint, Scores]) -> None:
    source, scores = made
    budget = Budget(params=TOTAL.params)
    for one in every(source, scores, budget)[:3]:
        assert one.plan == whole(CONFIG)


def test_a_budget_that_nothing_fits_names_the_baseline(made: tuple[Checkpoint, Scores]) -> None:
    source, scores = made
    for name in ("depth", "width"):
        with pytest.raises(BudgetError, match=f"baseline {name}: even its smallest"):
            {"depth": lambda: baselines.depth(CONFIG, scores, Budget(params=9), COSTS)}.get(
                name, lambda: baselines.width(CONFIG, Budget(params=9), COSTS)
            )()
    with pytest.raises(BudgetError, match="random models"):
        baselines.random(CONFIG, scores, Budget(params=9), COSTS, seed=0)


def test_magnitudes_are_roots_of_sums_of_squares_of_a_units_own_weights(made: tuple[Checkpoint, Scores]) -> None:
    source, scores = made
    found = magnitudes(source.tensors, CONFIG, scores)
    assert found.units.keys() == scores.units.keys()
    for key, units in found.units.items():
        for name, importance in units.importance.items():
            assert importance.shape == scores.units[key].importance[name].shape and bool((importance > 0).all())
    mixer = MODEL.blocks[1].mixer
    weights = (mixer.up_proj.weight, mixer.gate_proj.weight, mixer.down_proj.weight.T, mixer.sub_norm.weight[:, None])
    wanted = torch.stack([w.square().sum(1) for w in weights]).sum(0).sqrt()
    assert torch.allclose(found.of("ffn", 1), wanted)
    mixer = MODEL.blocks[0].mixer
    z, x = mixer.in_proj.weight[:24], mixer.in_proj.weight[24:48]
    each = z.square().sum(1) + x.square().sum(1) + mixer.out_proj.weight.square().sum(0) + mixer.norm.weight.square()
    assert torch.allclose(found.of("mamba_heads", 0), each.view(2, 3, 4).sum(-1).sqrt())
    assert torch.allclose(found.of("mamba_channels", 0), each.view(6, 4).sum(0).sqrt())
    states = mixer.in_proj.weight[48:68].square().sum(1).view(2, 2, 5).sum(0).sqrt()
    assert torch.allclose(found.of("ssm_state", 0), states)
    # doubling what one head alone has doubles its magnitude, and no other's
    loud = teacher("M-*EM-")
    with torch.no_grad():
        mamba, head = loud.blocks[0].mixer, slice(8, 12)
        mamba.out_proj.weight[:, head] *= 2
        mamba.norm.weight[head] *= 2
        mamba.in_proj.weight[head] *= 2
        mamba.in_proj.weight[24 + 8 : 24 + 12] *= 2
    tensors = checkpoint_tensors(loud)
    ratio = magnitudes(tensors, CONFIG, scores).of("mamba_heads", 0) / found.of("mamba_heads", 0)
    assert torch.allclose(ratio, torch.tensor([[1.0, 1, 2], [1, 1, 1]]).double())
    assert len(found.layers["magnitude"]) == 6 and min(found.layers["magnitude"]) > 0


def checkpoint_tensors(model):  # noqa: ANN001, ANN201
    from plait.formats.tensors import LazyTensor

    return {name: LazyTensor.of(t) for name, t in model.state_dict().items()}


def test_chances_depend_on_the_seed_alone(made: tuple[Checkpoint, Scores], tmp_path: Path) -> None:
    _, scores = made
    one, two, other = chances(scores, 0), chances(scores, 0), chances(scores, 1)
    assert torch.equal(one.of("ffn", 1), two.of("ffn", 1)) and not torch.equal(one.of("ffn", 1), other.of("ffn", 1))
    one.save(tmp_path / "chances")
    assert torch.equal(Scores.load(tmp_path / "chances").of("ffn", 1), one.of("ffn", 1))
