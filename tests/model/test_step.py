"""Decoding by tape equals the ordinary forward on reference operations."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from tests.model.sizes import ATTENTION, FAMILIES, MAMBA, ROPE, config
from torch import Tensor, nn

from plait.kernels.native import library
from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build
from plait.model.static import StaticCache
from plait.model.step import step
from plait.ops.dispatch import use
from plait.ops.tape import Tape
from plait.ops.watch import TURNS
from plait.precision import RECIPES
from plait.precision.linear import Linear
from plait.precision.weight_only import WeightOnlyLinear

pytestmark = pytest.mark.skipif(library.library("decode") is None, reason="the native kernels are not compiled")

# bfloat16 rounds every activation of the ordinary path, and none of the tape's; logits gather the roundings of layers
TOLERANCE = {"fp32": 1e-5, "bf16": 8 * torch.finfo(torch.bfloat16).eps}
PLAIN = {
    "hybrid": config("M-M*-M-"),
    "gated": config("M-*-", mlp={"d_ff": 24, "activation": "relu2", "gated": True, "sub_norm": True}),
    "sub-norm": config("*-", attention=ATTENTION | {"sub_norm": True, "out_bias": True}),
    "biased": config("M-*-", mamba2=MAMBA | {"proj_bias": True, "conv_bias": False}, mlp={"d_ff": 8, "bias": True}),
    "limited": config("MM", mamba2=MAMBA | {"dt_limit": [0.01, 0.05]}),
} | {name: FAMILIES[name] for name in ("mamba", "llama", "qwen", "partial rope")}


def ids_of(model: Hybrid, batch: int, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length))


def assert_steps_agree(model: Hybrid, ids: Tensor, tape: Cache, plain: Cache, tolerance: float) -> None:
    """Feed ids (B, L) one by one to both caches: the same logits, and the same memory at the end."""
    with torch.no_grad():
        for t in range(ids.shape[1]):
            got = model(ids[:, t : t + 1], cache=tape, n_logits=1).logits
            with use("reference"):
                want = model(ids[:, t : t + 1], cache=plain, n_logits=1).logits
            assert tape.tape is not None and tape.tape[1] is not None, "the tape did not serve"
            assert got.shape == want.shape and got.dtype == want.dtype
            assert (got - want).abs().max() <= tolerance * want.abs().max(), f"token {t}"
    assert plain.tape is None and tape.n_tokens == plain.n_tokens and torch.equal(tape.lengths, plain.lengths)
    for name, t in tape.tensors().items():
        got, want = t.float(), plain.tensors()[name].float()
        assert (got - want).abs().max() <= tolerance * max(want.abs().max(), 1), name


def two_caches(model: Hybrid, batch: int, prompt: int, mask: Tensor | None = None) -> tuple[Cache, Cache]:
    """Two caches that read the same random prompt."""
    ids, caches = ids_of(model, batch, prompt), (model.cache(batch), model.cache(batch))
    with torch.no_grad(), use("reference"):
        for cache in caches:
            model(ids, attention_mask=mask, cache=cache)
    return caches


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("family", PLAIN)
def test_tape_equals_the_ordinary_forward(family: str, batch: int, recipe: str) -> None:
    model = build(PLAIN[family], recipe)
    tape, plain = two_caches(model, batch, 5)
    assert_steps_agree(model, ids_of(model, batch, 6), tape, plain, TOLERANCE[recipe])


def test_an_empty_cache_is_served_from_its_first_token() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    assert_steps_agree(model, ids_of(model, 2, 4), model.cache(2), model.cache(2), 1e-5)


@pytest.mark.parametrize("family", ["hybrid", "llama"])
def test_rows_of_unequal_length_do_not_see_their_padding(family: str) -> None:
    model = build(PLAIN[family], "fp32")
    mask = torch.arange(9) >= torch.tensor([[0], [4], [8]])
    tape, plain = two_caches(model, 3, 9, mask)
    assert_steps_agree(model, ids_of(model, 3, 6), tape, plain, 1e-5)


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_long_contexts_are_attended_to_in_spans(recipe: str) -> None:
    model = build(PLAIN["llama"], recipe)
    mask = torch.arange(1200) >= torch.tensor([[0], [700]])
    tape, plain = two_caches(model, 2, 1200, mask)
    assert_steps_agree(model, ids_of(model, 2, 3), tape, plain, TOLERANCE[recipe])


def test_keys_and_values_may_grow_and_move() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    tape, plain = two_caches(model, 1, 60)
    assert_steps_agree(model, ids_of(model, 1, 40), tape, plain, 1e-5)
    tape.reserve(1000)
    assert_steps_agree(model, ids_of(model, 1, 3), tape, plain, 1e-5)


def test_a_prompt_may_come_between_tokens() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    tape, plain = two_caches(model, 2, 3)
    for _ in range(2):
        assert_steps_agree(model, ids_of(model, 2, 2), tape, plain, 1e-5)
        ids = ids_of(model, 2, 4)
        with torch.no_grad(), use("reference"):
            model(ids, cache=tape), model(ids, cache=plain)


def test_rows_may_be_selected_between_tokens() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    tape, plain = two_caches(model, 3, 4)
    assert_steps_agree(model, ids_of(model, 3, 2), tape, plain, 1e-5)
    for rows in ([2, 0], [1, 1, 0], [2]):
        tape.select(torch.tensor(rows)), plain.select(torch.tensor(rows))
        assert_steps_agree(model, ids_of(model, len(rows), 2), tape, plain, 1e-5)


def test_contents_may_be_replaced_between_tokens() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    tape, plain = two_caches(model, 2, 7)
    saved = {name: t.clone() for name, t in tape.tensors().items()}
    assert_steps_agree(model, ids_of(model, 2, 3), tape, plain, 1e-5)
    tape.replace({name: t.clone() for name, t in saved.items()}, 7), plain.replace(saved, 7)
    assert_steps_agree(model, ids_of(model, 2, 3), tape, plain, 1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_changed_weights_are_noticed(recipe: str, fused: bool) -> None:
    model = build(PLAIN["hybrid"], recipe)
    tape, plain = two_caches(model, 1, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    for _ in range(2):
        assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, TOLERANCE[recipe])
        ids = ids_of(model, 1, 6)
        model(ids, labels=ids).loss.backward()
        assert not model.rounded, "training keeps no copies"
        optimizer.step()
    model.load_state_dict(build(PLAIN["hybrid"], recipe, seed=1).state_dict(), assign=True)
    assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, TOLERANCE[recipe])


def written_through_data(model: Hybrid) -> None:
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight.data.mul_(1.5)


def other_data(model: Hybrid) -> None:
    model.blocks[0].mixer.in_proj.weight.data = torch.randn_like(model.blocks[0].mixer.in_proj.weight)


def other_module(model: Hybrid) -> None:
    old = model.blocks[1].mixer.up_proj.weight
    model.blocks[1].mixer.up_proj = Linear(old.shape[1], old.shape[0])
    nn.init.normal_(model.blocks[1].mixer.up_proj.weight)


def other_block(model: Hybrid) -> None:
    model.blocks[1] = copy.deepcopy(model.blocks[1])
    nn.init.normal_(model.blocks[1].mixer.up_proj.weight)


def a_bias(model: Hybrid) -> None:
    linear = model.blocks[1].mixer.down_proj
    linear.bias = nn.Parameter(torch.randn(linear.weight.shape[0]))


def no_bias(model: Hybrid) -> None:
    model.blocks[0].mixer.conv.bias = None


def written_in_place(model: Hybrid) -> None:
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight.mul_(1.5)


# PyTorch tells of the first three
TOLD = [other_module, other_block, a_bias]
CHANGES = [*TOLD, written_through_data, written_in_place, other_data, no_bias]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_changes_of_the_model_are_noticed(recipe: str, change: Callable[[Hybrid], None]) -> None:
    model = build(PLAIN["hybrid"], recipe)
    tape, plain = two_caches(model, 1, 4)
    assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, TOLERANCE[recipe])
    change(model)
    if change not in TOLD:
        # a cache in use may read the old weights for some tokens, which stay where they were
        with torch.no_grad():
            for _ in range(TURNS):
                assert step(model, ids_of(model, 1, 1), tape).isfinite().all()
        plain = copy.deepcopy(tape)
    assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, TOLERANCE[recipe])


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_a_new_cache_sees_changes_at_its_first_token(recipe: str, change: Callable[[Hybrid], None]) -> None:
    model = build(PLAIN["hybrid"], recipe)
    tape, plain = two_caches(model, 1, 4)
    assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, TOLERANCE[recipe])
    change(model)
    tape, plain = two_caches(model, 1, 4)
    assert_steps_agree(model, ids_of(model, 1, 1), tape, plain, TOLERANCE[recipe])


def test_few_changed_numbers_are_noticed_in_the_end() -> None:
    model = build(config("-", mlp={"d_ff": 40}), "bf16")
    cache, weight = model.cache(1), model.blocks[0].mixer.up_proj.weight
    with torch.no_grad():
        step(model, ids_of(model, 1, 1), cache)
        weight.data[17] += 1
        tape = cache.tape[1]
        assert not all(tape.is_fresh() for _ in range(TURNS * weight.numel()))
        step(model, ids_of(model, 1, 1), cache)
    assert torch.equal(model.rounded[model.blocks[0].mixer.up_proj][2], weight.bfloat16())


@pytest.mark.parametrize("where", ["module", "everywhere", "before"])
def test_hooks_added_between_tokens_are_called(where: str) -> None:
    model, seen = build(PLAIN["hybrid"], "fp32"), []
    cache, linear = model.cache(1), model.blocks[1].mixer.up_proj
    hook = nn.modules.module.register_module_forward_hook if where == "everywhere" else linear.register_forward_hook
    with torch.no_grad():
        assert step(model, ids_of(model, 1, 1), cache) is not None
        handle = (linear.register_forward_pre_hook if where == "before" else hook)(lambda *_: seen.append(1))
        model(ids_of(model, 1, 1), cache=cache)
        handle.remove()
    assert seen


CODES = [name for name, recipe in RECIPES.items() if recipe.weight_only]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", CODES)
def test_weights_held_as_codes_are_served(recipe: str, compute: torch.dtype) -> None:
    wide = config(
        "M-*-",
        d_model=128,
        mamba2=MAMBA | {"n_heads": 6, "head_dim": 64},
        attention=ATTENTION | {"head_dim": 32},
        mlp={"d_ff": 256},
    )
    model = build(wide, RECIPES[recipe].computing_in(compute))
    assert isinstance(model.blocks[1].mixer.up_proj, WeightOnlyLinear)
    for batch in (1, 5):
        tape, plain = two_caches(model, batch, 4)
        tolerance = TOLERANCE["fp32" if compute == torch.float32 else "bf16"]
        assert_steps_agree(model, ids_of(model, batch, 3), tape, plain, tolerance)


def test_a_model_in_bfloat16_needs_no_copies() -> None:
    model = build(PLAIN["hybrid"], "bf16").bfloat16()
    tape, plain = two_caches(model, 2, 4)
    assert_steps_agree(model, ids_of(model, 2, 3), tape, plain, TOLERANCE["bf16"])
    assert not model.rounded


def test_two_models_may_share_a_cache() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    twin = copy.deepcopy(model)
    tape, plain = two_caches(model, 1, 4)
    assert_steps_agree(model, ids_of(model, 1, 2), tape, plain, 1e-5)
    with torch.no_grad():
        twin.head.weight.mul_(2)
    assert_steps_agree(twin, ids_of(model, 1, 2), tape, plain, 1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_agree(threads: int) -> None:
    model = build(config("M-*-", vocab_size=999, mamba2=MAMBA | {"n_heads": 12}, mlp={"d_ff": 400}), "fp32")
    tape, plain = two_caches(model, 2, 4)
    torch.set_num_threads(threads)
    try:
        assert_steps_agree(model, ids_of(model, 2, 20), tape, plain, 1e-5)
    finally:
        torch.set_num_threads(1)


def test_what_a_tape_cannot_do_takes_the_ordinary_path() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    ids = ids_of(model, 2, 1)

    def served(model: Hybrid, batch: int = 2, **arguments: object) -> bool:
        cache = model.cache(batch)
        model(ids[:1].expand(batch, 1), cache=cache, **arguments)
        return cache.tape is not None and cache.tape[1] is not None

    with torch.no_grad():
        assert served(model) and served(model, 16)
        assert not served(model, 17)
        assert not served(model, n_logits=0)
        assert not served(model, output_hidden_states=True)
        assert not served(model, attention_mask=torch.ones(2, 1))
        assert not served(build(FAMILIES["hybrid"], "fp32")), "experts"
        assert not served(build(PLAIN["hybrid"], "ternary"))
        seen = []
        handle = model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
        assert not served(model) and seen
        handle.remove()
    assert not served(model), "gradients"
    with pytest.raises(ValueError, match="token id 37"), torch.no_grad():
        model(torch.tensor([[37]]), cache=model.cache(1))


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    tape, plain = two_caches(model, 2, 5)
    assert_steps_agree(model, ids_of(model, 2, 2), tape, plain, 1e-5)
    copies = copy.deepcopy(tape), copy.deepcopy(plain)
    assert_steps_agree(model, ids_of(model, 2, 2), *copies, 1e-5)
    assert_steps_agree(model, ids_of(model, 2, 2), tape, plain, 1e-5)


def test_a_copy_of_a_model_has_no_copies_of_its_masters() -> None:
    model = build(PLAIN["hybrid"], "bf16")
    two = two_caches(model, 1, 3)
    assert_steps_agree(model, ids_of(model, 1, 1), *two, TOLERANCE["bf16"])
    assert model.rounded and not copy.deepcopy(model).rounded


def test_a_static_cache_is_not_written_by_a_tape() -> None:
    model = build(PLAIN["hybrid"], "fp32")
    ids, device = ids_of(model, 2, 4), torch.device("cpu")
    static = StaticCache(model.config, 2, 8, device=device, dtype=torch.float32)
    with torch.no_grad():
        want = model(ids, cache=model.cache(2)).logits
        got = [model(ids[:, t : t + 1], cache=static).logits for t in range(4)]
    assert static.tape is None
    assert (torch.cat(got, 1) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_cache_that_was_interrupted_is_not_written_by_a_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(PLAIN["hybrid"], "fp32")
    cache, _ = two_caches(model, 1, 3)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, torch.no_grad(), pytest.raises(KeyboardInterrupt):
        patched.setattr(Tape, "run", interrupted)
        model(ids_of(model, 1, 1), cache=cache)
    with torch.no_grad():
        assert step(model, ids_of(model, 1, 1), cache) is None, "it would write past its keys"


def test_a_cache_of_another_model_is_refused() -> None:
    model, other = build(PLAIN["hybrid"], "fp32"), build(PLAIN["llama"], "fp32")
    with torch.no_grad():
        assert step(model, ids_of(model, 1, 1), model.cache(1)) is not None
        assert step(model, ids_of(model, 1, 1), other.cache(1)) is None


def test_layers_of_others_are_called() -> None:
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = build(PLAIN["hybrid"], "fp32")
    with torch.no_grad():
        assert step(model, ids_of(model, 1, 1), model.cache(1)) is not None
        old = model.blocks[0].mixer.out_proj
        old.__class__ = Doubled
        assert step(model, ids_of(model, 1, 1), model.cache(1)) is None
        old.__class__ = Linear
        old.forward = lambda x: x
        assert step(model, ids_of(model, 1, 1), model.cache(1)) is None, "a forward of its own"


def random_config(rng: random.Random) -> ModelConfig:
    groups, kv = rng.choice([1, 2, 3]), rng.choice([1, 2])
    gated = rng.random() < 0.5
    return config(
        "".join(rng.choice("M*-") for _ in range(rng.randint(1, 4))),
        vocab_size=rng.randint(2, 70),
        d_model=rng.randint(1, 80),
        ties_embeddings=rng.random() < 0.5,
        mamba2={
            "n_heads": groups * rng.randint(1, 3),
            "head_dim": rng.choice([1, 4, 16, 33]),
            "d_state": rng.choice([1, 5, 16, 40]),
            "n_groups": groups,
            "conv_width": rng.choice([2, 3, 4]),
            "conv_bias": rng.random() < 0.5,
        },
        attention={
            "n_heads": kv * rng.randint(1, 6),
            "n_kv_heads": kv,
            "head_dim": 2 * rng.randint(1, 40),
            "rope": rng.choice([None, ROPE]),
            "qk_norm": rng.random() < 0.5,
            "qkv_bias": rng.random() < 0.5,
            "sub_norm": rng.random() < 0.5,
        },
        mlp={
            "d_ff": rng.randint(1, 150),
            "activation": rng.choice(["silu", "relu2"]) if gated else "relu2",
            "gated": gated,
            "sub_norm": rng.random() < 0.5,
        },
    )


def test_random_models_agree(n_shapes: int) -> None:
    rng = random.Random(0)
    for _ in range(n_shapes):
        c, batch, prompt = random_config(rng), rng.randint(1, 16), rng.choice([1, 2, 63, 65, 130, 300])
        model = build(c, "fp32")
        tape, plain = two_caches(model, batch, prompt)
        try:
            assert_steps_agree(model, ids_of(model, batch, 2), tape, plain, 2e-5)
        except AssertionError as error:
            raise AssertionError(f"{c} batch {batch} prompt {prompt}: {error}") from None
