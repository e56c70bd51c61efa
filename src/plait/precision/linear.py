"""The linear layer of every model: float32 or low-precision masters, computed in what its format says.

    y = q_x(x) q_w(W)^T + b

Numbers  the weight is cast to x.dtype at each call, so float32 masters train a bfloat16 model without autocast.
"""

import torch
from torch import Tensor, nn

from plait.ops.linear import linear
from plait.precision.figures import Watch
from plait.precision.format import HIGH, LinearFormat
from plait.precision.moment import Moment
from plait.precision.operand import ternary
from plait.precision.three import Call, three_gemms

Parts = tuple[tuple[str, int], ...]


class Linear(nn.Module):
    """A weight (d_out, d_in), an optional bias, and the numbers they are used in.

    role: what it is to its layer, such as "mlp.up_proj". parts: names and rows of what a fused weight consists of.
    number_format: of its products; late_format: after the recipe's late switch. name, moment: its place in the model
    and in the training, which decide random rounding; the model sets them. watch: is told what rounding does.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        bias: bool = False,
        number_format: LinearFormat = HIGH,
        role: str = "",
        parts: Parts = (),
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.role, self.parts = role, parts
        self._formats = number_format, number_format
        self._is_plain = number_format == HIGH, number_format == HIGH
        self.name, self.moment = "", Moment()
        self.watch: Watch | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def number_format(self) -> LinearFormat:
        """Of its products."""
        return self._formats[0]

    @number_format.setter
    def number_format(self, form: LinearFormat) -> None:
        self._formats, self._is_plain = (form, self._formats[1]), (form == HIGH, self._is_plain[1])

    @property
    def late_format(self) -> LinearFormat:
        """After the recipe's late switch."""
        return self._formats[1]

    @late_format.setter
    def late_format(self, form: LinearFormat) -> None:
        self._formats, self._is_plain = (self._formats[0], form), (self._is_plain[0], form == HIGH)

    def n_high(self, form: LinearFormat) -> int:
        """Trailing rows that a format leaves as they are."""
        return sum(rows for name, rows in self.parts if name in form.high)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out), in x.dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # the compiler looks at these two again at every call; what it finds in a format, it takes for all layers' own
        if self._is_plain[self.moment.is_late]:
            return linear(x, self.weight.to(x.dtype), bias)
        if torch.compiler.is_compiling():
            # here, since it brings the compiler: 150 MB and two seconds that other models do without
            from plait.precision.uncompiled import three_gemms_of

            y = three_gemms_of(self, x)
        else:
            y = three_gemms(x, self.weight, self.call())
        return y if bias is None else y + bias

    @torch.no_grad()
    def ternary_codes(self) -> Tensor | None:
        """(n, d_in) int8: the codes -1, 0, 1 of the rows that are computed as ternary; None if there are none."""
        form = self.number_format
        if form.weight is None or form.weight.element != "ternary":
            return None
        return ternary(self.weight[: self.shape[0] - self.n_high(form)], self._call(form).parts)[0]

    def call(self) -> Call:
        """What the three products need to know at this moment."""
        return self._call(self.late_format if self.moment.is_late else self.number_format)

    def _call(self, form: LinearFormat) -> Call:
        m = self.moment
        segments = tuple(rows for name, rows in self.parts if name not in form.high)
        return Call(form, self.name, m.seed, m.draw, m.part, segments, self.n_high(form), self.watch, m.share)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"
