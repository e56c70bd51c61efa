"""What a model needs of a machine, by arithmetic alone: memory, and the time that no implementation can beat.

    memory    weights + (KV per token x context + states) x batch + activations of one piece of the prompt
    prefill   max( FLOPs / speed, bytes / bandwidth )
    decode    the same for each part of a step (matrices, keys and values, states), added up

Prefill counts matrices once per token (the head once per prompt), attention's products over half of the context (it is
causal) and the scan's. A decode step reads the weights once for the whole batch, every sequence's keys and values, and
reads and writes its states. Of experts a pass reads those that its tokens choose, on average if all are chosen alike:
k of E by one token, E (1 - (1 - k / E)^tokens) by several.

Shapes   B sequences, T tokens of context.
Numbers  keys, values, convolution windows and activations in the compute dtype, states of the scan in float32.
"""

from dataclasses import dataclass, replace

from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec
from plait.model.layers import KINDS
from plait.model.layers.attention import Attention
from plait.model.layers.mamba2 import Mamba2
from plait.model.layers.mlp import MLP
from plait.model.layers.moe import MoE

GIB = 2**30
SSM_BYTES = 4
# tokens of a piece, as the engine takes them
PIECE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """memory: bytes a program can have. bandwidth: bytes/s. flops: FLOP/s of dense products; both None if unknown."""

    memory: int
    bandwidth: float | None = None
    flops: float | None = None

    @property
    def reserve(self) -> int:
        """Bytes that are better left free: allocator, driver, activations."""
        return min(2 * GIB, self.memory // 10)


# memory as the driver reports it to a program, less than the box says (RTX 5090: 31.36 of 32 GiB); bandwidth of the
# datasheet; bfloat16 speed that large products reach: measured for H200, about 80 % of the datasheet's for the others
MACHINES = {
    "b200": Machine(memory=178 * GIB, bandwidth=8e12, flops=1800e12),
    "h200": Machine(memory=139 * GIB, bandwidth=4.8e12, flops=790e12),
    "h100": Machine(memory=79 * GIB, bandwidth=3.35e12, flops=750e12),
    "a100": Machine(memory=79 * GIB, bandwidth=2.04e12, flops=250e12),
    "l40s": Machine(memory=round(44.4 * GIB), bandwidth=0.864e12, flops=290e12),
    "rtx5090": Machine(memory=round(31.36 * GIB), bandwidth=1.79e12, flops=168e12),
    "rtx4090": Machine(memory=round(23.64 * GIB), bandwidth=1.01e12, flops=132e12),
    "a10g": Machine(memory=22 * GIB, bandwidth=0.6e12, flops=70e12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model needs at one context and batch.

    Bytes: weights, held; read, of them by one token; unread, of each layer of experts, what one token leaves out, and
    the share of it that each further token leaves out; kv_per_token, ssm, conv, of one sequence; activations, of one
    piece of the prompt. FLOPs: matrix and head, per token; key, attention's per token and key; scan, per token of a
    prompt; state, per decoded token.
    """

    batch: int
    context: int
    weights: int
    read: int
    kv_per_token: int
    ssm: int
    conv: int
    activations: int
    matrix_flops: int
    head_flops: int
    key_flops: int
    scan_flops: int
    state_flops: int
    unread: tuple[tuple[float, float], ...] = ()

    @property
    def kv(self) -> int:
        """Bytes of all keys and values."""
        return self.kv_per_token * self.context * self.batch

    @property
    def states(self) -> int:
        """Bytes of all states of constant size."""
        return (self.ssm + self.conv) * self.batch

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.kv + self.states + self.activations

    def at(self, *, batch: int | None = None, context: int | None = None) -> "Needs":
        """The same model at another batch or context."""
        return replace(self, batch=batch or self.batch, context=context or self.context)

    def reading(self, tokens: int) -> float:
        """Bytes of the weights that a pass over so many tokens reads."""
        return self.read + sum(left * (1 - share ** (tokens - 1)) for left, share in self.unread)

    def prefill_flops(self) -> tuple[float, float, float]:
        """FLOPs of reading the whole context of one sequence: matrices, attention, scan."""
        T = self.context
        return T * self.matrix_flops + self.head_flops, self.key_flops / 2 * T * T, T * self.scan_flops

    def prefill_bytes(self, piece: int = PIECE) -> float:
        """Bytes read for one sequence: weights once per piece, and its past keys and values."""
        pieces = -(-self.context // piece)
        weights = self.reading(min(piece, self.context))
        return pieces * (weights + self.kv_per_token * self.context / 2) + 2 * pieces * self.ssm

    def decode_bytes(self) -> tuple[float, float, float]:
        """Bytes of one step over the batch: matrices, keys and values, states read and written."""
        return self.reading(self.batch), self.kv, 2 * self.states

    def decode_flops(self) -> tuple[float, float, float]:
        """FLOPs of one step over the batch, in the same parts."""
        B = self.batch
        linear = self.matrix_flops + self.head_flops
        return B * linear, B * self.context * self.key_flops, B * self.state_flops


def needs(
    config: ModelConfig,
    *,
    batch: int,
    context: int,
    width: int = 2,
    weights: int | None = None,
    read: int | None = None,
    piece: int = PIECE,
) -> Needs:
    """Add up a model.

    Args:
        config: the model.
        batch, context: sequences, and tokens of each.
        width: bytes of a number in the compute dtype.
        weights: bytes of the weights where codes hold them; None is `width` each.
        read: of them, bytes that one token reads; None is all but an untied embedding.
        piece: tokens of a piece of the prompt, over all sequences.
    """
    cost = config.cost()
    table = config.vocab_size * config.d_model
    matrices = cost.active_params - (1 if config.ties_embeddings else 2) * table
    if weights is None:
        weights = cost.params * width
    if read is None:
        read = (matrices + table) * width
    widest = max(_activations(spec, config.d_model) for spec in config.layers)
    stream = 4 if config.residual_in_fp32 else width
    tokens = min(piece, context * batch)
    return Needs(
        batch=batch,
        context=context,
        weights=weights,
        read=read,
        kv_per_token=cost.kv_numbers_per_token * width,
        ssm=cost.ssm_numbers * SSM_BYTES,
        conv=cost.conv_numbers * width,
        # the stream, its norm, and what the widest layer holds at once
        activations=tokens * (config.d_model * (stream + width) + widest * width),
        matrix_flops=2 * matrices,
        head_flops=2 * table,
        key_flops=cost.flops_per_token_per_key,
        scan_flops=sum(scan_flops(spec) for spec in config.layers),
        state_flops=6 * cost.ssm_numbers,
        # stacked experts are in the compute dtype whatever the recipe
        unread=tuple(_unread(spec, config.d_model, width) for spec in config.layers if isinstance(spec, MoE)),
    )


def prefill_s(n: Needs, machine: Machine) -> float:
    """Seconds to read the context of one sequence, at least."""
    return bound_s(sum(n.prefill_flops()), n.prefill_bytes(), machine)


def decode_s(n: Needs, machine: Machine) -> float:
    """Seconds of one decode step over the batch, at least."""
    return sum(bound_s(f, b, machine) for f, b in zip(n.decode_flops(), n.decode_bytes(), strict=True))


def max_batch(n: Needs, machine: Machine, reserve: int | None = None) -> int:
    """Sequences of this context that fit, 0 if not even one does.

    Args:
        n: whose batch is not looked at.
        machine: its memory.
        reserve: bytes left free for everything else, the activations of a piece included; None is the machine's.
    """
    kept = machine.reserve if reserve is None else reserve
    free = machine.memory - n.weights - max(kept, n.activations)
    return max(0, int(free // max(n.at(batch=1).kv + n.ssm + n.conv, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """tokens_per_s: drawn, in the time of prefill and decode. decode_only: in decode's. share: of prefill in it."""

    batch: int
    tokens_per_s: float
    decode_only: float
    share: float


def rate(n: Needs, machine: Machine, answer: int, reserve: int | None = None) -> Rate | None:
    """The most that a machine can draw: prompts of `n.context` tokens, answers of `answer`, at the largest batch.

    Returns: None if not even one sequence fits.
    """
    batch = max_batch(n.at(context=n.context + answer), machine, reserve)
    if not batch:
        return None
    read = batch * prefill_s(n, machine)
    drawn = answer * decode_s(n.at(batch=batch, context=n.context + answer // 2), machine)
    return Rate(
        batch=batch,
        tokens_per_s=batch * answer / (read + drawn),
        decode_only=batch * answer / drawn,
        share=read / (read + drawn),
    )


def bound_s(flops: float, n_bytes: float, machine: Machine) -> float:
    """Seconds that so many operations and bytes take at least.

    Raises: ValueError if the machine's speed is not known.
    """
    if machine.flops is None or machine.bandwidth is None:
        raise ValueError("the machine's speed is not known; name a machine instead of a size")
    return max(flops / machine.flops, n_bytes / machine.bandwidth)


def left_out(spec: LayerSpec) -> float:
    """Share of a layer's experts that one token does not choose; each further one leaves that share of them out."""
    return 1 - spec.n_chosen / spec.n_experts if isinstance(spec, MoE) else 0.0


def _unread(spec: LayerSpec, d_model: int, width: int) -> tuple[float, float]:
    cost = KINDS[spec.symbol].cost(spec, d_model)
    return (cost.params - cost.active_params) * width, left_out(spec)


def scan_flops(spec: LayerSpec) -> int:
    """FLOPs of a layer's scan for one token of a prompt, by products over chunks."""
    if not isinstance(spec, Mamba2):
        return 0
    inside = 2 * spec.chunk * (spec.n_groups * spec.d_state + spec.d_inner)
    return inside + 4 * spec.d_inner * spec.d_state


def _activations(spec: LayerSpec, d_model: int) -> int:
    """Numbers that a mixer holds at once for each token of a call that needs no gradient."""
    match spec:
        case Mamba2():
            # the projection, the convolution's input behind its past and its result, the scan's, the norm's
            return spec.d_in_proj + 2 * spec.conv_dim + 2 * spec.d_inner
        case Attention():
            # queries, their result and its projection; keys and values once more than the cache has
            return 2 * spec.n_heads * spec.head_dim + 2 * spec.n_kv_heads * spec.head_dim + d_model
        case MLP():
            return (3 if spec.gated else 2) * spec.d_ff + d_model
        case MoE():
            chosen = spec.n_chosen * (2 * spec.d_ff + 2 * (spec.d_latent or d_model))
            return chosen + 2 * spec.d_shared + 2 * d_model
    return 2 * d_model
