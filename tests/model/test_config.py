"""ModelConfig: patterns, sections, round trips, errors; presets against the papers' numbers."""

import pytest
from tests.model.sizes import FAMILIES as KNOWN
from tests.model.sizes import STABLE

from plait.config import ConfigError
from plait.model.config import ModelConfig
from plait.model.layers import KINDS
from plait.model.presets import PRESETS

# papers.md 1.1: parameters, layers by kind, KV bytes per token in BF16, SSM state in FP32 (MiB)
PAPERS = {
    "nemotron-h-4b": ("4.489", (24, 4, 24), 16384, 84),
    "nemotron-h-8b": ("8.101", (24, 4, 24), 16384, 96),
    "nemotron-h-47b": ("46.79", (45, 5, 48), 20480, 720),
    "nemotron-h-56b": ("56.32", (54, 10, 54), 40960, 864),
    "nemotron-nano-12b-v2": ("12.31", (28, 6, 28), 24576, 140),
    "nemotron-nano-9b-v2": ("8.888", (27, 4, 25), 16384, 135),
}
# counts of the released weights
RELEASED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "bitnet-2b4t": 2_412_820_480,
    "mamba2-2.7b": 2_702_599_680,
}


FAMILIES = KNOWN | STABLE


@pytest.mark.parametrize("name", PAPERS)
def test_presets_have_the_papers_numbers(name: str) -> None:
    params, kinds, kv_bytes, state_mib = PAPERS[name]
    config = ModelConfig.preset(name)
    cost = config.cost()
    digits = len(params.split(".")[1])
    assert f"{cost.params / 1e9:.{digits}f}" == params
    assert tuple(config.pattern.count(k) for k in "M*-") == kinds
    assert 2 * cost.kv_numbers_per_token == kv_bytes
    assert 4 * cost.ssm_numbers / 2**20 == state_mib


@pytest.mark.parametrize("name", RELEASED)
def test_presets_count_as_the_released_weights(name: str) -> None:
    assert ModelConfig.preset(name).cost().params == RELEASED[name]


def test_in_proj_widths_are_the_papers() -> None:
    widths = {n: KINDS["M"].spec and ModelConfig.preset(n).layers[0].d_in_proj for n in PAPERS}  # type: ignore[attr-defined]
    assert list(widths.values()) == [16496, 18560, 37120, 37120, 22656, 22656]


def test_nemotron_3_nano_has_31_6_billion_and_3_6_active() -> None:
    config = ModelConfig.preset("nemotron-3-nano-30b-a3b")
    assert [config.pattern.count(k) for k in "ME*"] == [23, 23, 6]
    assert f"{config.cost().params / 1e9:.1f} {config.cost().active_params / 1e9:.1f}" == "31.6 3.6"


@pytest.mark.parametrize("name", [*PRESETS, *FAMILIES])
def test_a_config_survives_its_dictionary(name: str) -> None:
    config = ModelConfig.preset(name) if name in PRESETS else FAMILIES[name]
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_layers_of_one_kind_may_differ() -> None:
    layers = [{"kind": "-", "d_ff": 8}, {"kind": "-", "d_ff": 12}]
    config = ModelConfig.from_dict({"vocab_size": 10, "d_model": 4, "layers": layers})
    assert [spec.d_ff for spec in config.layers] == [8, 12]  # type: ignore[attr-defined]
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_preset_can_be_changed_in_its_plain_fields() -> None:
    config = ModelConfig.from_dict({"preset": "nemotron-h-8b", "vocab_size": 1000})
    assert config.vocab_size == 1000 and config.pattern == ModelConfig.preset("nemotron-h-8b").pattern


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "M-X"}, "unknown layer letter 'X' at position 2"),
        ({"pattern": "M*"}, r"add \[attention\]"),
        ({"patern": "M"}, "did you mean 'pattern'"),
        ({"mamba2": {"n_heads": 2, "n_goups": 1}}, "n_groups"),
        ({"mamba2": {"n_heads": 3, "n_groups": 2}}, "n_groups=2 does not divide n_heads=3"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"preset": "nemotron-h-8"}, "did you mean 'nemotron-h-8b'"),
        ({"pattern": ""}, "at least one layer"),
        ({"pattern": None}, "pattern: give a pattern"),
    ],
    ids=str,
)
def test_bad_configs_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "vocab_size": 10,
        "d_model": 4,
        "pattern": "M-",
        "mamba2": {"n_heads": 2, "n_groups": 1},
        "mlp": {"d_ff": 8},
    }
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(good | change)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("mamba2", {"n_groups": 0}),
        ("mamba2", {"chunk": 0}),
        ("mamba2", {"d_state": -8}),
        ("mamba2", {"conv_width": 0}),
        ("mamba2", {"dt_min": -1.0}),
        ("mamba2", {"dt_limit": [1.0, 0.5]}),
        ("attention", {"n_kv_heads": 0}),
        ("attention", {"rope": {"base": 0.0}}),
        ("attention", {"rope": {"scaling": "yarn", "low": 4.0, "high": 1.0}}),
        ("mlp", {"d_ff": 0}),
        ("moe", {"n_chosen": 0}),
        ("moe", {"d_latent": 0}),
        ("moe", {"n_chosen": 3, "n_experts": 4, "n_groups": 2, "n_top_groups": 1}),
        ("", {"norm_eps": -1.0}),
        ("", {"init_std": 0.0}),
    ],
    ids=str,
)
def test_sizes_that_no_layer_can_have_are_refused_by_name(section: str, change: dict[str, object]) -> None:
    good = FAMILIES["hybrid"].to_dict()
    bad = good | ({section: good[section] | change} if section else change)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=rf"{section}.*{next(iter(change))}"):
        ModelConfig.from_dict(bad)
