"""Cuts: what stays computes as before, whatever the axis; what was planted as dead or doubled is what goes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.compress import recall, teachers
from torch import Tensor

from plait.compress.axes import AXES
from plait.compress.axis import flat, spread
from plait.compress.dims import mamba2_rows, taking
from plait.compress.edits import edited
from plait.compress.plan import Plan, shrunk, whole
from plait.compress.prune import kept_channels, prune
from plait.compress.score import Scores, score
from plait.formats.checkpoint import Checkpoint
from plait.formats.error import CheckpointError
from plait.formats.tensors import LazyTensor
from plait.model.hybrid import Hybrid, build
from plait.model.layers import mamba2
from plait.train.objective import mean_loss
from plait.train.pretrain import NextToken

Plant = Callable[[Hybrid], None]


def rows(model: Hybrid, layer: int) -> tuple[Tensor, Tensor]:
    """The weights of a Mamba-2 layer's input projection and convolution bias."""
    mixer = model.blocks[layer].mixer
    return mixer.in_proj.weight.data, mixer.conv.bias.data


def dead_heads(model: Hybrid) -> None:
    weight, bias = rows(model, 0)
    for head in (1, 5):  # one of each group
        weight[24 + 4 * head : 28 + 4 * head] = 0
        bias[4 * head : 4 * head + 4] = 0


def dead_channels(model: Hybrid) -> None:
    weight, bias = rows(model, 0)
    for head in range(6):
        weight[24 + 4 * head + 2] = 0
        bias[4 * head + 2] = 0


def dead_states(model: Hybrid) -> None:
    weight, bias = rows(model, 0)
    for state in (3, 5 + 1):  # of either group, in C
        weight[48 + 10 + state] = 0
        bias[24 + 10 + state] = 0


def dead_neurons(model: Hybrid) -> None:
    model.blocks[0].mixer.up_proj.weight.data[[0, 7, 23]] = 0


def dead_keys(model: Hybrid) -> None:
    model.blocks[0].mixer.v_proj.weight.data[6:12] = 0


def dead_queries(model: Hybrid) -> None:
    # one head of each key/value head, which nobody reads
    for head in (1, 2, 4):
        model.blocks[0].mixer.o_proj.weight.data[:, 6 * head : 6 * head + 6] = 0


def dead_experts(model: Hybrid) -> None:
    model.blocks[0].mixer.router.correction[2] = -100.0


def dead_shared(model: Hybrid) -> None:
    model.blocks[0].mixer.shared.up_proj.weight.data[[0, 8]] = 0


def dead_width(model: Hybrid) -> None:
    model.embed.weight.data[:, [3, 19]] = 0
    for name, p in model.named_parameters():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            p.data[[3, 19]] = 0
        if name.endswith("experts.down"):
            p.data[:, [3, 19]] = 0


# axis -> pattern, changed sections, how units are made dead, the sizes without them
DEAD: dict[str, tuple[str, dict[str, object], Plant, dict[str, object]]] = {
    "mamba_heads": ("M", {}, dead_heads, {"n_heads": 4}),
    "mamba_channels": ("M", {}, dead_channels, {"head_dim": 3}),
    "ssm_state": ("M", {}, dead_states, {"d_state": 4}),
    "ffn": ("-", {}, dead_neurons, {"d_ff": 21}),
    "kv_heads": ("*", {}, dead_keys, {"n_heads": 4, "n_kv_heads": 2}),
    "attention_heads": ("*", {"attention": {"sub_norm": False}}, dead_queries, {"n_heads": 3}),
    "experts": ("E", {}, dead_experts, {"n_experts": 4}),
    "shared_ffn": ("E", {}, dead_shared, {"d_shared": 7}),
    "width": ("M-*E", {}, dead_width, {"d_model": 18}),
    "width, tied": ("M-*E", {"ties_embeddings": True}, dead_width, {"d_model": 18}),
    "width, other norms": (
        "-*",
        {"mlp": {"post_norm": True, "layer_scale": 0.5}, "attention": {"pre_norm": False, "qk_norm": True}},
        dead_width,
        {"d_model": 18},
    ),
}


