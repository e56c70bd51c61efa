"""Recipes as data: rules and places, files and tables, and what is refused before anything is computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.config import ConfigError
from plait.model.config import ModelConfig
from plait.model.hybrid import Hybrid, build, recipe_of
from plait.ops.dispatch import BackendError
from plait.precision import RECIPES, device
from plait.precision.format import HIGH, LinearFormat, TensorFormat
from plait.precision.linear import Linear
from plait.precision.papers import MX8, NV4, PAPERS, TENSORWISE
from plait.precision.place import places
from plait.precision.reading import read, write
from plait.precision.recipe import Place, PrecisionRecipe, Rule, Switch
from plait.precision.weight_only import WeightOnlyLinear


def config(pattern: str = "M-M*-M-M*-", **changed: object) -> ModelConfig:
    sizes: dict[str, object] = {
        "vocab_size": 90,
        "d_model": 128,
        "mamba2": {"n_heads": 32, "head_dim": 8, "d_state": 16, "n_groups": 2, "chunk": 8},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32},
        "mlp": {"d_ff": 256},
    }
    return ModelConfig.from_pattern(pattern, **(sizes | changed))


def high_layers(recipe: PrecisionRecipe, pattern: str = "M-M*-M-M*-") -> list[str]:
    """Names of the blocks' layers in the compute dtype."""
    with torch.device("meta"):
        model = Hybrid(config(pattern), recipe)
    found = [
        name.replace("blocks.", "").replace(".mixer", "") for name, layer, _ in places(model)
        if isinstance(layer, Linear) and layer.number_format == HIGH
    ]  # fmt: skip
    return [name for name in found if name != "head"]


def test_first_and_last_count_products_as_the_papers_do() -> None:
    ends = ["0.in_proj", "0.out_proj", "1.up_proj", "1.down_proj"]
    assert high_layers(PAPERS["fp8"]) == [*ends, *(f"8.{n}_proj" for n in "qkvo"), "9.up_proj", "9.down_proj"]
    # 20 products with q, k and v as one: the last three of them
    assert high_layers(PAPERS["nvfp4"]) == ["8.o_proj", "9.up_proj", "9.down_proj"]
    assert high_layers(PAPERS["mxfp8"]) == []


def test_rules_say_where_by_number_share_or_block() -> None:
    def layers(**where: object) -> list[str]:
        rules = (Rule(format=HIGH, **where), Rule(format=TENSORWISE))  # type: ignore[arg-type]
        return high_layers(PrecisionRecipe(name="mine", rules=rules), "M-M-")

    assert layers(first=1) == ["0.in_proj"] and layers(last=1) == ["3.down_proj"]
    assert layers(first=0.25) == ["0.in_proj", "0.out_proj"] and layers(last=0.2) == ["3.up_proj", "3.down_proj"]
    assert Rule(first=0.07, format=HIGH).matches("mlp.up_proj", Place(i=6, n=100, b=0, B=1))
    assert not Rule(first=0.07, format=HIGH).matches("mlp.up_proj", Place(i=7, n=100, b=0, B=1))
    assert layers(blocks="0, -1:") == ["0.in_proj", "0.out_proj", "3.up_proj", "3.down_proj"]
    assert layers(role="mlp.*", blocks="1:3") == ["1.up_proj", "1.down_proj"]
    assert layers(role="mamba2.out_proj") == ["0.out_proj", "2.out_proj"]


def test_the_head_is_only_meant_by_name() -> None:
    model = build(config(), "fp8")
    assert isinstance(model.head, Linear) and model.head.number_format == HIGH
    assert isinstance(build(config(), "int8").head, WeightOnlyLinear)
    with pytest.raises(ConfigError, match="the head's loss is computed in the compute dtype"):
        build(config(), PrecisionRecipe(name="mine", rules=(Rule(role="head", format=TENSORWISE),)))


