"""Which parameter is moved by whom, and that its state survives by name."""

import pytest
import torch
from tests.train.tiny import tiny_model

from plait.train.optim import Optim, Optimizers, groups

# every kind of parameter that a hybrid has, and whether weight decay and Muon are for it
MATRICES = {"in_proj.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight", "latent_in.weight"}
MATRICES |= {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "latent_out.weight"}
OTHERS = {"embed.weight", "head.weight", "conv.weight", "router.weight", "experts.up", "experts.down"}
VECTORS = {"norm.weight", "A_log", "D", "dt_bias", "conv.bias"}


def tails(names: object) -> set[str]:
    assert isinstance(names, dict)
    known = MATRICES | OTHERS | VECTORS
    return {next(tail for tail in known if name == tail or name.endswith("." + tail)) for name in names}


def test_decay_is_for_parameters_of_two_dimensions_and_nothing_else() -> None:
    found = groups(tiny_model("ME*-"))
    assert tails(found["decay"]) == MATRICES | OTHERS
    assert tails(found["no decay"]) == VECTORS
    assert all(p.ndim >= 2 for p in found["decay"].values())


def test_muon_moves_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    found = groups(tiny_model("ME*-"), "muon")
    assert tails(found["muon"]) == MATRICES
    assert tails(found["decay"]) == OTHERS
    assert tails(found["no decay"]) == VECTORS


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trainable_parameter_is_in_exactly_one_group(kind: str) -> None:
    model = tiny_model("ME*-")
    model.embed.weight.requires_grad_(False)
    members = [name for group in groups(model, kind).values() for name in group]
    assert sorted(members) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert "embed.weight" not in members


def test_first_adamw_step_is_decay_and_the_sign_of_the_gradient() -> None:
    model, lr, decay = tiny_model(), 0.01, 0.1
    optimizers = Optimizers(model, Optim(weight_decay=decay))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizers.step(lr)
    for name, p in model.named_parameters():
        kept = 1 - lr * decay if p.ndim >= 2 else 1.0
        # both moments, corrected for their start at zero, are those of this one gradient
        moved = lr * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(p.detach(), before[name] * kept - moved, rtol=1e-5, atol=1e-7)


def test_muon_updates_have_the_size_of_adamw_updates() -> None:
    model = tiny_model()
    optimizers = Optimizers(model, Optim(kind="muon", weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step(0.01)
    for name, p in optimizers.groups["muon"].items():
        size = (p.detach() - before[name]).square().mean().sqrt()
        assert 0.1 < size / 0.01 < 0.4, name


def test_state_comes_back_by_name_even_if_parameters_are_listed_in_another_order() -> None:
    model, other = tiny_model(), tiny_model()
    optimizers = Optimizers(model, Optim(kind="muon"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers.step(0.01)
    saved = {name: tensor.clone() for name, tensor in reversed(optimizers.tensors().items())}
    fresh = Optimizers(other, Optim(kind="muon"))
    fresh.load(saved)
    again = fresh.tensors()
    assert saved.keys() == again.keys() and len(saved) > 0
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_state_of_another_model_is_refused_by_name() -> None:
    optimizers = Optimizers(tiny_model(), Optim())
    with pytest.raises(ValueError, match=r"blocks\.9\.norm\.weight"):
        optimizers.load({"blocks.9.norm.weight/exp_avg": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"\(3,\)"):
        optimizers.load({"norm.weight/exp_avg": torch.zeros(3)})


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="masters"):
        Optimizers(tiny_model().bfloat16(), Optim())


def test_the_description_names_every_kind_of_parameter_once() -> None:
    lines = Optimizers(tiny_model("ME*-"), Optim(kind="muon")).describe()
    assert len(lines) == 3
    for tail in MATRICES | OTHERS | VECTORS:
        assert any(f" {tail}" in line or f".{tail}" in line for line in lines), tail


@pytest.mark.parametrize("settings", [{"weight_decay": -0.1}, {"clip": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}])
def test_settings_that_make_no_sense_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Optim(**settings)  # type: ignore[arg-type]
