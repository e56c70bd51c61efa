"""What a model costs where it will run, layer by layer: parameters, bytes and time, which simply add up.

    total = rest(embedding, head, final norm, what a step costs besides its layers) + sum of layer(i)

Additive costs are what a search needs: it exchanges one layer and knows the new total. Bytes are exact; times come from
a clock: the roofline of a named machine (roofline.py), or blocks measured here (library.py).

Shapes   B sequences of T tokens of context.
Numbers  see numbers.py; a token's keys and values, and the states, in formats of their own.
"""

import math
from dataclasses import dataclass, fields
from typing import Protocol

from plait.compress.numbers import Numbers, layer_weights, rest_weights
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the model will do: read `context` tokens in each of `batch` sequences, then draw `answer` tokens in each."""

    batch: int = 1
    context: int = 8192
    answer: int = 0

    def __post_init__(self) -> None:
        for field, least in (("batch", 1), ("context", 1), ("answer", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field}={value!r}: must be a whole number, at least {least}")

    @property
    def tokens(self) -> int:
        """Tokens of a sequence at its end: what memory must hold."""
        return self.context + self.answer

    @property
    def middle(self) -> int:
        """Tokens of a sequence when half of its answer is drawn: what a step costs on average."""
        return self.context + self.answer // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Of a layer, of the rest, or of a whole model; they add up.

    Bytes: weight_bytes; kv_bytes of all keys and values; state_bytes of scans and convolutions; reserve_bytes, kept
    free. Seconds: prefill_s to read the prompts of all sequences; decode_s of one step of all sequences at the middle
    of their answers. nan without a clock.
    """

    params: int = 0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    state_bytes: float = 0.0
    reserve_bytes: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Everything in memory."""
        return self.weight_bytes + self.kv_bytes + self.state_bytes + self.reserve_bytes

    def __add__(self, other: "LayerCosts") -> "LayerCosts":
        return LayerCosts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(LayerCosts)})


class Clock(Protocol):
    """Tells times of one machine; seconds of prefill and of a decode step."""

    def layer(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> tuple[float, float]:
        """Of one layer."""
        ...

    def rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> tuple[float, float]:
        """Of what is not a layer: embedding, head, final norm, what a call costs however short."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Counts costs under one load, in given number formats, by one clock.

    clock: None where only bytes matter. reserve: bytes for all else (activations of a piece of the prompt, allocator,
    driver), counted once in `rest`.
    """

    load: Load = Load()
    numbers: Numbers = Numbers()
    clock: Clock | None = None
    reserve: int = 0

    def layer(self, spec: LayerSpec, d_model: int) -> LayerCosts:
        """Of one layer in a model of this width, its norm included."""
        cost, load, numbers = KINDS[spec.symbol].cost(spec, d_model), self.load, self.numbers
        prefill_s, decode_s = (math.nan,) * 2 if self.clock is None else self.clock.layer(spec, d_model, load, numbers)
        state = cost.ssm_numbers * numbers.ssm_bytes + cost.conv_numbers * numbers.conv_bytes
        return LayerCosts(
            params=cost.params,
            weight_bytes=layer_weights(spec, d_model, numbers.weights).stored,
            kv_bytes=cost.kv_numbers_per_token * numbers.kv_bytes * load.tokens * load.batch,
            state_bytes=state * load.batch,
            prefill_s=prefill_s,
            decode_s=decode_s,
        )

    def rest(self, config: ModelConfig) -> LayerCosts:
        """Of everything but the layers; depends on the model's width and vocabulary only."""
        times = (math.nan,) * 2 if self.clock is None else self.clock.rest(config, self.load, self.numbers)
        table = config.vocab_size * config.d_model
        return LayerCosts(
            params=table * (1 if config.ties_embeddings else 2) + config.d_model,
            weight_bytes=rest_weights(config, self.numbers.weights).stored,
            reserve_bytes=self.reserve,
            prefill_s=times[0],
            decode_s=times[1],
        )

    def total(self, config: ModelConfig) -> LayerCosts:
        """Of a model: the rest and its layers."""
        return sum((self.layer(spec, config.d_model) for spec in config.layers), self.rest(config))
