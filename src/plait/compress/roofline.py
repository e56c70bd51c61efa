"""A clock that needs no machine: times that no implementation can beat on a named one, by its FLOP/s and bytes/s.

    prefill of a layer   max( FLOPs / speed, bytes / bandwidth )
    decode of a layer    the same for each of its parts (matrices, keys and values, states), added up

What model/plan.py says of a whole model, said of each layer. Weights in few bits are read in few bits and multiplied in
bfloat16.
"""

from dataclasses import dataclass

from plait.compress.costs import Load
from plait.compress.numbers import Numbers, layer_weights, rest_weights
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.plan import PIECE, Machine, bound_s, scan_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A clock; machine: whose bandwidth and FLOP/s must be known. piece: tokens of prompts that are read at once."""

    machine: Machine
    piece: int = PIECE

    def layer(self, spec: LayerSpec, d_model: int, load: Load, numbers: Numbers) -> tuple[float, float]:
        """Seconds of prefill and of a decode step of one layer."""
        cost, batch, tokens = KINDS[spec.symbol].cost(spec, d_model), load.batch, load.context

        def read(together: int) -> float:
            return layer_weights(spec, d_model, numbers.weights, together).read

        token_bytes, ssm = cost.kv_numbers_per_token * numbers.kv_bytes, cost.ssm_numbers * numbers.ssm_bytes
        # the recurrence is counted by itself, in another form for prompts than for steps
        matrices = cost.flops_per_token - 6 * cost.ssm_numbers
        flops = batch * tokens * (matrices + scan_flops(spec) + cost.flops_per_token_per_key * tokens / 2)
        # each piece of all prompts reads the weights once; each piece of a sequence its past keys and its states
        past = batch * -(-tokens // self.piece) * (token_bytes * tokens / 2 + 2 * ssm)
        prefill = self._s(flops, -(-batch * tokens // self.piece) * read(min(self.piece, batch * tokens)) + past)
        keys, state = batch * load.middle, ssm + cost.conv_numbers * numbers.conv_bytes
        decode = self._s(batch * matrices, read(batch))
        decode += self._s(keys * cost.flops_per_token_per_key, keys * token_bytes)
        decode += self._s(batch * 6 * cost.ssm_numbers, batch * 2 * state)
        return prefill, decode

    def rest(self, config: ModelConfig, load: Load, numbers: Numbers) -> tuple[float, float]:
        """Seconds of the head, once per prompt, and once per sequence of a decode step."""
        held = rest_weights(config, numbers.weights)
        seconds = self._s(load.batch * 2 * config.vocab_size * config.d_model, held.read)
        return seconds, seconds

    def _s(self, flops: float, n_bytes: float) -> float:
        return bound_s(flops, n_bytes, self.machine)
