"""`plait info`: a model's layers, parameters, bytes and cost, without loading or allocating any of it.

    weights   parameters x bytes of the recipe's numbers; codes and their scales where it holds codes
    decode    bytes of weights and cache that one token of one sequence reads
    cache     (KV bytes per token x context + state bytes per sequence) x batch
    FLOPs     forward pass, multiply-adds counted twice; attention's products over the context come on top

Numbers  KV cache and convolution window in the recipe's compute dtype, SSM state in float32.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from plait.cli.drawing import COLOURS, Drawn, count, flops, pattern, positions, render, size, sizes_of
from plait.cli.launch import arg
from plait.cli.numbers import draw
from plait.cli.weights import weights
from plait.config import nearest
from plait.model.config import ModelConfig
from plait.model.hybrid import recipe_of
from plait.model.layers import KINDS
from plait.model.layers.attention import Attention
from plait.model.layers.moe import MoE
from plait.model.presets import PRESETS

EXAMPLE = """plait info nemotron-h-8b --context 128k
  plait info nemotron-h-8b --recipe int4
  plait info nemotron-h-8b --recipe nvfp4      what every linear layer computes in
  plait info --presets
  plait info path/to/checkpoint --batch 16"""

SSM_BYTES = 4
# float32 master, gradient and two moments of AdamW
TRAINING_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What to describe, and for which load."""

    model: str | None = arg(default=None, help="a preset's name or a checkpoint folder", positional=True)
    context: str | None = arg(
        default=None,
        help="tokens per sequence in the cache, such as 4096 or 128k; the model's own if not given",
    )
    batch: int = arg(default=1, help="sequences at once")
    recipe: str | None = arg(default=None, help="precision, a name or a TOML file; the model's own if not given")
    presets: bool = arg(default=False, help="list all presets")

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")
        if self.model is None and not self.presets:
            raise ValueError(f"which model? give a checkpoint folder or a preset: {', '.join(PRESETS)}")
        if self.context is not None:
            tokens_of(self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a model takes at one context and batch; bytes unless the name says otherwise."""

    params: int
    active_params: int
    weight_bytes: int
    bits_per_parameter: float
    decode_weight_bytes: int
    decode_cache_bytes: int
    training_bytes: int
    flops_per_token: int
    context_flops_per_token: int
    kv_bytes_per_token: int
    ssm_bytes: int
    conv_bytes: int
    cache_bytes: int


def sizes(config: ModelConfig, context: int, batch: int, recipe: str | None = None) -> Sizes:
    """Size a model by arithmetic alone.

    Args:
        config: the model.
        context: tokens per sequence.
        batch: sequences.
        recipe: name of the number format; None takes the model's own.

    Raises: ConfigError for an unknown recipe.
    """
    cost = config.cost()
    held = weights(config, recipe or config.recipe)
    width = recipe_of(recipe or config.recipe).compute.itemsize
    kv = cost.kv_numbers_per_token * width
    ssm, conv = cost.ssm_numbers * SSM_BYTES, cost.conv_numbers * width
    return Sizes(
        params=cost.params,
        active_params=cost.active_params,
        weight_bytes=held.stored,
        bits_per_parameter=held.stored * 8 / cost.params,
        decode_weight_bytes=held.read,
        decode_cache_bytes=kv * context + ssm + conv,
        training_bytes=cost.params * TRAINING_BYTES,
        flops_per_token=cost.flops_per_token,
        context_flops_per_token=cost.flops_per_token_per_key * context,
        kv_bytes_per_token=kv,
        ssm_bytes=ssm,
        conv_bytes=conv,
        cache_bytes=(kv * context + ssm + conv) * batch,
    )


def transformer_like(config: ModelConfig) -> ModelConfig | None:
    """A Transformer of the same width and depth: attention in every other layer; None if the model is one already."""
    if "M" not in config.pattern:
        return None
    attentions = [spec for spec in config.layers if isinstance(spec, Attention)]
    attention = attentions[0] if attentions else Attention(n_heads=8, n_kv_heads=8)
    return replace(config, layers=(attention,) * max(1, len(config.layers) // 2))


def tokens_of(text: str) -> int:
    """Read a number of tokens: 4096, 128k (times 1024), 1m (times 1024 squared).

    Raises: ValueError saying how to write it.
    """
    scale = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if scale == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) < 1:
        raise ValueError(f"context={text!r}: write a number of tokens, such as 4096 or 128k")
    return int(digits) * scale


def run(inputs: Inputs) -> Drawn:
    """Describe one model, or list all presets."""
    context = None if inputs.context is None else tokens_of(inputs.context)
    if inputs.model is None or inputs.presets:
        return _list(context, inputs.batch, inputs.recipe)
    config, where = find_model(inputs.model)
    return _describe(config, where, context or config.max_context, inputs.batch, inputs.recipe)


def find_model(model: str) -> tuple[ModelConfig, str]:
    """A preset's config, or that of a checkpoint folder, and what it is.

    Raises: ValueError naming the nearest preset if it is neither.
    """
    if model in PRESETS:
        return ModelConfig.preset(model), "preset"
    if not Path(model).exists():
        near = nearest(model, PRESETS)
        hint = f"did you mean {near}?" if near else f"presets: {', '.join(PRESETS)}"
        raise ValueError(f"{model!r} is neither a checkpoint nor a preset; {hint}")
    # headers and config only: no weight is read
    from plait.formats.checkpoint import Checkpoint

    return Checkpoint.open(Path(model)).config, model


def _describe(config: ModelConfig, where: str, context: int, batch: int, recipe: str | None) -> Drawn:
    s = sizes(config, context, batch, recipe)
    report = Drawn(config.name or where)
    report.add("pattern", config.pattern)
    for field, unit in _UNITS.items():
        report.add(field.replace("_", " "), getattr(s, field), unit)
    report.add("context", context, "tokens")
    report.add("batch", batch, "sequences")
    table = Table.grid(padding=(0, 2))
    table.add_row("parameters", count(s.params), _share(config))
    if s.active_params != s.params:
        table.add_row("active", count(s.active_params), "parameters that one token is multiplied with")
    table.add_row("weights", size(s.weight_bytes), _weights(config, s, recipe or config.recipe))
    per_token = size(s.decode_weight_bytes + s.decode_cache_bytes)
    table.add_row("decode reads", per_token, f"per token: weights {size(s.decode_weight_bytes)}, the rest cache")
    table.add_row("FLOPs", flops(s.flops_per_token), "per token forward; training takes three times as many")
    if s.context_flops_per_token:
        table.add_row("", flops(s.context_flops_per_token), f"more for attention after {context:,} tokens")
    table.add_row("KV cache", f"{s.kv_bytes_per_token:,} bytes", "per token")
    if s.ssm_bytes:
        # the state of a sequence has one size, whatever its length
        table.add_row("SSM state", size(s.ssm_bytes), f"per sequence, FP32; convolution {size(s.conv_bytes)}")
    n = f"{batch} sequence{'s' * (batch > 1)} of {context:,} tokens"
    table.add_row("cache", size(s.cache_bytes), n)
    other = transformer_like(config)
    if other is not None:
        theirs = sizes(other, context, batch, recipe).cache_bytes
        report.add("transformer cache bytes", theirs, "bytes")
        ratio = (
            f"{theirs / s.cache_bytes:.1f} times this model's" if theirs >= s.cache_bytes else "less than this model's"
        )
        table.add_row("", size(theirs), f"a Transformer with {len(other.layers)} attention layers: {ratio}")
    head = Text.assemble((report.title, "bold"), f"  {where}, {config.family or 'no family'}, ")
    head.append(f"width {config.d_model:,}, vocabulary {config.vocab_size:,}")
    head.append(", tied" if config.ties_embeddings else "")
    parts = [head, "", pattern(config.pattern), "", _legend(config), Rule(style="dim"), table]
    if recipe is not None and recipe_of(recipe).rules:
        parts += [Rule(style="dim"), *draw(report, config, recipe_of(recipe))]
    report.drawing = render(*parts)
    return report


_UNITS = {
    "params": "",
    "active_params": "",
    "weight_bytes": "bytes",
    "bits_per_parameter": "bits",
    "decode_weight_bytes": "bytes",
    "decode_cache_bytes": "bytes",
    "training_bytes": "bytes",
    "flops_per_token": "FLOP",
    "context_flops_per_token": "FLOP",
    "kv_bytes_per_token": "bytes",
    "ssm_bytes": "bytes",
    "conv_bytes": "bytes",
    "cache_bytes": "bytes",
}


def _weights(config: ModelConfig, s: Sizes, recipe: str) -> str:
    """What the weights are held in, in words."""
    if not recipe_of(recipe).weight_only:
        return f"{recipe_of(recipe).name.upper()}; {size(s.training_bytes)} to train with AdamW"
    high = weights(config, recipe).high
    experts = ", experts" * any(isinstance(spec, MoE) for spec in config.layers)
    short = f", {len(high)} matrices whose rows no group divides ({high[0]}, ...)" if high else ""
    dtype = str(recipe_of(recipe).compute).removeprefix("torch.")
    name = recipe_of(recipe).name.upper()
    return f"{name}, {s.bits_per_parameter:.2f} bits per parameter; embedding{experts}{short} in {dtype}"


def _share(config: ModelConfig) -> str:
    tables = config.vocab_size * config.d_model * (1 if config.ties_embeddings else 2)
    return f"{count(tables)} of them embedding{'' if config.ties_embeddings else ' and head'}"


def _legend(config: ModelConfig) -> Table:
    table = Table.grid(padding=(0, 2))
    for spec in dict.fromkeys(config.layers):
        n = config.layers.count(spec)
        kind = KINDS[spec.symbol]
        where = positions(config.layers, lambda layer, spec=spec: layer == spec)
        each = f"{count(kind.cost(spec, config.d_model).params)} each"
        letter = Text(spec.symbol, f"bold {COLOURS[spec.symbol]}")
        table.add_row(letter, f"{n} x {kind.name}", sizes_of(spec), each, "" if where == f"{n} layers" else where)
    return table


def _list(context: int | None, batch: int, recipe: str | None) -> Drawn:
    report = Drawn("presets")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("preset", no_wrap=True)
    for name in ("layers", "parameters", "active", "weights", "KV/token", "SSM state", "context", "cache"):
        table.add_column(name, justify="right")
    for name in PRESETS:
        config = ModelConfig.preset(name)
        tokens = context or config.max_context
        s = sizes(config, tokens, batch, recipe)
        report.add(f"{name} params", s.params)
        report.add(f"{name} weight bytes", s.weight_bytes, "bytes")
        report.add(f"{name} context", tokens, "tokens")
        report.add(f"{name} cache bytes", s.cache_bytes, "bytes")
        kinds = Text(" ").join(
            Text.assemble(f"{config.pattern.count(letter)}", (letter, COLOURS[letter]))
            for letter in KINDS
            if letter in config.pattern
        )
        active = count(s.active_params) if s.active_params != s.params else ""
        state = size(s.ssm_bytes) if s.ssm_bytes else ""
        kv = f"{s.kv_bytes_per_token:,}" if s.kv_bytes_per_token else ""
        row = (count(s.params), active, size(s.weight_bytes), kv, state, f"{tokens:,}", size(s.cache_bytes))
        table.add_row(name, kinds, *row)
    report.drawing = render(table, width=None if sys.stdout.isatty() else 116)
    return report