@pytest.mark.parametrize("case", DEAD)
@pytest.mark.parametrize("by", ["output", "activation"])
def test_dead_units_are_what_goes_and_nothing_changes(case: str, by: str, tmp_path: Path) -> None:
    pattern, changed, plant, sizes = DEAD[case]
    if case == "attention_heads" and by == "activation":
        pytest.skip("what a head says is not seen by who listens")
    model = teachers.teacher(pattern, **changed)
    with torch.no_grad():
        plant(model)
    text = teachers.batches()
    scores = score(model, text)
    d_model = sizes.get("d_model")
    plan = shrunk(model.config, d_model=d_model, sizes={} if d_model else {pattern: sizes})  # type: ignore[arg-type]
    measures = {name: by for name, axis in AXES.items() if by in axis.measures}
    small = teachers.student(prune(teachers.checkpoint(model, tmp_path), plan, scores, by=measures))
    assert small.config == plan.config
    # experts add up in float32
    bound = 1e-5 if "E" in pattern else 1e-8
    torch.testing.assert_close(teachers.logits(small, text), teachers.logits(model, text), rtol=bound, atol=bound)


def test_every_axis_that_cuts_has_dead_units_above() -> None:
    assert {name for name, axis in AXES.items() if axis.cut is not None} <= DEAD.keys()


PATTERNS: dict[str, dict[str, object]] = {
    "M-*EM": {},
    "MM": {"ties_embeddings": True, "mamba2": {"proj_bias": True}},
    "*-": {"attention": {"qkv_bias": True, "qk_norm": True, "rope": {"base": 100.0}}, "mlp": {"bias": True}},
    "E": {"moe": {"d_latent": 10, "bias": True}},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_plan_that_keeps_everything_changes_no_bit(pattern: str, tmp_path: Path) -> None:
    model = teachers.teacher(pattern, **PATTERNS[pattern])
    source = teachers.checkpoint(model, tmp_path)
    same = prune(source, whole(model.config), score(model, teachers.batches(2)))
    assert same.config == source.config
    assert same.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(same.tensors[name].read(), tensor.read()) for name, tensor in source.tensors.items())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("merge", [True, False])
def test_a_cut_on_every_axis_at_once_runs_and_has_the_parameters_of_its_config(
    pattern: str, merge: bool, tmp_path: Path
) -> None:
    model = teachers.teacher(pattern, **PATTERNS[pattern])
    sizes = {
        "M": {"n_heads": 4, "head_dim": 3, "d_state": 2},
        "*": {"n_heads": 3, "n_kv_heads": 3},
        "-": {"d_ff": 11},
        "E": {"n_experts": 3, "n_chosen": 1, "d_shared": 2},
    }
    text = teachers.batches(2)
    plan = shrunk(model.config, d_model=13, sizes=sizes)  # type: ignore[arg-type]
    small = teachers.student(
        prune(teachers.checkpoint(model, tmp_path), plan, score(model, text), merge=merge, rescale=merge)
    )
    # the router's correction is a buffer
    n = sum(t.numel() for t in small.state_dict().values())
    assert n == plan.config.cost().params
    assert bool(teachers.logits(small, text).isfinite().all())


def test_each_layer_may_have_its_own_sizes(tmp_path: Path) -> None:
    model = teachers.teacher("MM--M*")
    plan = shrunk(model.config, (0, 1, 3, 5), sizes={1: {"n_heads": 2}, 3: {"d_ff": 5}})
    small = prune(teachers.checkpoint(model, tmp_path), plan, score(model, teachers.batches(2)))
    assert [getattr(s, "n_heads", None) for s in small.config.layers] == [6, 2, None, 6]
    assert small.tensors["blocks.2.mixer.up_proj.weight"].shape == (5, 20)
    teachers.student(small)
    kept = small.save(tmp_path / "native", "native")
    assert teachers.Checkpoint.open(kept).config == plan.config
    with pytest.raises(CheckpointError, match="layers differ in size; save as native"):
        small.save(tmp_path / "hf", "hf")


