"""One operand of a matrix product: rounded to its format, kept as codes, opened to numbers that a GEMM can multiply.

    operand = values * descale

Codes of 8 bits, and 4-bit codes times their block scale, have at most 8 significant bits: they are exact in bfloat16,
so one bfloat16 GEMM computes what tensor cores would, and the float32 descale goes onto its output.

Shapes   R rows, C columns of the operand, which is summed over C; values (R, C), descale (), (R, 1) or None.
Numbers  values in the compute dtype. Only blocks of FP8 with scales that are no powers of two are rounded by it.
Source   the formats: plait.ops.{fp8,mx,nvfp4,quant}.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.ops.fp8 import Block, dequantize_fp8, quantize_fp8
from plait.ops.gemm import Side, fits, scaled_gemm, served
from plait.ops.hadamard import SIGNS, hadamard16
from plait.ops.mx import quantize_mx
from plait.ops.nvfp4 import global_descale, quantize_nvfp4
from plait.ops.operand import operand, operand_of
from plait.ops.quant import quantize_int8, quantize_ternary
from plait.precision.format import Pair, TensorFormat


@dataclass(frozen=True, slots=True)
class Operand:
    """form: None for plain numbers. tensors: (values, descale), or the codes and scales of a packed one.

    is_turned: the tensors are those of the transpose.
    """

    form: TensorFormat | None
    tensors: tuple[Tensor, ...]
    is_packed: bool = False
    is_turned: bool = False

    @property
    def turned(self) -> "Operand":
        """The transpose, for a format that rounds both alike."""
        return Operand(self.form, self.tensors, self.is_packed, not self.is_turned)

    def opened(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """values (R, C) in dtype, perhaps a transposed view, and descale."""
        if self.form is not None:
            values, descale = _open(self.form, self.tensors) if self.is_packed else self.tensors
        else:
            (values,), descale = self.tensors, None
        values = values.to(dtype)
        if self.is_turned and descale is not None and descale.dim():
            # this scale runs along what is now summed over
            values, descale = (values * descale).to(dtype), None
        return (values.t() if self.is_turned else values), descale


def round_to(
    form: TensorFormat | None,
    x: Tensor,
    *,
    turned: bool = False,
    packed: bool = False,
    seed: int | None = None,
    parts: tuple[int, ...] = (),
) -> Operand:
    """Round a matrix, or its transpose, to a format.

    Args:
        form: None leaves it as it is.
        x: (R, C); with `turned` the operand is its transpose, (C, R).
        packed: as codes and scales, to be kept; else as values, to be used.
        seed: of stochastic rounding.
        parts: rows of the segments that have a scale of their own.
    """
    if form is None:
        return Operand(None, (x,), is_turned=turned)
    if form.element == "int8":
        codes, scale = quantize_int8(x)
        return Operand(form, (codes, 1.0 / scale), True, turned)
    if form.element == "ternary":
        return Operand(form, ternary(x, parts), True, turned)
    # two codes a byte have no transposed view
    across = turned and (not form.is_symmetric or (packed and form.bits == 4))
    signs = SIGNS if form.hadamard else None
    if packed:
        return Operand(form, _pack(form, x, across, signs, seed), True, turned and not across)
    found = operand(
        x,
        element=form.element,
        block=_block(form),
        scale=form.scale_element,
        hadamard=signs,
        seed=seed,
        transposed=across,
    )
    return Operand(form, found, False, turned and not across)


def is_native(pair: Pair, device: torch.device) -> bool:
    """Whether the device has tensor cores for such operands; they are then best packed."""
    a, b = pair
    if a is None or b is None or a.scale not in ("tensor", "row", "block"):
        return False
    return served(_block(a), _block(b), (a.element, b.element), device)


def product(a: Operand, b: Operand, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """(M, K) times the transpose of (N, K): (M, N) in dtype, summed in float32.

    On tensor cores where both are packed and the device has them; `fast` is for them.
    """
    if a.is_packed and b.is_packed and dtype == torch.bfloat16 and is_native((a.form, b.form), a.tensors[0].device):
        first, second = _side(a), _side(b)
        if fits(first.codes, second.codes):
            return scaled_gemm(first, second, dtype=dtype, fast=fast)
    if a.form is not None and b.form is not None and a.form.element == "int8" and b.form.element == "ternary":
        return _whole_numbers(a, b, dtype)
    (u, du), (v, dv) = a.opened(dtype), b.opened(dtype)
    if du is None and dv is None:
        return u @ v.t()
    scale = dv if du is None else du if dv is None else du * dv.t()
    assert scale is not None
    if scale.dim():
        return ((u @ v.t()) * (scale.t() if du is None else scale)).to(dtype)
    if u.is_cpu:
        # inside the GEMM the scale is applied before the one rounding
        return torch.addmm(u.new_zeros(()), u, v.t(), beta=0, alpha=scale.item())
    return (u @ v.t()).mul_(scale)


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x (R, C) with rows of zeros after it, so that blocks along its rows come out even."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % multiple)) if x.shape[0] % multiple else x


def _side(x: Operand) -> Side:
    """Codes and scales for tensor cores, in the operand's own order."""
    assert x.form is not None
    codes, scales, *amax = x.tensors
    if x.is_turned:
        codes, scales = codes.t(), scales.t()
    return Side(codes, scales, global_descale(amax[0]) if amax else None, _block(x.form))


def _pack(
    form: TensorFormat, x: Tensor, transposed: bool, signs: tuple[int, ...] | None, seed: int | None
) -> tuple[Tensor, ...]:
    """Codes and scales of x, or of its transpose."""
    if form.scale_element == "e4m3":
        return quantize_nvfp4(x, block=form.block, hadamard=signs, seed=seed, transposed=transposed)  # type: ignore[arg-type]
    x = x.t() if transposed else x
    x = x if signs is None else hadamard16(x, signs)
    if form.scale_element == "e8m0":
        return quantize_mx(x, form.element, seed=seed)  # type: ignore[arg-type]
    return quantize_fp8(x, form.element, block=_block(form), power_of_two=form.scale_element == "pow2", seed=seed)  # type: ignore[arg-type]


def _open(form: TensorFormat, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    codes, scales, *amax = tensors
    if form.element in ("int8", "ternary"):
        return codes, scales
    if form.scale_element == "e4m3":
        return operand_of(codes, scales), global_descale(amax[0])
    if form.scale != "block":
        return operand_of(codes), scales
    if form.scale_element == "float32":
        return dequantize_fp8(codes, scales), None
    return operand_of(codes, scales), None


def ternary(w: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int8 and descale, () or with several segments (N, 1) float32."""
    if len(parts) < 2:
        return quantize_ternary(w)
    each = [quantize_ternary(part) for part in w.split(parts)]
    descale = torch.cat([d.expand(n, 1) for n, (_, d) in zip(parts, each, strict=True)])
    return torch.cat([codes for codes, _ in each]), descale


def _whole_numbers(x: Operand, w: Operand, dtype: torch.dtype) -> Tensor:
    """int8 codes times ternary codes: whole numbers, exact in any order of adding, then both descales at once."""
    (a, da), (b, db) = x.tensors, w.tensors
    if a.is_cpu or (a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0):
        total = torch.ops.aten._int_mm(a, b.t()).float()
    else:
        total = a.float() @ b.float().t()
    return (total * (da * db.t())).to(dtype)


def _block(form: TensorFormat) -> Block:
    return form.block if form.scale == "block" else "row" if form.scale == "row" else None
