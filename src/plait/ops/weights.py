"""Where the weights lie that a tape reads: found once as addresses, and whether they are still there.

Weights are read in place, so a change of their values shows at the next token. Where they are float32 masters of a
model that computes in bfloat16, a rounded copy is kept for reading, and made anew when they have changed; training
drops the copies (half of the masters' size). PyTorch counts changes, but not those through `.data`: for these a few
numbers of every copy are compared with its master, others each time. All this is looked at when a cache decodes its
first token, and then at every 32nd: a change of a whole matrix shows there. One of a few numbers through `.data`
may not, so follow it with `model.rounded.clear()`, or change `p` itself under `torch.no_grad()`.
"""

from array import array

import torch
from torch import Tensor, nn

FORMATS = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3, 2: 4}
MOST_GROUPS = 1024  # scales of a row

Home = tuple[dict[str, Tensor | None], str]
# copies of float32 masters in bfloat16, by the layer: the master, its version and address, the copy
Copy = tuple[Tensor, tuple[int, int], Tensor]
Rounded = dict[nn.Module, Copy]


class UnfitError(Exception):
    """This model cannot be written on a tape; the ordinary path serves it."""


class Weights:
    """Addresses of parameters as the words of decode.cpp and gemv.h."""

    def __init__(self, compute: torch.dtype, rounded: Rounded) -> None:
        self._compute, self._rounded = compute, rounded
        # parameters by where their modules keep them
        self._read: list[Home] = []
        self._addresses: list[int] = []
        self._absent: list[Home] = []
        # what was at the addresses stays until its going is noticed
        self._alive: list[Tensor] = []
        self._copies: list[tuple[nn.Module, Copy]] = []
        # of each copy: its master's address, its own, how many numbers
        self.pairs = array("q")

    def has_copies(self) -> bool:
        """Whether the model has kept its rounded copies: training drops all of them."""
        # one stands for all
        return all(self._rounded.get(module) is copy for module, copy in self._copies[:1])

    def is_fresh(self) -> bool:
        """Whether all parameters are where they were, and PyTorch has counted no change of rounded copies' masters."""
        try:
            addresses = [home[name].data_ptr() for home, name in self._read]  # type: ignore[union-attr]
        except (AttributeError, KeyError):
            return False  # one was taken away
        return (
            addresses == self._addresses
            and all(home.get(name) is None for home, name in self._absent)
            # fused optimizers do not count versions, but who trains has dropped the copies
            and all(
                _version(copy[0]) == copy[1][0] and self._rounded.get(module) is copy for module, copy in self._copies
            )
        )

    def forget_copies(self) -> None:
        """Drop the copies that are read: their masters have other values."""
        for module, copy in self._copies:
            if self._rounded.get(module) is copy:
                del self._rounded[module]

    def numbers(self, module: nn.Module, name: str) -> tuple[int, int]:
        """A small parameter as two words, its address and whether it is bfloat16; (0, 0) for None."""
        if getattr(module, name, None) is None:
            self._absent.append((module._parameters, name))  # type: ignore[arg-type]
            return 0, 0
        t = self.find(module, name)
        if t.dtype not in (torch.float32, torch.bfloat16):
            raise UnfitError
        return self._address(module, name, t), int(t.dtype == torch.bfloat16)

    def matrix(self, module: nn.Module) -> tuple[tuple[int, ...], int, int]:
        """A linear layer's weights as the words of gemv.h's Matrix, and its sizes N and K."""
        rounds = self._compute == torch.bfloat16
        if getattr(module, "codes", None) is not None:
            codes, scales = self.find(module, "codes"), self.find(module, "scales")
            bits = int(module.bits)  # type: ignore[arg-type]
            if bits == 2:
                addresses = [self._address(module, name, t) for name, t in (("codes", codes), ("scales", scales))]
                N, K = codes.shape[0], int(module.d_in)  # type: ignore[arg-type]
                return (*addresses, 0, FORMATS[bits], 0, N, K, rounds), N, K
            group = int(module.group)  # type: ignore[arg-type]
            N, K = codes.shape[0], codes.shape[1] * 8 // bits
            if K % 64 or group < 32 or group & (group - 1) or K // group > MOST_GROUPS or scales.dtype != torch.float16:
                raise UnfitError
            addresses = [
                0 if getattr(module, name, None) is None else self._address(module, name, self.find(module, name))
                for name in ("codes", "scales", "zeros")
            ]
            return (*addresses, FORMATS[bits], group, N, K, rounds), N, K
        formats = [getattr(module, name, None) for name in ("number_format", "late_format")]
        # a format of nothing but defaults rounds nothing
        if any(form is not None and form != type(form)() for form in formats):
            raise UnfitError
        w = self.find(module, "weight")
        if w.dtype not in (torch.float32, torch.bfloat16):
            raise UnfitError
        N, K = w.shape
        if w.dtype == torch.float32 and rounds:
            address, stored = self._round(module, w).data_ptr(), torch.bfloat16
        else:
            address, stored = self._address(module, "weight", w), w.dtype
        return (address, 0, 0, FORMATS[stored], 0, N, K, rounds), N, K

    def _round(self, module: nn.Module, w: Tensor) -> Tensor:
        # the master may move without being counted as changed: p.data = t
        state, copy = (_version(w), self._address(module, "weight", w)), self._rounded.get(module)
        if copy is None or copy[0] is not w or copy[1] != state:
            copy = self._rounded[module] = (w, state, w.detach().to(torch.bfloat16))
        self._copies.append((module, copy))
        self.pairs.extend((w.data_ptr(), copy[2].data_ptr(), w.numel()))
        return copy[2]

    def find(self, module: nn.Module, name: str) -> Tensor:
        """A parameter or buffer; UnfitError unless it is a plain, contiguous tensor on the CPU."""
        t = _home(module, name).get(name)
        if type(t) not in (Tensor, nn.Parameter) or not t.is_cpu or not t.is_contiguous():  # type: ignore[union-attr]
            raise UnfitError
        return t  # type: ignore[return-value]

    def _address(self, module: nn.Module, name: str, t: Tensor) -> int:
        self._read.append((_home(module, name), name))
        self._addresses.append(t.data_ptr())
        self._alive.append(t.detach())
        return t.data_ptr()


def _home(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    return module._parameters if name in module._parameters else module._buffers  # type: ignore[return-value]


def _version(t: Tensor) -> int:
    # tensors made in inference mode cannot change outside of it
    return 0 if t.is_inference() else t._version