def test_layers_that_go_are_gone_and_the_others_keep_their_bits(tmp_path: Path) -> None:
    model = teachers.teacher("M-*EM")
    source = teachers.checkpoint(model, tmp_path)
    small = prune(source, shrunk(model.config, (1, 4)), score(model, teachers.batches(1)))
    for name, tensor in small.tensors.items():
        theirs = name.replace("blocks.1.", "blocks.4.").replace("blocks.0.", "blocks.1.")
        assert torch.equal(tensor.read(), source.tensors[theirs].read())
    assert small.config.pattern == "-M"


def test_a_cut_that_is_alike_in_all_layers_is_exported_and_read_back(tmp_path: Path) -> None:
    model = teachers.teacher("M-*-", attention={"sub_norm": False}, mlp={"sub_norm": False, "gated": False})
    text = teachers.batches(1)
    sizes = {"M": {"n_heads": 4, "d_state": 3}, "-": {"d_ff": 9}, "*": {"n_heads": 3}}
    plan = shrunk(model.config, (0, 2, 3), d_model=14, sizes=sizes)
    small = prune(teachers.checkpoint(model, tmp_path), plan, score(model, text))
    back = Checkpoint.open(small.save(tmp_path / "hf", "hf"))
    assert back.config.layers == plan.config.layers
    assert torch.equal(teachers.logits(teachers.student(back), text), teachers.logits(teachers.student(small), text))


def masked_norm(kept: Tensor) -> Callable[..., Tensor]:
    """The gated norm over the channels that are kept, zero at the others; written anew."""

    def norm(x: Tensor, z: Tensor, w: Tensor, *, groups: int, eps: float) -> Tensor:
        u = (x * z * torch.sigmoid(z) * kept).unflatten(-1, (groups, -1))
        mean = u.square().sum(-1, keepdim=True) / kept.view(groups, -1).sum(-1, keepdim=True)
        return ((u / (mean + eps).sqrt()).flatten(-2) * w).to(z.dtype)

    return norm


def test_cut_heads_of_mamba_are_masked_heads_whose_norm_counts_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = teachers.teacher("MM", norm_eps=1e-5)
    text = teachers.batches(2)
    scores = score(model, text)
    plan = shrunk(model.config, sizes={"M": {"n_heads": 2, "head_dim": 3}})
    small = prune(teachers.checkpoint(model, tmp_path), plan, scores, merge=False, rescale=False)
    cut = teachers.logits(teachers.student(small), text)
    heads = [scores.of("mamba_heads", i).argmax(1) for i in (0, 1)]
    channels = [scores.of("mamba_channels", i).argsort(descending=True)[:3] for i in (0, 1)]
    masks = []
    for head, channel in zip(heads, channels, strict=True):
        mask = torch.zeros(6, 4, dtype=torch.float64)
        for h in flat(head[:, None], 3).tolist():
            mask[h, channel] = 1
        masks.append(masked_norm(mask.flatten()))
    order = iter(masks * len(text))
    monkeypatch.setattr(mamba2, "gated_rmsnorm", lambda *a, **k: next(order)(*a, **k))
    torch.testing.assert_close(cut, teachers.logits(model, text), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["-", "*"])
def test_cut_neurons_and_heads_are_masked_ones(pattern: str, tmp_path: Path) -> None:
    model = teachers.teacher(pattern, attention={"sub_norm": False}, mlp={"sub_norm": False})
    text = teachers.batches(2)
    scores = score(model, text)
    plan = shrunk(model.config, sizes={"-": {"d_ff": 10}, "*": {"n_heads": 3}})
    cut = teachers.logits(teachers.student(prune(teachers.checkpoint(model, tmp_path), plan, scores)), text)
    mixer = model.blocks[0].mixer
    if pattern == "-":
        gone = scores.of("ffn", 0).argsort()[:14]
        reader = mixer.down_proj
    else:
        gone = spread(flat(scores.of("attention_heads", 0).argmin(1)[:, None], 2), 6)
        reader = mixer.o_proj
    reader.weight.data[:, gone] = 0
    torch.testing.assert_close(cut, teachers.logits(model, text), rtol=1e-9, atol=1e-9)


