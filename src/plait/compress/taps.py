"""Watches activations while a model reads, and keeps running sums of them: memory does not grow with what is read.

For an activation a (B, L, D) whose D channels are units of P channels each, under the name of its tap:

    l1        sum over sequences of (mean over tokens of |a|)^2                     (D,)   the published aggregate
    square    sum over tokens of a^2                                               (D,)
    moments   sum over tokens of a_u a_u^T for each unit u, in its place            (D / P, P, P), squares on diagonals
    sketch    sum over tokens of a r^T, r (K,) random numbers of the token         (D, K)

Sketches of two units are proportional if their activities are, and hardly ever otherwise: cosines of sketches are off
by about (1 - cos^2) / sqrt(K). All taps of a batch share r, and r depends on seed and batch alone.

Numbers  sums of a few tokens in float32, those in turn in float64: whatever way a pass is divided into runs, the sums
         are the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

K = 16
# tokens whose copy in float32 is made at a time
TOKENS = 256

Hook = Callable[[Tensor], None]


@dataclass(slots=True)
class Taps:
    """The taps of one pass; `begin` before each batch."""

    seed: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    batch: int = 0
    starts: Tensor | None = None

    def begin(self, batch: int, ids: Tensor, starts: Tensor | None) -> None:
        """Make ready for batch number `batch`, whose ids are (B, L), with the beginnings of packed documents."""
        self.batch, self.starts = batch, starts
        self.noise = torch.randn(*ids.shape, K, generator=self.generator()).to(ids.device)

    def generator(self) -> torch.Generator:
        """A source of random numbers that depends on seed and batch alone."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.batch)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, kept in float64 on the CPU."""
        value = value.detach().to("cpu", torch.float64)
        held = self.sums.get(name)
        if held is None:
            self.sums[name] = value.clone()
        else:
            held += value

    def output(self, name: str, module: nn.Module, hook: Hook) -> None:
        """Call hook with what the module gives; a name is listened to once."""
        self.around(name, module, lambda x, y: hook(y))

    def input(self, name: str, module: nn.Module, hook: Hook) -> None:
        """Call hook with what the module is given first."""

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hook(args[0])

        if self._is_new(name):
            self.handles.append(module.register_forward_pre_hook(before))

    def around(self, name: str, module: nn.Module, hook: Callable[[Tensor, Tensor], None]) -> None:
        """Call hook with the module's first input and its output."""

        def after(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            hook(args[0], y)

        if self._is_new(name):
            self.handles.append(module.register_forward_hook(after))

    def fold(self, name: str, *, size: int = 0, l1: bool = True, sketch: bool = True) -> Hook:
        """A hook that keeps the sums of this file's formulae.

        Args:
            name: their prefix.
            size: P, channels of a unit whose moments are wanted; 0 for squares alone.
            l1, sketch: whether these are wanted.
        """

        def hook(x: Tensor) -> None:
            # some layers see the batch as one row of tokens
            x = x.reshape(*self.noise.shape[:2], x.shape[-1])
            magnitude, square, moments, projected = 0.0, 0.0, 0.0, 0.0
            wide = torch.promote_types(x.dtype, torch.float32)
            step = max(TOKENS // x.shape[0], 1)
            for begin in range(0, x.shape[1], step):
                a = x[:, begin : begin + step].to(wide)  # (B, l, D)
                flat = a.flatten(0, 1)
                if sketch:
                    noise = self.noise[:, begin : begin + step].flatten(0, 1).to(wide)
                    projected = projected + flat.mT @ noise
                if size:
                    heads = flat.unflatten(-1, (-1, size)).transpose(0, 1)  # (units, T, P)
                    moments = moments + heads.mT @ heads
                else:
                    square = square + flat.square().sum(0)
                if l1:
                    magnitude = magnitude + a.abs().sum(1)
            if isinstance(magnitude, Tensor):
                self.add(f"{name}.l1", (magnitude / x.shape[1]).square().sum(0))
            for kind, value in (("square", square), ("moments", moments), ("sketch", projected)):
                if isinstance(value, Tensor):
                    self.add(f"{name}.{kind}", value)

        return hook

    def close(self) -> None:
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _is_new(self, name: str) -> bool:
        is_new = name not in self.names
        self.names.add(name)
        return is_new
