"""What becomes of ternary codes in training: how many are zero, and how many have changed since one looked last.

    NAME.w.zeros      share of codes that are 0
    NAME.w.flipped    share of codes that are another than at the last look; from the second look on

Masters move a little in every step, codes only when a master crosses half the mean magnitude: a run whose codes no
longer flip has stopped learning, one where they flip as often as ever has not settled. What was seen last is kept at
two bits a weight, and not in checkpoints: a resumed run has no flips at its first look.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Flips:
    """Looks at a model's ternary codes from time to time."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        """Figures by name; empty for a model without ternary layers that are trained."""
        found: dict[str, Tensor] = {}
        for name, layer in model.named_modules():
            codes = layer.ternary_codes() if hasattr(layer, "ternary_codes") else None  # type: ignore[operator]
            if codes is None:
                continue
            found[f"{name}.w.zeros"] = (codes == 0).float().mean()
            packed = _packed(codes)
            if name in self.before:
                found[f"{name}.w.flipped"] = _differing(packed, self.before[name]) / codes.numel()
            self.before[name] = packed
        # one wait for the device
        values = torch.stack(list(found.values())).tolist() if found else []
        return dict(zip(found, values, strict=True))


def _packed(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 in bytes of four, missing ones as -1."""
    fields = F.pad((codes.flatten() + 1).to(torch.uint8), (0, -codes.numel() % 4)).unflatten(0, (-1, 4))
    a, b, c, d = fields.unbind(1)
    return a | b << 2 | c << 4 | d << 6


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """How many pairs of bits differ."""
    bits = a ^ b
    either = bits | bits >> 1
    return torch.stack([(either >> shift & 1).sum() for shift in (0, 2, 4, 6)]).sum()