def test_held_codes_by_place_replace_single_layers() -> None:
    rules = (Rule(last=1, format=HIGH), *RECIPES["int8"].rules)
    model = build(config(), PrecisionRecipe(name="mine", rules=rules))
    assert type(model.get_submodule("blocks.9.mixer.down_proj")) is Linear
    assert isinstance(model.get_submodule("blocks.9.mixer.up_proj"), WeightOnlyLinear)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_segments_of_mambas_projection_are_known() -> None:
    layer = build(config(), "ternary").get_submodule("blocks.0.mixer.in_proj")
    assert isinstance(layer, Linear)
    assert layer.parts == (("z", 256), ("x", 256), ("B", 32), ("C", 32), ("dt", 32))
    assert layer.n_high(layer.number_format) == 32


@pytest.mark.parametrize("form", [*NV4.operands.values(), *MX8.operands.values(), *TENSORWISE.operands.values()])
def test_a_format_is_read_as_it_is_spelled(form: TensorFormat) -> None:
    assert TensorFormat.from_dict(str(form)) == form


def test_every_recipe_is_written_and_read_back(tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        assert write(recipe) == name and read(name) == recipe
    text = """
        base = "nvfp4"
        compute = "fp32"
        switch = {at = 0.9, what = "forward"}
        [[rules]]
        role = "mamba2.out_proj"
        format = "mxfp8"
        [[rules]]
        blocks = "-2:"
        [rules.format]
        fprop = ["e2m1 1x16 e4m3", "none"]
        wgrad = ["e4m3 row stochastic", "e4m3 row"]
    """
    (tmp_path / "mine.toml").write_text(text)
    mine = recipe_of(str(tmp_path / "mine.toml"))
    assert (mine.name, mine.compute, mine.switch) == ("mine", torch.float32, Switch(at=0.9, what="forward"))
    assert mine.rules[0] == Rule(role="mamba2.out_proj", format=MX8) and mine.rules[2:] == PAPERS["nvfp4"].rules
    fprop = (TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3"), None)
    assert mine.rules[1].format.fprop == fprop
    assert read(write(mine)) == mine
    bare = read({"base": "nvfp4", "keeps_rules": False, "rules": [{"format": "nvfp4"}]})
    assert high_layers(bare) == [] and high_layers(PAPERS["nvfp4"])
    layer = build(config(), mine).get_submodule("blocks.0.mixer.in_proj")
    assert isinstance(layer, Linear) and layer.late_format == replace(NV4, fprop=(None, None))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"base": "nvpf4"}, r"base='nvpf4' is unknown; did you mean 'nvfp4'\?"),
        ({"rules": [{"format": "fp9"}]}, r"rules\.0\.format: format='fp9' is unknown; did you mean 'fp8'\?"),
        ({"rules": [{"role": "x"}]}, r'"rules\.0\.format" is missing'),
        ({"rules": [{"first": 1.5, "format": "fp8"}]}, r"first=1\.5: give a number of products, or a share"),
        ({"rules": [{"blocks": "a", "format": "fp8"}]}, r"blocks='a': 'a' is not understood; write for example '0:2"),
        (
            {"rules": [{"format": {"fprop": ["e3m3 tensor", "none"]}}]},
            r"fprop\.0: .*element 'e3m3' is unknown; elements",
        ),
        ({"rules": [{"format": {"fprop": ["e4m3", "none"]}}]}, r"it lacks what shares a scale"),
        ({"rules": [{"format": {"fprop": ["e2m1 1x32 e4m3", "none"]}}]}, r"blocks with e4m3 scales are 1x16 or 16x16"),
        ({"rules": [{"format": {"fprop": ["e4m3 tensor", "e2m1 tensor"]}}]}, r"e2m1 has a scale for each block"),
        ({"rules": [{"format": {"fprop": ["e2m1 16x16 e4m3", "none"]}}]}, r"tokens take blocks of one row"),
        (
            {"rules": [{"format": {"wgrad": ["e2m1 1x16 e4m3 hadamard", "e2m1 1x16 e4m3"]}}]},
            r"a rotation cancels only if both",
        ),
        ({"switch": {"at": 1.5}}, r"at=1\.5: must be a share of the run's steps"),
        ({"switch": {"at": 0.5, "what": "backward"}}, r'switch\.what = .backward.: expected one of "whole", "forward"'),
        ("nope.toml", r"recipe='nope\.toml': there is no such file"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(table: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(table)


def test_a_rule_that_means_no_layer_is_refused() -> None:
    recipe = read(
        {"base": "fp8", "rules": [{"role": "mlp.*", "format": "bf16"}, {"role": "mambo.*", "format": "bf16"}]}
    )
    message = r"the rule role='mambo\.\*' means no layer of this model; its roles are attention.*, its blocks 0 to 9"
    with pytest.raises(ConfigError, match=message):
        build(config(), recipe)
    with pytest.raises(ConfigError, match=r"the rule role='\*' blocks='12' means no layer"):
        build(config(), read({"rules": [{"blocks": "12", "format": "fp8"}]}))
    # a published recipe may speak of layers that a model does not have
    build(config("*-"), "ternary")


@pytest.mark.parametrize(
    ("recipe", "sizes", "message"),
    [
        ("nvfp4", {"mlp": {"d_ff": 264}}, r"blocks\.1\.mixer\.up_proj is 264 x 128, which blocks of 16x16 do not"),
        ("mxfp8", {"mlp": {"d_ff": 272}}, r"blocks\.1\.mixer\.up_proj is 272 x 128, which blocks of 1x32 .*dgrad\.dy"),
        ("fp8-block", {}, r"in_proj is 608 x 128, which blocks of 128x128 do not .*multiples of 128, or add a rule"),
    ],
)
def test_weights_that_blocks_do_not_divide_are_refused(recipe: str, sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        Hybrid(config(**sizes), RECIPES[recipe])


def test_what_a_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = build(config(), "fp8"), torch.device("cpu")
    counted = device.ready(model, model.recipe, cpu)
    # 26 layers and the head; ten of them and the head stay high
    assert (counted.high, counted.native, counted.emulated) == (3 * 11, 0, 3 * 14)
    assert device.ready(build(config(), "bf16"), RECIPES["bf16"], cpu).emulated == 0
    with pytest.raises(ConfigError, match=r"e.m. tensor cannot be held on mps; choose the device cpu or cuda"):
        device.ready(model, model.recipe, torch.device("mps"))
    strict = replace(model.recipe, tensor_cores=True)
    with pytest.raises(
        ConfigError, match=r"blocks\.2\.mixer\.in_proj computes e4m3 tensor with e4m3 tensor to bfloat16, for which cpu"
    ):
        device.ready(model, strict, cpu)

    def broken(where: torch.device) -> None:
        raise BackendError("rounds wrongly")

    monkeypatch.setattr(device, "self_test", broken)
    device.ready(build(config(), "ternary"), RECIPES["ternary"], cpu)
    with pytest.raises(BackendError, match="rounds wrongly"):
        model.check_precision()


def test_a_model_is_saved_as_what_it_needs(tmp_path: Path) -> None:
    """Weights trained in FP8 are weights for any precision; ternary ones are not."""
    import plait

    for name, kept in (("fp8", "bf16"), ("ternary", "ternary")):
        plait.save(build(config("M-"), name), tmp_path / name, format="native")
        assert plait.load(tmp_path / name).config.recipe == kept


@pytest.mark.parametrize("base", ["ternary", "int8", "bf16"])
def test_a_model_of_which_some_layers_are_ternary_or_codes_is_saved_as_such(tmp_path: Path, base: str) -> None:
    """A name alone would say that all of them are."""
    import plait
    from plait.formats.error import CheckpointError

    rule = {"role": "mlp.*", "format": "ternary" if base == "bf16" else "bf16"}
    model = build(config("M-"), read({"base": base, "rules": [rule], "gradual": None, "switch": None}), seed=1)
    plait.save(model, tmp_path / "x", format="native")
    again = plait.load(tmp_path / "x")
    assert again.recipe.rules == model.recipe.rules
    for (_, mine, _), (_, theirs, _) in zip(places(model), places(again), strict=True):
        assert type(mine) is type(theirs) and getattr(mine, "number_format", 0) == getattr(theirs, "number_format", 0)
    plait.save(again, tmp_path / "y", format="native")
    ids = torch.arange(8)[None]
    assert torch.equal(plait.load(tmp_path / "y")(ids).logits, again(ids).logits)
    with pytest.raises(CheckpointError, match="cannot say that some of a model's layers are ternary or held as codes"):
        plait.save(again, tmp_path / "hf", format="hf")


def test_a_checkpoint_names_no_file_of_the_machine_that_reads_it() -> None:
    with pytest.raises(ConfigError, match=r"recipe='/etc/mine\.toml': a model names no file"):
        config("M-", recipe="/etc/mine.toml")
    for text in ("{", '{"rules": 3}', '{"a":' * 100_000):
        with pytest.raises(ConfigError, match="rules|JSON"):
            recipe_of(text)


def test_a_recipe_that_rounds_nothing_of_a_model_is_refused() -> None:
    """Four products are all of them first or last: an "fp8" run would be a bfloat16 one, and nobody would know."""
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="'fp8': its rules leave all 5 linear layers in the compute dtype"):
        device.ready(build(config("M-"), "fp8"), RECIPES["fp8"], cpu)
    plain = read({"base": "bf16", "rules": [{"role": "mlp.*", "format": "bf16"}]})
    assert device.ready(build(config("M-"), plain), plain, cpu).emulated == 0


def test_tensor_cores_multiply_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_native", lambda pair, device: True)
    half = replace(RECIPES["mxfp8"], tensor_cores=True)
    whole = replace(half, compute=torch.float32)
    assert device.ready(build(config("M-"), half), half, torch.device("cpu")).emulated == 0
    with pytest.raises(ConfigError, match="to float32, for which cpu has no tensor cores"):
        device.ready(build(config("M-"), whole), whole, torch.device("cpu"))


def test_numbers_of_products_may_be_written_with_a_point() -> None:
    assert not Rule(first=2.0, format=HIGH).matches("mlp.up_proj", Place(i=2, n=100, b=0, B=1))
    assert Rule(first=1.0, format=HIGH).matches("mlp.up_proj", Place(i=99, n=100, b=0, B=1)), "all of them"


def test_formats_are_checked_wherever_they_were_written() -> None:
    turned = TensorFormat(element="e2m1", scale="block", block=(1, 16), scale_element="e4m3", hadamard=True)
    with pytest.raises(ValueError, match="a rotation cancels only if both operands have it"):
        Rule(format=LinearFormat(wgrad=(turned, None)))
    with pytest.raises(ValueError, match="e2m1 has a scale for each block"):
        Rule(format=LinearFormat(fprop=(None, TensorFormat(element="e2m1", scale="tensor"))))


def test_formats_with_nothing_to_say_are_high() -> None:
    assert LinearFormat() == HIGH and not HIGH.operands and not HIGH.is_stochastic and NV4.is_stochastic


def test_a_gradual_recipe_is_read_written_and_refused_where_it_means_nothing() -> None:
    recipe = read({"base": "ternary", "gradual": {"until": 0.5}})
    assert read(write(recipe)) == recipe and recipe.is_needed
    assert [recipe.share(step, 10) for step in (0, 1, 5, 9)] == [0, 0.2, 1, 1]
    assert RECIPES["ternary"].share(0, 10) == 1 and read({"base": "fp8", "gradual": {"until": 0}}).share(0, 10) == 1
    for table, words in (
        ({"base": "bf16", "gradual": {"until": 0.5}}, "no weight is rounded while it is trained"),
        ({"base": "int4", "gradual": {"until": 0.5}}, "no weight is rounded while it is trained"),
        ({"base": "ternary", "gradual": {"until": 2.0}}, "until=2.0: must be a share"),
        ({"base": "ternary", "gradual": {"till": 0.5}}, "till"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(table)