def doubled(model: Hybrid, factor: float = 1.0) -> None:
    """Make every second head, channel, neuron and query head of layer 0 a copy of the one before, `factor` times."""
    mixer, spec = model.blocks[0].mixer, model.config.layers[0]
    match spec.symbol:
        case "M":
            inner = torch.arange(0, spec.n_heads, 2)  # type: ignore[attr-defined]
            inner = spread(inner, spec.head_dim)  # type: ignore[attr-defined]
            a = mamba2_rows(spec, inner, torch.arange(0), torch.arange(0, 8, 2))  # type: ignore[arg-type]
            b = mamba2_rows(spec, inner + spec.head_dim, torch.arange(0), torch.arange(1, 8, 2))  # type: ignore
            for label, tensors in {
                "in": (mixer.in_proj.weight,),
                "conv": (mixer.conv.weight, mixer.conv.bias),
                "heads": (mixer.A_log, mixer.D, mixer.dt_bias),
            }.items():
                for t in tensors:
                    t.data[b[label]] = t.data[a[label]]
            mixer.norm.weight.data[b["inner"]] = factor * mixer.norm.weight.data[a["inner"]]
        case "-":
            for t in (mixer.up_proj.weight, mixer.gate_proj.weight):
                t.data[1::2] = t.data[::2]
            mixer.up_proj.weight.data[1::2] *= factor
        case "*":
            q = mixer.q_proj.weight.data.view(-1, 6, 20)
            q[1::2] = q[::2]


@pytest.mark.parametrize(
    ("pattern", "axis", "sizes"),
    [
        ("M", "mamba_heads", {"n_heads": 4}),
        ("-", "ffn", {"d_ff": 12}),
        ("*", "attention_heads", {"n_heads": 3}),
    ],
)
@pytest.mark.parametrize("factor", [1.0, 0.4])
def test_twins_are_found_and_merged_without_a_trace(
    pattern: str, axis: str, sizes: dict[str, int], factor: float, tmp_path: Path
) -> None:
    model = teachers.teacher(
        pattern, mamba2={"n_heads": 8}, attention={"sub_norm": False}, mlp={"sub_norm": False}, seed=5
    )
    with torch.no_grad():
        doubled(model, factor)
    text = teachers.batches()
    scores = score(model, text)
    for by in AXES[axis].measures:
        found = scores.of(axis, 0, by).flatten()
        assert bool((found[1::2] == 0).all()) and bool((found[::2] > 0).all())
    plan = shrunk(model.config, sizes={pattern: sizes})
    small = teachers.student(prune(teachers.checkpoint(model, tmp_path), plan, scores))
    torch.testing.assert_close(teachers.logits(small, text), teachers.logits(model, text), rtol=1e-8, atol=1e-8)


def test_twin_channels_of_the_stream_and_of_heads_are_merged(tmp_path: Path) -> None:
    model = teachers.teacher("M-*", attention={"sub_norm": False})
    with torch.no_grad():
        model.embed.weight[:, 1::2] = -2 * model.embed.weight[:, ::2]
        for name, p in model.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                p[1::2] = -2 * p[::2]
        mixer = model.blocks[0].mixer
        for head in range(6):
            for at, t in ((0, mixer.in_proj.weight), (24, mixer.in_proj.weight), (0, mixer.conv.weight)):
                t[at + 4 * head + 1 : at + 4 * head + 4 : 2] = t[at + 4 * head : at + 4 * head + 3 : 2]
            mixer.conv.bias[4 * head + 1 : 4 * head + 4 : 2] = mixer.conv.bias[4 * head : 4 * head + 3 : 2]
    text = teachers.batches()
    scores = score(model, text)
    assert bool((scores.of("width")[1::2] == 0).all()) and bool((scores.of("mamba_channels", 0)[1::2] == 0).all())
    plan = shrunk(model.config, d_model=10, sizes={"M": {"head_dim": 2}})
    assert kept_channels(plan, scores) == tuple(range(0, 20, 2))
    small = teachers.student(prune(teachers.checkpoint(model, tmp_path), plan, scores))
    torch.testing.assert_close(teachers.logits(small, text), teachers.logits(model, text), rtol=1e-8, atol=1e-8)


