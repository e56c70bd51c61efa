"""What rounding does to an operand: how large it is, how much of it becomes zero, how much is cut off.

    amax         max |x|
    underflow    share of the numbers that are not zero, but are rounded to zero
    saturation   share of the numbers that lie above the largest of their block once it is rounded: only scales that are
                 themselves rounded to E4M3 let this happen

Numbers  () float32, on the operand's device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from plait.precision.operand import Operand

# takes a figure's name, such as "x.amax", and its value
Watch = Callable[[str, Tensor], None]


@torch.no_grad()
def tell(watch: Watch, name: str, x: Tensor, rounded: Operand) -> None:
    """Tell the figures of an operand x (R, C); of a rotated one only amax, of what it was before.

    Args:
        watch: is called once per figure.
        name: of the operand: "x", "w" or "dy".
        rounded: x in its format, of the same order of dimensions.
    """
    form = rounded.form
    watch(f"{name}.amax", x.abs().amax().float())
    if form is None or form.hadamard:
        return
    values, descale = rounded.opened(torch.float32)
    there = x != 0
    watch(f"{name}.underflow", ((values == 0) & there).sum() / there.sum().clamp(min=1))
    above = torch.zeros((), device=x.device)
    if form.scale == "block" and form.scale_element == "e4m3":
        r, c = form.block
        size = (values if descale is None else values * descale).abs().unflatten(-1, (-1, c)).unflatten(0, (-1, r))
        most = size.amax((1, 3), keepdim=True)
        above = (x.float().abs().unflatten(-1, (-1, c)).unflatten(0, (-1, r)) > most * (1 + 1e-6)).float().mean()
    watch(f"{name}.saturation", above)
