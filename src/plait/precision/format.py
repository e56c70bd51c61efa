"""What numbers an operand is held in: plain data, read by the linear layers.

A TensorFormat says how one tensor is rounded before a matrix product; a LinearFormat says it for the operands of the
three products of a linear layer, of which each sums over another dimension:

    forward          y  = x W^T       over d_in
    data gradient    dx = dy W        over d_out
    weight gradient  dW = dy^T x      over tokens

`None` means the tensor is used in the compute dtype as it is. Both have a short spelling for files and tables.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Element = Literal["e4m3", "e5m2", "e2m1", "int8", "int4", "ternary"]
Scale = Literal["tensor", "row", "block", "token", "segment", "group"]
ScaleElement = Literal["float32", "pow2", "e8m0", "e4m3"]
SPELLING = 'write for example "e4m3 tensor", "e2m1 1x16 e4m3 hadamard stochastic" or "none"'


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFormat:
    """element: the number format of a code; scale: what shares one scale.

    scale: "tensor"; "row" of the operand, which has what is summed over as its last dimension; "block" of that operand;
    "token" and "segment" (a named part of a weight's rows): those rows of x and W in every product, BitNet's way;
    "group": neighbours in a row of a weight.
    block: its rows and columns. scale_element: of a block's scale; "pow2" is float32 rounded to a power of two.
    rounding: "stochastic" lies between the two neighbours by chance. hadamard: rotate 16 neighbours before rounding.
    group: with scale "group", how many share one. zeros: each group has a zero point too.
    """

    element: Element
    scale: Scale
    block: tuple[int, int] = (1, 1)
    scale_element: ScaleElement = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hadamard: bool = False
    group: int = 0
    zeros: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code as it is held."""
        return 4 if self.element in ("int4", "e2m1") else 8

    @property
    def is_held(self) -> bool:
        """Whether a weight is held as such codes and has no master; the other formats round one at each use."""
        return self.scale == "group" or (self.element, self.scale) == ("ternary", "row")

    @property
    def is_symmetric(self) -> bool:
        """Whether a matrix and its transpose are rounded to the same numbers, so that one copy serves two products."""
        same = self.scale in ("tensor", "token", "segment") or (
            self.scale == "block" and self.block[0] == self.block[1]
        )
        return same and self.rounding == "nearest" and not self.hadamard

    @property
    def bytes_per_number(self) -> float:
        """Bytes of a packed tensor over its numbers, scales of blocks and groups included."""
        if self.scale == "group":
            return self.bits / 8 + (2 + self.zeros) / self.group
        scales = {"float32": 4, "pow2": 4, "e8m0": 1, "e4m3": 1}[self.scale_element] if self.scale == "block" else 0
        return (0.25 if self.element == "ternary" else self.bits / 8) + scales / (self.block[0] * self.block[1])

    def __str__(self) -> str:
        words = [self.element, self.scale]
        if self.scale == "block":
            words[1] = f"{self.block[0]}x{self.block[1]} {self.scale_element}"
        elif self.scale_element != "float32":
            words.append(self.scale_element)
        if self.scale == "group":
            words[1] = f"group {self.group}" + " zeros" * self.zeros
        words += ["hadamard"] * self.hadamard + ["stochastic"] * (self.rounding == "stochastic")
        return " ".join(words)

    def to_dict(self) -> str:
        """The short spelling."""
        return str(self)

    @classmethod
    def from_dict(cls, text: object) -> "TensorFormat":
        """Read the short spelling: element, "tensor", "row", or a block with its scale's element, then the rounding.

        Raises: ValueError naming the word that is not understood.
        """
        element, *words = str(text).split()
        known: dict[str, object] = {"element": element}
        for i, word in enumerate(words):
            rows, x, columns = word.partition("x")
            if x and rows.isdecimal() and columns.isdecimal():
                known |= {"scale": "block", "block": (int(rows), int(columns))}
            elif word in get_args(Scale) and word != "block":
                known["scale"] = word
            elif word in get_args(ScaleElement):
                known["scale_element"] = word
            elif word == "hadamard":
                known["hadamard"] = True
            elif word == "stochastic":
                known["rounding"] = word
            elif word == "zeros":
                known["zeros"] = True
            elif word.isdecimal() and words[i - 1] == "group":
                known["group"] = int(word)
            else:
                raise ValueError(f"format {text!r}: {word!r} is not understood; {SPELLING}")
        if element not in get_args(Element) or "scale" not in known:
            what = f"element {element!r} is unknown" if "scale" in known else "it lacks what shares a scale"
            raise ValueError(f"format {text!r}: {what}; elements: {', '.join(get_args(Element))}; {SPELLING}")
        form = cls(**known)  # type: ignore[arg-type]
        form.check()
        return form

    def check(self) -> None:
        """Refuse combinations that no product computes.

        Raises: ValueError naming them and what there is.
        """
        blocks = {"e2m1": ("e4m3", "e8m0"), "e4m3": ("e8m0", "pow2", "float32"), "e5m2": ("e8m0", "pow2", "float32")}
        allowed = {"ternary": ("tensor", "segment", "row"), "int8": ("token", "group"), "int4": ("group",)}
        scales = allowed.get(self.element, ("block",) if self.element == "e2m1" else ("tensor", "row", "block"))
        if self.scale not in scales:
            raise ValueError(f"format {str(self)!r}: {self.element} has a scale for each {' or '.join(scales)}")
        if self.scale == "block" and self.scale_element not in blocks[self.element]:
            raise ValueError(
                f"format {str(self)!r}: blocks of {self.element} have scales in {' or '.join(blocks[self.element])}"
            )
        shapes = {"e8m0": ((1, 32),), "e4m3": ((1, 16), (16, 16))}.get(self.scale_element, ((1, 128), (128, 128)))
        if self.scale == "block" and self.block not in shapes:
            here = " or ".join(f"{r}x{c}" for r, c in shapes)
            raise ValueError(f"format {str(self)!r}: blocks with {self.scale_element} scales are {here}")
        if (self.hadamard or self.rounding == "stochastic") and self.scale not in ("tensor", "row", "block"):
            raise ValueError(f"format {str(self)!r}: {self.element} is rounded to nearest, without a rotation")
        if self.hadamard and self.element != "e2m1":
            raise ValueError(f"format {str(self)!r}: only e2m1 is rotated; leave out hadamard")
        if self.scale == "group" and self.group < 1:
            raise ValueError(f"format {str(self)!r}: a group needs its size, such as 'int8 group 128'")


Pair = tuple[TensorFormat | None, TensorFormat | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """Formats of the three products' operands: (x, W), (dy, W) and (dy, x); None computes in the model's dtype.

    high: names of trailing parts of a fused weight whose rows stay out of it all, such as Mamba's "dt".
    """

    fprop: Pair = (None, None)
    dgrad: Pair = (None, None)
    wgrad: Pair = (None, None)
    high: tuple[str, ...] = ()

    @property
    def weight(self) -> TensorFormat | None:
        """Of the weight in the forward product."""
        return self.fprop[1]

    @property
    def input(self) -> TensorFormat | None:
        """Of the input in the forward product."""
        return self.fprop[0]

    @property
    def operands(self) -> dict[str, TensorFormat]:
        """All that are rounded, by product and operand."""
        names = ("fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
        forms = (*self.fprop, *self.dgrad, *self.wgrad)
        return {name: form for name, form in zip(names, forms, strict=True) if form is not None}

    @property
    def weights(self) -> tuple[TensorFormat, ...]:
        """What the weight is rounded to, in the products it is in."""
        return tuple(form for form in (self.fprop[1], self.dgrad[1]) if form is not None)

    @property
    def is_stochastic(self) -> bool:
        """Whether any operand is rounded by chance."""
        return any(form.rounding == "stochastic" for form in self.operands.values())

    def check(self) -> None:
        """Refuse what is no product.

        Raises: ValueError naming product and formats.
        """
        for product, pair in {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}.items():
            spelled = ", ".join(str(form or "none") for form in pair)
            if len({form is not None and form.hadamard for form in pair}) > 1:
                raise ValueError(f"{product} = ({spelled}): a rotation cancels only if both operands have it")
        for name, form in self.operands.items():
            form.check()
            if not name.endswith(".w") and (form.block[0] > 1 or form.element in ("ternary", "int4")):
                raise ValueError(f"{name} = {str(form)!r}: tokens take blocks of one row, and no ternary or int4 codes")
            if name.endswith(".w") and form.scale == "token":
                raise ValueError(f"{name} = {str(form)!r}: a weight has no tokens; take a scale for each tensor or row")


HIGH = LinearFormat()