def test_twin_experts_are_found() -> None:
    model = teachers.teacher("E")
    experts = model.blocks[0].mixer.experts
    with torch.no_grad():
        experts.up[3], experts.down[3] = experts.up[1].flip(0), experts.down[1].flip(1)
    found = score(model, teachers.batches()).of("experts", 0)[0]
    assert (found == 0).nonzero().flatten().tolist() == [3]


def test_key_value_heads_are_averaged_where_each_serves_more_queries(tmp_path: Path) -> None:
    model = teachers.teacher("*", attention={"n_kv_heads": 6, "sub_norm": False})
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        for t in (mixer.k_proj.weight, mixer.v_proj.weight):
            pairs = t.view(3, 2, 6, 20)
            pairs[:, 1] = pairs[:, 0]
    text = teachers.batches(2)
    plan = shrunk(model.config, sizes={"*": {"n_kv_heads": 3}})
    small = teachers.student(prune(teachers.checkpoint(model, tmp_path), plan, score(model, text)))
    # heads that share a key/value head already lose nothing by it
    torch.testing.assert_close(teachers.logits(small, text), teachers.logits(model, text), rtol=1e-10, atol=1e-10)


def ranked_over_all(source: Checkpoint, plan: Plan, scores: Scores, by: str = "output") -> Checkpoint:
    """The plan's heads of Mamba-2 without regard to groups."""
    tensors = dict(source.tensors)
    for layer, (spec, wanted) in enumerate(zip(source.config.layers, plan.config.layers, strict=True)):
        assert isinstance(spec, mamba2.Mamba2) and isinstance(wanted, mamba2.Mamba2)
        best = scores.of("mamba_heads", layer, by).flatten().argsort(descending=True)[: wanted.n_heads].sort().values
        state = torch.arange(spec.n_groups * spec.d_state)
        for (name, dim), edit in taking("M", mamba2_rows(spec, spread(best, spec.head_dim), state, best)).items():
            full = f"blocks.{layer}.{name}"
            if full in tensors:
                tensors[full] = edited(tensors[full], {dim: edit})
    return replace(source, config=plan.config, tensors=tensors)


def test_heads_ranked_inside_their_group_do_less_harm_than_heads_ranked_over_all(tmp_path: Path) -> None:
    # nothing passes the state by, and three of the four loud heads lie in one group: ranked over all, these four stay,
    # and the third finds itself with the B and C of the other group, which is worse than to lose it
    model = teachers.teacher("MM", mamba2={"n_heads": 8})
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.D.zero_()
            block.mixer.out_proj.weight[:, spread(torch.tensor([3, 5, 6, 7]), 4)] *= 0.05
    text = teachers.batches(4)
    scores = score(model, text)
    source, plan = teachers.checkpoint(model, tmp_path), shrunk(model.config, sizes={"M": {"n_heads": 4}})
    aware = prune(source, plan, scores, merge=False, rescale=False)
    blind = ranked_over_all(source, plan, scores)
    teaches = teachers.logits(model, text).log_softmax(-1)
    harm = []
    for cut in (aware, blind):
        learns = teachers.logits(teachers.student(cut), text).log_softmax(-1)
        harm.append(float((teaches.exp() * (teaches - learns)).sum(-1).mean()))
    assert harm[0] < 0.9 * harm[1]


@pytest.mark.slow
def test_a_trained_model_loses_less_when_heads_are_ranked_inside_their_group(tmp_path: Path) -> None:
    objective, text = object.__new__(NextToken), [recall.pairs(9_000_000 + i) for i in range(16)]
    losses: dict[tuple[str, str], list[float]] = {}
    for seed in range(3):
        model = recall.trained(seed, groups=4)
        scores, plan = score(model, text[:8]), shrunk(model.config, sizes={"M": {"n_heads": 8}})
        source = teachers.checkpoint(model, tmp_path / str(seed))
        for by in ("output", "activation"):
            aware = prune(source, plan, scores, by={"mamba_heads": by}, merge=False, rescale=False)
            for name, cut in (("aware", aware), ("blind", ranked_over_all(source, plan, scores, by))):
                loss = mean_loss(cut.model(device="cpu"), objective, text[8:])
                losses.setdefault((name, by), []).append(loss)
    means = {key: sum(values) / len(values) for key, values in losses.items()}
    assert means["aware", "output"] < 0.8 * means["blind", "output"]
    assert means["aware", "activation"] < 0.8 * means["blind", "activation"]
    # what a head sends to the stream tells more than the slice that enters it
    assert means["aware", "output"] < means["aware", "activation"]


