"""The model: pieces = whole, padding = no padding, losses, errors, fresh weights, costs."""

import pytest
import torch
from tests.model.sizes import FAMILIES as KNOWN
from tests.model.sizes import STABLE, config
from torch import Tensor

from plait.config import ConfigError
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.layer import Span

FAMILIES = KNOWN | STABLE
each = pytest.mark.parametrize("family", FAMILIES)


def _model(family: str) -> Hybrid:
    """Random weights with nothing at a default value, so that a forgotten term shows."""
    model = build(FAMILIES[family], recipe="fp32", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                t.add_(torch.randn(t.shape, generator=generator) * 0.3)
    return model


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each
def test_prefill_in_pieces_and_steps_equal_one_forward(family: str) -> None:
    model, ids = _model(family), torch.randint(0, 37, (2, 31))
    whole = model(ids).logits
    cache, out = model.cache(2), []
    for piece in ids.split([1, 8, 9, 6, *[1] * 7], dim=1):
        out.append(model(piece, cache=cache).logits)
    _close(torch.cat(out, 1), whole)
    assert cache.n_tokens == 31 and cache.lengths.tolist() == [31, 31]


@each
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(family: str, side: str) -> None:
    model, ids = _model(family), torch.randint(0, 37, (3, 19))
    lengths = [19, 1, 11]
    mask = torch.zeros(3, 19, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(19 - n, None) if side == "left" else slice(0, n)] = 1
    logits = model(ids, attention_mask=mask).logits
    cache, pieces = model.cache(3), []
    for a, b in ((0, 7), (7, 19)):
        pieces.append(model(ids[:, a:b], attention_mask=mask[:, a:b], cache=cache).logits)
    after = model(torch.tensor([[5], [6], [7]]), cache=cache).logits
    assert cache.lengths.tolist() == [20, 2, 12]
    for row in range(3):
        real = mask[row].bool()
        alone = model(torch.cat([ids[row, real], torch.tensor([5 + row])])[None]).logits[0]
        _close(logits[row, real], alone[:-1])
        _close(torch.cat(pieces, 1)[row, real], alone[:-1])
        _close(after[row, 0], alone[-1])


@each
def test_the_loss_is_the_mean_over_counted_next_tokens(family: str) -> None:
    model, ids = _model(family), torch.randint(0, 37, (2, 9))
    labels = ids.clone()
    labels[0, :4] = labels[1, 8] = -100
    out = model(ids, labels=labels)
    logp = out.logits.double().log_softmax(-1)
    terms = [-logp[b, t, labels[b, t + 1]] for b in range(2) for t in range(8) if labels[b, t + 1] != -100]
    torch.testing.assert_close(out.loss.double(), torch.stack(terms).mean(), rtol=1e-6, atol=0)


@each
def test_the_loss_never_predicts_across_documents_or_padding(family: str) -> None:
    model, ids = _model(family), torch.randint(0, 37, (1, 20))
    parts = [ids[:, :9], ids[:, 9:]]
    sums = torch.stack([model(part, labels=part).loss * (part.shape[1] - 1) for part in parts]).sum()
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 9]] = True
    torch.testing.assert_close(model(ids, labels=ids, starts=starts).loss, sums / 18, rtol=1e-5, atol=1e-6)
    padded = torch.nn.functional.pad(ids, (3, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 4))
    out = model(padded, labels=padded, attention_mask=mask)
    torch.testing.assert_close(out.loss, model(ids, labels=ids).loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no token to predict"):
        model(ids, labels=torch.full_like(ids, -100))


def test_logits_can_be_left_out() -> None:
    model, ids = _model("hybrid"), torch.randint(0, 37, (2, 5))
    assert [model(ids, n_logits=n).logits.shape[1] for n in (None, 0, 1, 5, 9)] == [5, 0, 1, 5, 5]


@each
def test_rows_of_a_cache_can_be_chosen_and_saved(family: str) -> None:
    model, ids = _model(family), torch.randint(0, 37, (3, 9))
    cache = model.cache(3)
    model(ids, cache=cache)
    cache.select(torch.tensor([2, 0, 2]))
    again = model.cache(3)
    again.replace({k: v.clone() for k, v in cache.tensors().items()}, cache.n_tokens)
    token = torch.tensor([[1], [2], [3]])
    rows = torch.cat([ids[[2, 0, 2]], token], 1)
    for held in (cache, again):
        _close(model(token, cache=held).logits, model(rows).logits[:, -1:])


def test_only_attention_grows_the_cache() -> None:
    model = _model("hybrid")
    cache, sizes = model.cache(1), []
    for n in (1, 10, 10):
        model(torch.randint(0, 37, (1, n)), cache=cache)
        sizes.append(cache.n_bytes())
    per_token = 4 * model.config.cost().kv_numbers_per_token
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 10 * per_token
    cost = model.config.cost()
    assert sizes[0] - per_token == 4 * (cost.ssm_numbers + cost.conv_numbers)


@each
def test_cost_equals_counted_parameters(family: str) -> None:
    model = _model(family)
    held = [*model.parameters(), *model.buffers()]
    assert FAMILIES[family].cost().params == sum(t.numel() for t in held)


def test_hidden_states_are_the_stream_and_the_final_norm() -> None:
    model, ids = _model("hybrid"), torch.randint(0, 37, (1, 5))
    out = model(ids, output_hidden_states=True)
    assert out.hidden_states is not None and len(out.hidden_states) == 7 + 2
    assert torch.equal(out.hidden_states[0], model.embed.weight[ids])
    _close(out.hidden_states[-1] @ model.head_weight.T, out.logits)


def test_fresh_weights_follow_the_papers() -> None:
    big = ModelConfig.from_pattern(
        "M-*-",
        vocab_size=1000,
        d_model=128,
        mamba2={"n_heads": 256, "head_dim": 2, "d_state": 4, "n_groups": 8},
        attention={"n_heads": 8, "n_kv_heads": 2, "head_dim": 16},
        mlp={"d_ff": 512},
        init_std=0.05,
    )
    p = dict(build(big, recipe="fp32").named_parameters())
    A, dt = p["blocks.0.mixer.A_log"].exp(), torch.nn.functional.softplus(p["blocks.0.mixer.dt_bias"])
    assert A.min() >= 1 and A.max() <= 16 and abs(A.mean().item() - 8.5) < 1.2
    assert dt.min() >= 9.9e-4 and dt.max() <= 0.1001 and abs(dt.log().mean().item() - (-4.605)) < 0.35
    assert bool((p["blocks.0.mixer.D"] == 1).all())
    for name in ("embed.weight", "head.weight", "blocks.0.mixer.in_proj.weight", "blocks.1.mixer.up_proj.weight"):
        assert p[name].std().item() == pytest.approx(0.05, rel=0.03)
    for name in ("blocks.0.mixer.out_proj", "blocks.1.mixer.down_proj", "blocks.2.mixer.o_proj"):
        assert p[f"{name}.weight"].std().item() == pytest.approx(0.05 / 4**0.5, rel=0.03), "scaled by 1/sqrt(layers)"
    again = dict(build(big, recipe="fp32").named_parameters())
    assert all(torch.equal(p[k], again[k]) for k in p)


def test_bf16_recipe_keeps_float32_masters() -> None:
    model = build(FAMILIES["hybrid"], recipe="bf16", seed=1)
    assert all(t.dtype == torch.float32 for t in model.parameters())
    ids = torch.randint(0, 37, (2, 12))
    out, exact = model(ids, labels=ids), build(FAMILIES["hybrid"], recipe="fp32", seed=1)(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert abs(out.loss - exact.loss) < 0.02 * exact.loss
    out.loss.backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[3, 37]])}, "token id 37, outside the vocabulary of 37"),
        ({"input_ids": torch.tensor([[3, -1]])}, "token id -1"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
        ({"input_ids": torch.tensor([3])}, r"shape \(3?1?,\)"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "padding between tokens"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"labels": torch.ones(1, 3, dtype=torch.long)}, "labels have shape"),
        ({"labels": torch.tensor([[1, 99, 1, 1]])}, "target 99 is outside"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: dict[str, Tensor], message: str) -> None:
    model = _model("hybrid")
    with pytest.raises(ValueError, match=message):
        model(**({"input_ids": torch.tensor([[1, 2, 3, 4]])} | arguments))


