"""The one model class: an embedding, a pattern of layers, a norm, a head.

    x = embed(ids);   x = x + mixer_i(norm_i(x)) for every layer i;   logits = head(norm(x))

Shapes   B sequences, L tokens, D model width, V vocabulary.
Numbers  activations in the recipe's compute dtype; parameters in it too, or in float32 as masters for training.
Source   NVIDIA 2025, arXiv:2504.03624 section 2; the same form covers Transformers and pure Mamba-2 models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.model import sigma
from plait.model.cache import Cache
from plait.model.config import ModelConfig
from plait.model.layer import LayerSpec, Norm, Span, State
from plait.model.layers import KINDS
from plait.model.step import step
from plait.ops.attention import document_cuts
from plait.ops.distill import Taught, distillation
from plait.ops.distill_top import top_distillation
from plait.ops.linear import linear
from plait.ops.loss import IGNORED, linear_cross_entropy
from plait.ops.norm import add_rms_norm
from plait.ops.weights import Rounded
from plait.precision.device import Products, ready
from plait.precision.place import settle
from plait.precision.reading import read
from plait.precision.recipe import ALWAYS_FLOAT32, PrecisionRecipe
from plait.precision.weight_only import WeightOnlyLinear, hold_as_codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """logits (B, L, V), or of the last positions only; loss () float32 mean nats per counted token, None unasked.

    hidden_states: the embedding, the stream after each layer, and the final norm's output: n_layers + 2 tensors.
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Block(nn.Module):
    """One layer with its residual: x + mixer(norm(x)), or with the options of LayerSpec."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, recipe: PrecisionRecipe) -> None:
        super().__init__()
        self.norm = Norm(config.d_model, config.norm_eps) if spec.pre_norm else None
        self.post_norm = Norm(config.d_model, config.norm_eps) if spec.post_norm else None
        self.scale = nn.Parameter(torch.empty(config.d_model)) if spec.layer_scale is not None else None
        self.mixer = KINDS[spec.symbol].build(spec, config.d_model, config.norm_eps, recipe)
        self.compute = recipe.compute

    def forward(self, x: Tensor, span: Span, state: object = None) -> Tensor:
        """(B, L, D) to (B, L, D) in x.dtype."""
        y = x if self.norm is None else self.norm(x)
        y = self.mixer(y.to(self.compute), span, state)
        if self.post_norm is not None:
            y = self.post_norm(y)
        if self.scale is not None:
            y = y * self.scale.to(y.dtype)
        return x + y

    @property
    def is_plain(self) -> bool:
        """Whether it is x + mixer(norm(x)), and nobody listens to it or its norm."""
        plain = self.norm is not None and self.post_norm is None and self.scale is None
        heard = (m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in (self, self.norm))
        return plain and not any(heard)


class Hybrid(nn.Module):
    """A language model: token ids in, logits out."""

    def __init__(self, config: ModelConfig, recipe: PrecisionRecipe) -> None:
        """Builds the modules with uninitialised weights; use `build` or `plait.load`."""
        super().__init__()
        self.config, self.recipe = config, recipe
        self.origin: Path | None = None  # folder it was loaded from, where its tokenizer lies
        self.rounded: Rounded = {}  # for decoding; dropped when training goes on
        # fresh weights are drawn by `build`; torch's own draw would cost seconds, on meta too
        self.embed = nn.Embedding(
            config.vocab_size, config.d_model, _weight=torch.empty(config.vocab_size, config.d_model)
        )
        self.blocks = nn.ModuleList(Block(spec, config, recipe) for spec in config.layers)
        self.norm = Norm(config.d_model, config.norm_eps)
        ties = config.ties_embeddings
        head = (
            None if ties and not recipe.copies_head else recipe.linear(config.d_model, config.vocab_size, role="head")
        )
        # the copy of a tied head is worth its memory as codes only
        self.head = head if not ties or isinstance(head, WeightOnlyLinear) else None
        # where the training stands, which all linear layers look at
        self.moment = settle(self, recipe)

    def check_precision(self) -> Products:
        """Refuse a device that cannot train in this precision, or rounds wrongly; errors are those of `ready`."""
        return ready(self, self.recipe, self.device)

    def __getstate__(self) -> Mapping[str, object]:  # type: ignore[override]
        # copies of masters are made anew where they are needed
        return self.__dict__ | {"rounded": {}}

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding itself when they are tied; what its codes stand for when it is held as codes."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    def cache(self, batch: int, capacity: int = 0) -> Cache:
        """An empty cache for `batch` sequences, on this model's device and in its compute dtype.

        Args:
            batch: sequences.
            capacity: tokens of each to make room for at once; it grows beyond them when it must.
        """
        cache = Cache(self.config, batch, device=self.device, dtype=self.recipe.compute)
        cache.reserve(capacity)
        return cache

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        cache: Cache | None = None,
        n_logits: int | None = None,
        output_hidden_states: bool = False,
    ) -> Output:
        """Run the model over B sequences of L tokens.

        Args:
            input_ids: (B, L) int64.
            labels: (B, L) int64, not shifted: position t predicts labels[t + 1]; -100 is left out, and so is what
                would be predicted from padding, of padding, or across the first token of a document.
            attention_mask: (B, L), 1 for a token and 0 for padding, which lies before or after the tokens of a row.
            starts: (B, L) bool, True at the first token of each packed document.
            cache: continue these sequences and remember the tokens; no gradient passes through the layers then.
            n_logits: only for the last so many positions, 0 for none; None is all.
            output_hidden_states: return the residual stream too.

        Returns: see Output.
        Raises: ValueError for ids outside the vocabulary, wrong shapes, padding inside a row, or packing with a cache.
        """
        plain = labels is None and attention_mask is None and starts is None and not output_hidden_states
        if plain and cache is not None and n_logits != 0:
            logits = step(self, input_ids, cache)
            if logits is not None:
                return Output(logits=logits)
        x, streams = self.hidden(
            input_ids, attention_mask=attention_mask, starts=starts, cache=cache, keeps_all=output_hidden_states
        )
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}")
            targets = _next_tokens(labels, attention_mask, starts)
            loss = self.loss_sum(x, targets) / (targets != IGNORED).sum()
        tail = x if n_logits is None else x[:, x.shape[1] - min(n_logits, x.shape[1]) :]
        logits = linear(tail, self.embed.weight.to(tail.dtype)) if self.head is None else self.head(tail)
        return Output(logits=logits, loss=loss, hidden_states=streams if output_hidden_states else None)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        cache: Cache | None = None,
        keeps_all: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The final norm's output (B, L, D) in the compute dtype; with `keeps_all` the whole residual stream too.

        Arguments and errors are those of `forward`.
        """
        self._check(input_ids, attention_mask, starts, cache)
        if self.rounded and torch.is_grad_enabled():
            self.rounded.clear()
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        span = _span(input_ids, mask, starts, cache)
        if cache is not None:
            cache.extend(input_ids.shape[1], mask)
            span = Span(positions=span.positions, mask=mask, key_mask=cache.mask)
        stream = self.recipe.compute
        if self.config.residual_in_fp32:
            stream = torch.promote_types(stream, torch.float32)
        x = F.embedding(input_ids, self.embed.weight).to(stream)
        streams = [x]
        states = [None] * len(self.blocks) if cache is None else cache.states
        if cache is not None and x.is_cuda and not keeps_all and self._can_join():
            with torch.no_grad():
                x = self._joined(x, span, cache.states)
            return x, (x,)
        # what a cache remembers is overwritten by the next call: no gradient could pass through it
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            for block, state in zip(self.blocks, states, strict=True):
                x = block(x, span, state)
                if keeps_all:
                    streams.append(x)
        x = self.norm(x).to(self.recipe.compute)
        return x, (*streams, x)

    def _can_join(self) -> bool:
        heard = self.norm._forward_hooks or self.norm._forward_pre_hooks
        return not heard and all(isinstance(block, Block) and block.is_plain for block in self.blocks)

    def _joined(self, x: Tensor, span: Span, states: Sequence[State | None]) -> Tensor:
        """All layers and the final norm, each addition to the stream in one operation with the norm that follows it."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        norms = [*(block.norm for block in blocks if block.norm is not None), self.norm]
        y = norms[0](x).to(self.recipe.compute)
        for block, state, norm in zip(blocks, states, norms[1:], strict=True):
            y, x = add_rms_norm(block.mixer(y, span, state), x, norm.weight, eps=norm.eps)
        return y

    def loss_sum(self, x: Tensor, targets: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
        """Summed cross-entropy of the head over hidden states.

        Args:
            x: (B, L, D) from `hidden`.
            targets: (B, L) int64, the token each position must predict; -100 is left out.
            scale: multiplies the sum.

        Returns: scalar float32, nats.
        """
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight, targets.flatten(), scale=scale)

    def taught_sum(
        self,
        x: Tensor,
        targets: Tensor,
        teacher: "Hybrid",
        taught: Tensor,
        *,
        temperature: float = 1.0,
        share: float = 1.0,
        scale: float = 1.0,
    ) -> Taught:
        """Summed divergence from a teacher's next-token distributions, mixed with cross-entropy.

        Args:
            x, taught: (B, L, D) from `hidden`, this model's and the teacher's.
            targets: (B, L) int64; -100 is left out.
            temperature, share, scale: see `distillation`.
        """
        heads = self.head_weight, teacher.head_weight
        states = x.flatten(0, 1), heads[0], taught.flatten(0, 1), heads[1]
        return distillation(*states, targets.flatten(), temperature=temperature, share=share, scale=scale)

    def told_sum(
        self,
        x: Tensor,
        targets: Tensor,
        answers: tuple[Tensor, Tensor, Tensor],
        *,
        temperature: float = 1.0,
        share: float = 1.0,
        scale: float = 1.0,
    ) -> Taught:
        """`taught_sum` from answers that a teacher gave before.

        Args:
            x: (B, L, D) from `hidden`.
            targets: (B, L) int64; -100 is left out.
            answers: ids and log-probabilities (B, L, K) of its likeliest tokens, log-probability (B, L) of all others.
            temperature, share, scale: see `top_distillation`.
        """
        flat = [one.flatten(0, 1) for one in (x, *answers, targets)]
        x, ids, log_p, log_rest, targets = flat
        how = {"temperature": temperature, "share": share, "scale": scale}
        return top_distillation(x, self.head_weight, ids, log_p, log_rest, targets, **how)

    def _check(self, input_ids: Tensor, mask: Tensor | None, starts: Tensor | None, cache: Cache | None) -> None:
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, length), neither zero")
        if input_ids.is_cpu:  # on a GPU the check would wait for the device; there the embedding itself traps
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"input_ids holds token id {wrong}, outside the vocabulary of {self.config.vocab_size}; "
                    "is this the model's own tokenizer?"
                )
        for name, t in (("attention_mask", mask), ("starts", starts)):
            if t is not None and t.shape != input_ids.shape:
                raise ValueError(f"{name} has shape {tuple(t.shape)}, input_ids {tuple(input_ids.shape)}")
        if mask is not None:
            real = mask.bool()
            runs = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(1)
            continued = cache is not None and bool(((cache.lengths > 0) & real.any(1) & ~real[:, 0]).any())
            if bool((runs > 1).any()) or continued:
                raise ValueError("attention_mask has padding between tokens; it may lie before or after them only")
        if cache is not None:
            if starts is not None:
                raise ValueError("starts and cache: packed documents cannot be continued; run each document in a row")
            if cache.batch != input_ids.shape[0]:
                raise ValueError(f"cache holds {cache.batch} sequences, input_ids {input_ids.shape[0]}")


def _span(input_ids: Tensor, mask: Tensor | None, starts: Tensor | None, cache: Cache | None) -> Span:
    L, device = input_ids.shape[1], input_ids.device
    steps = torch.arange(L, device=device)[None]
    if cache is not None:
        begun = cache.lengths[:, None]
        real = steps if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
        return Span(positions=begun + real, mask=mask)
    if starts is not None:
        starts = starts.bool()
        last_start = torch.where(starts, steps, 0).cummax(1).values
        documents = starts.long().cumsum(1)
        return Span(
            positions=steps - last_start,
            mask=mask,
            starts=starts,
            documents=documents,
            key_mask=mask,
            cuts=document_cuts(documents, mask),
        )
    positions = steps if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
    return Span(positions=positions, mask=mask, key_mask=mask)


def _next_tokens(labels: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """(B, L) what each position must predict, -100 where nothing.

    Raises: ValueError if nothing is left to predict, as the mean over no token is no number.
    """
    following = labels[:, 1:]
    if starts is not None:
        following = following.masked_fill(starts.bool()[:, 1:], IGNORED)
    if mask is not None:
        following = following.masked_fill(~(mask.bool()[:, 1:] & mask.bool()[:, :-1]), IGNORED)
    if not bool((following != IGNORED).any()):
        raise ValueError("labels leave no token to predict: each is -100, padding, or the first of its document")
    return F.pad(following, (0, 1), value=IGNORED)


def recipe_of(name: str | PrecisionRecipe) -> PrecisionRecipe:
    """A recipe by its name or the path of its TOML file; ConfigError naming the nearest one otherwise."""
    return read(name)


@torch.no_grad()
def build(
    config: ModelConfig, recipe: str | PrecisionRecipe = "bf16", device: str | torch.device = "cpu", seed: int = 0
) -> Hybrid:
    """A model with fresh weights: float32 masters, computed in what the recipe says; codes if it is weight-only.

    Args:
        config: its sizes.
        recipe: a name from plait.precision.RECIPES, or a recipe.
        device: where to put it; the weights are the same wherever it is.
        seed: of the random weights; codes are those of the weights that a plain recipe would draw.

    Raises: ConfigError for an unknown recipe.
    """
    chosen = recipe_of(recipe)
    with torch.device("meta"):
        model = Hybrid(config, chosen.masters)
        coded = Hybrid(config, chosen) if chosen.weight_only else None
    generator = torch.Generator().manual_seed(seed)
    model.embed.to_empty(device="cpu").weight.normal_(0.0, config.init_std, generator=generator)
    for i, spec in enumerate(config.layers):
        block = model.blocks[i].to_empty(device="cpu")
        assert isinstance(block, Block)
        for norm in (block.norm, block.post_norm):
            if norm is not None:
                norm.weight.fill_(1.0)
        if block.scale is not None:
            block.scale.fill_(spec.layer_scale or 0.0)
        KINDS[spec.symbol].init(block.mixer, config.init_std, len(config.layers), generator)
        sigma.begin(block.mixer, generator)
        if coded is not None:
            # block by block, so that one block at a time is in memory as masters
            hold_as_codes(model, coded, f"blocks.{i}", chosen.compute)
    model.norm.to_empty(device="cpu").weight.fill_(1.0)
    if model.head is not None:
        model.head.to_empty(device="cpu").weight.normal_(0.0, config.init_std, generator=generator)
    if coded is not None:
        if config.ties_embeddings and isinstance(coded.head, WeightOnlyLinear):
            coded.head.quantize(model.embed.weight)
            model.head = coded.head
        elif model.head is not None:
            hold_as_codes(model, coded, "head", chosen.compute)
        model.recipe = chosen
        for name, parameter in model.named_parameters():
            if not name.endswith(ALWAYS_FLOAT32):
                parameter.data = parameter.to(chosen.compute)
    return model.to(device)