def test_a_plan_of_one_layer_reads_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = teachers.teacher("M-*E")
    source = teachers.checkpoint(model, tmp_path)
    plan = shrunk(model.config, (1,), sizes={1: {"d_ff": 9}})
    scores = score(model, teachers.batches(1))
    read: list[tuple[int, ...]] = []
    blocks = LazyTensor.blocks

    def noted(self: LazyTensor):  # noqa: ANN202
        read.append(self.shape)
        return blocks(self)

    monkeypatch.setattr(LazyTensor, "blocks", noted)
    one = prune(source, plan, scores)
    assert not read
    one.tensors["blocks.0.mixer.down_proj.weight"].read()
    assert all(shape[-1] in (24, 9) for shape in read)


def test_a_replaced_layer_comes_from_its_file_and_shares_the_cut_of_the_width(tmp_path: Path) -> None:
    model = teachers.teacher("M-*")
    with torch.no_grad():
        dead_width(model)
    other = build(teachers.config("M"), "fp32", seed=9).double()
    with torch.no_grad():
        dead_width(other)
    tensors = {name: t for name, t in other.blocks[0].state_dict().items()}
    save_file(tensors, tmp_path / "block.safetensors")
    text = teachers.batches(2)
    scores, source = score(model, text), teachers.checkpoint(model, tmp_path)
    layers = (*model.config.layers[:1], other.config.layers[0], model.config.layers[2])
    plan = Plan(
        kept=(0, 1, 2), config=replace(model.config, layers=layers), replaced={1: tmp_path / "block.safetensors"}
    )
    full = teachers.student(prune(source, plan, scores))
    narrow = replace(plan, config=replace(plan.config, d_model=18))
    small = teachers.student(prune(source, narrow, scores))
    assert full.config.pattern == "MM*"
    torch.testing.assert_close(teachers.logits(small, text), teachers.logits(full, text), rtol=1e-8, atol=1e-8)
    wrong = replace(plan, config=replace(plan.config, layers=(*layers[:1], replace(layers[1], d_state=4), layers[2])))
    with pytest.raises(ValueError, match=r"blocks\.1\.mixer\.in_proj\.weight has shape"):
        prune(source, wrong, scores)


def test_codes_and_units_that_were_not_scored_are_refused(tmp_path: Path) -> None:
    model = teachers.teacher("M-")
    source = teachers.checkpoint(model, tmp_path)
    scores = score(model, teachers.batches(1), axes=["ffn"])
    plan = shrunk(model.config, sizes={"M": {"n_heads": 4}})
    with pytest.raises(ValueError, match="axis 'mamba_heads' of layer 0 was not scored; scored: ffn"):
        prune(source, plan, scores)
    codes = teachers.checkpoint(build(teachers.config("-", d_model=128), "fp32"), tmp_path / "wide").quantized("int8")
    with pytest.raises(ValueError, match="its weights are int8 codes; cut what they were made from"):
        prune(codes, whole(codes.config), scores)


def test_scores_of_another_model_and_measures_that_there_are_not_are_refused(tmp_path: Path) -> None:
    model, text = teachers.teacher("M-"), teachers.batches(1)
    source, scores = teachers.checkpoint(model, tmp_path), score(model, text)
    other = score(teachers.teacher("M-", mlp={"d_ff": 26}), text)
    plan = shrunk(model.config, sizes={"-": {"d_ff": 9}})
    with pytest.raises(ValueError, match=r"the scores are of M-, d_model=20, and not of .*, in its sizes; score it"):
        prune(source, plan, other)
    with pytest.raises(ValueError, match="axis 'neurons' is unknown; known: depth, width, ffn"):
        prune(source, plan, scores, by={"neurons": "activation"})
    with pytest.raises(ValueError, match="axis 'ffn' was not scored by 'size'; its measures: output, activation"):
        prune(source, plan, scores, by={"ffn": "size"})