def test_packing_cannot_continue_a_cache() -> None:
    model, ids = _model("hybrid"), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="starts and cache"):
        model(ids, starts=torch.tensor([[True, False]]), cache=model.cache(1))
    with pytest.raises(ValueError, match="cache holds 2 sequences, input_ids 1"):
        model(ids, cache=model.cache(2))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ternary'"):
        build(config("M"), recipe="ternery")


@each
def test_additions_joined_to_the_norms_change_nothing(family: str) -> None:
    # on a GPU a model with a cache runs this way; here it is asked to
    model = _model(family)
    if not all(block.is_plain for block in model.blocks):
        pytest.skip("its blocks are added one by one")
    ids, mask = torch.randint(0, 37, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    with torch.no_grad():
        plain, joined = model.cache(2), model.cache(2)
        exact, _ = model.hidden(ids, attention_mask=mask, cache=plain)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        joined.extend(9, mask)
        span = Span(positions=positions, mask=mask, key_mask=joined.mask)
        got = model._joined(model.embed(ids), span, joined.states)
    torch.testing.assert_close(got[mask], exact[mask])


def test_layers_that_somebody_listens_to_are_not_joined() -> None:
    model = _model(next(name for name in KNOWN if "llama" in name))
    assert model._can_join()
    for module in (model.blocks[1], model.blocks[0].norm, model.norm):
        for listen in (module.register_forward_hook, module.register_forward_pre_hook):  # type: ignore[union-attr]
            handle = listen(lambda *_: None)  # type: ignore[operator]
            assert not model._can_join()
            handle.remove()
    # mixers are called in both ways
    model.blocks[0].mixer.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    assert model._can_join()
