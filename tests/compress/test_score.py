"""Scores: sums equal their formulae, a pass that was killed ends with the same bits, and the model is left alone."""

from pathlib import Path

import pytest
import torch
from tests.compress import teachers

from plait.compress.axes import AXES
from plait.compress.score import Scores, score
from plait.model.hybrid import Hybrid
from plait.ops.conv import causal_conv1d
from plait.ops.ssd import ssd


def inputs_of(model: Hybrid, module: torch.nn.Module, text: list[teachers.Batch]) -> torch.Tensor:
    """What a module is given, over all batches, one row per token."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    teachers.logits(model, text)
    handle.remove()
    return torch.cat(seen)


def test_neurons_and_heads_are_worth_what_the_stream_gets_from_them() -> None:
    model, text = teachers.teacher("M-*"), teachers.batches(3)
    scores = score(model, text)
    for layer, axis, reader, size in (
        (0, "mamba_heads", "out_proj", 4),
        (1, "ffn", "down_proj", 1),
        (2, "attention_heads", "o_proj", 6),
    ):
        linear = getattr(model.blocks[layer].mixer, reader)
        a = inputs_of(model, linear, text).unflatten(-1, (-1, size))
        sent = torch.einsum("tup,dup->tud", a, linear.weight.detach().unflatten(1, (-1, size)))
        wanted = sent.square().sum(-1).mean(0).sqrt()
        # the taps add in float32 where the model does not ask for more; here all is float64
        torch.testing.assert_close(scores.of(axis, layer).flatten(), wanted, rtol=1e-10, atol=0)
    assert scores.of("kv_heads", 2).shape == (3,) and scores.of("mamba_heads", 0).shape == (2, 3)


def test_channels_of_heads_are_worth_what_the_stream_gets_from_them_over_all_heads() -> None:
    model, text = teachers.teacher("M"), teachers.batches(2)
    linear = model.blocks[0].mixer.out_proj
    a = inputs_of(model, linear, text)
    each = a.square().mean(0) * linear.weight.detach().square().sum(0)
    wanted = each.view(6, 4).sum(0).sqrt()
    torch.testing.assert_close(score(model, text).of("mamba_channels", 0), wanted, rtol=1e-10, atol=0)


def test_published_activations_are_means_over_a_sequence_and_l2_over_sequences() -> None:
    model, text = teachers.teacher("M-"), teachers.batches(3)
    scores = score(model, text)
    a = inputs_of(model, model.blocks[1].mixer.down_proj, text).abs().view(6, 27, 24)
    torch.testing.assert_close(scores.of("ffn", 1, "activation"), a.mean(1).norm(dim=0), rtol=1e-10, atol=0)
    u = inputs_of(model, model.blocks[0].mixer.in_proj, text)
    x = (u @ model.blocks[0].mixer.in_proj.weight[24:48].T).detach().abs().view(6, 27, 6, 4)
    by_head = x.mean(1).square().sum(0).sum(-1).sqrt()
    torch.testing.assert_close(scores.of("mamba_heads", 0, "activation").flatten(), by_head, rtol=1e-10, atol=0)
    outputs = [
        inputs_of(model, m, text).abs().view(6, 27, 20).mean(1).norm(dim=0)
        for m in (model.blocks[0].mixer.in_proj, model.blocks[1].mixer.up_proj)
    ]
    final: list[torch.Tensor] = []
    handle = model.norm.register_forward_hook(lambda module, args, y: final.append(y))
    teachers.logits(model, text)
    handle.remove()
    outputs.append(torch.cat(final).abs().mean(1).norm(dim=0))
    torch.testing.assert_close(scores.of("width"), sum(outputs), rtol=1e-10, atol=0)


def energies(model: Hybrid, text: list[teachers.Batch]) -> torch.Tensor:
    """(G, N) root of the mean over tokens of C_n^2 |h_n|^2, one state channel at a time."""
    mixer, s = model.blocks[0].mixer, model.config.layers[0]
    seen: list[torch.Tensor] = []
    handle = mixer.in_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    teachers.logits(model, text)
    handle.remove()
    total = torch.zeros(2, s.d_state, dtype=torch.float64)  # type: ignore[attr-defined]
    for y, batch in zip(seen, text, strict=True):
        _, xBC, dt = y.split([s.d_inner, s.conv_dim, s.n_heads], dim=-1)  # type: ignore[attr-defined]
        x, B, C = mixer._split(causal_conv1d(xBC, mixer.conv.weight, mixer.conv.bias, starts=batch.starts))
        for n in range(s.d_state):  # type: ignore[attr-defined]
            one, _ = ssd(
                x,
                dt,
                -mixer.A_log.exp(),
                B[..., n : n + 1],
                C[..., n : n + 1],
                dt_bias=mixer.dt_bias,
                starts=batch.starts,
            )
            total[:, n] += one.unflatten(2, (2, -1)).square().sum((0, 1, 3, 4))
    return (total / sum(b.ids.numel() for b in text)).sqrt()


@torch.no_grad()
def test_state_channels_are_worth_their_energy_exactly_for_heads_of_one_channel() -> None:
    model, text = teachers.teacher("M", mamba2={"head_dim": 1}), teachers.batches(2)
    # decays are formed in float32 in any model
    torch.testing.assert_close(score(model, text).of("ssm_state", 0), energies(model, text), rtol=1e-6, atol=0)


@torch.no_grad()
def test_state_channels_are_worth_their_energy_on_average_for_wider_heads() -> None:
    model, text = teachers.teacher("M"), teachers.batches(2)
    found = [score(model, text, axes=["ssm_state"], seed=seed).of("ssm_state", 0).square() for seed in range(36)]
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 6
    wanted = energies(model, text).square()
    # 10 numbers within 4 standard errors, once in thousands of seeds by chance
    assert bool(((mean - wanted).abs() < 4 * error).all()) and bool((error < 0.25 * wanted).all())


def test_experts_are_worth_what_they_add() -> None:
    model, text = teachers.teacher("E", moe={"n_experts": 2, "n_chosen": 2, "d_shared": 0}), teachers.batches(2)
    mixer = model.blocks[0].mixer
    rows = inputs_of(model, mixer, text).view(2, -1, 20)[:, ::4].flatten(0, 1).detach()
    scored = (rows.float() @ mixer.router.weight.float().T).sigmoid()
    weights = (scored / scored.sum(1, keepdim=True)).double()
    y = torch.stack([(rows @ u.T).relu().square() @ d.T for u, d in zip(mixer.experts.up, mixer.experts.down)])  # noqa: B905
    norms = y.norm(dim=2).T.detach()
    wanted = ((norms * weights).square().sum(0) * 4 / (4 * 27)).sqrt()
    scores = score(model, text)
    torch.testing.assert_close(scores.of("experts", 0)[0], wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.of("experts", 0, "activation")[0], norms.mean(0), rtol=1e-5, atol=0)


def test_every_batch_has_random_numbers_of_its_own() -> None:
    model, text = teachers.teacher("M"), teachers.batches(1)
    once, twice = (score(model, text * n, axes=["ssm_state"]).of("ssm_state", 0) for n in (1, 2))
    assert not torch.allclose(once, twice, rtol=1e-3)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_pass_that_was_killed_goes_on_to_the_same_bits(at: int, tmp_path: Path) -> None:
    model, text = teachers.teacher("M-*E"), teachers.batches(5)

    def kill(done: int, total: int) -> None:
        assert total == 5
        if done == at:
            raise KilledError

    whole = score(model, text, seed=4)
    with pytest.raises(KilledError):
        score(model, text, folder=tmp_path / "deep" / "er", every=2, seed=4, progress=kill)
    resumed: list[int] = []
    again = score(model, text, folder=tmp_path / "deep" / "er", seed=4, progress=lambda n, _: resumed.append(n))
    assert len(resumed) == 5 - at // 2 * 2 if at < 5 else not resumed
    whole.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="belongs to another model, text, seed or axes"):
        score(model, text, folder=tmp_path / "deep" / "er", seed=5)
    with pytest.raises(ValueError, match="belongs to another model, text, seed or axes"):
        score(model, teachers.batches(5, seed=9), folder=tmp_path / "deep" / "er", seed=4)


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    model, text = teachers.teacher("M-*E"), teachers.batches(1)
    scores = score(model, text)
    scores.save(tmp_path / "scores")
    back = Scores.load(tmp_path / "scores")
    assert (back.layers, back.order, back.config, back.tokens) == (scores.layers, (), model.config, 54)
    for key, units in scores.units.items():
        for name, values in units.importance.items():
            assert torch.equal(back.units[key].importance[name], values)
        assert all(torch.equal(back.units[key].power[name], value) for name, value in units.power.items())
    (tmp_path / "scores").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no scores"):
        Scores.load(tmp_path / "scores")
    # a state is no scores, scores are no state
    score(model, text, folder=tmp_path)
    with pytest.raises(ValueError, match=r"sums\.safetensors holds no scores"):
        Scores.load(tmp_path / "sums.safetensors")
    scores.save(tmp_path / "sums.safetensors")
    with pytest.raises(ValueError, match=r"sums\.safetensors holds no scores"):
        score(model, text, folder=tmp_path)


def test_experts_without_a_shared_one_have_no_scores_of_its_neurons(tmp_path: Path) -> None:
    scores = score(teachers.teacher("E", moe={"d_shared": 0}), teachers.batches(1))
    assert ("shared_ffn", 0) not in scores.units and all(units.importance for units in scores.units.values())
    scores.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").units.keys() == scores.units.keys()


def test_activations_that_overflow_rank_nothing() -> None:
    model = teachers.teacher("M-", mlp={"sub_norm": False})
    with torch.no_grad():
        model.blocks[1].mixer.up_proj.weight[3] = 1e300
    with pytest.raises(
        ValueError, match=r"of layer 1 has scores by '\w+' that are no numbers: its activations overflow"
    ):
        score(model, teachers.batches(1), axes=["ffn"])


def test_what_a_kill_while_writing_leaves_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = teachers.teacher("-"), teachers.batches(2)
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        with monkeypatch.context() as killed:
            killed.setattr(Path, "unlink", lambda *a, **k: None)
            killed.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KilledError))
            with pytest.raises(KilledError):
                score(model, text, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    score(model, text, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sums.safetensors"]


def test_sums_do_not_grow_with_the_text_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = teachers.teacher("M-*E")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = []
    for n in (1, 4):
        score(model, teachers.batches(n), folder=tmp_path / str(n))
        sizes.append((tmp_path / str(n) / "sums.safetensors").stat().st_size)
    # the facts beside them have a digit more
    assert abs(sizes[1] - sizes[0]) < 16
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_length_of_pieces_changes_nothing_but_rounding() -> None:
    model = teachers.teacher("M-*").float()
    for block in model.blocks:
        block.compute = torch.float32
    model.recipe = model.recipe.computing_in(torch.float32)
    text = teachers.batches(1, rows=3, length=700)
    scores = score(model, text)
    wide = score(teachers.teacher("M-*"), text)
    for key, units in wide.units.items():
        for by, values in units.importance.items():
            torch.testing.assert_close(scores.of(*key, by), values, rtol=2e-3, atol=1e-6)


def test_what_cannot_be_scored_is_refused() -> None:
    model = teachers.teacher("M-", mlp={"sigma_reparam": True})
    with pytest.raises(ValueError, match="layer 1 has sigma_reparam=true"):
        score(model, teachers.batches(1))
    with pytest.raises(ValueError, match="calibration has no batches"):
        score(teachers.teacher("-"), [])
    with pytest.raises(ValueError, match="axis 'height' is unknown; known: depth, width"):
        score(teachers.teacher("-"), teachers.batches(1), axes=["height"])


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_can_be_scored_alone(axis: str) -> None:
    model, text = teachers.teacher("M-*E"), teachers.batches(1)
    alone, together = score(model, text, axes=[axis]), score(model, text)
    for key, units in alone.units.items():
        for by, values in units.importance.items():
            assert torch.equal(values, together.units[key].importance[by])
    assert alone.units or alone.layers
