"""Ternary linear layers on GPUs: x to int8 codes once, then products of int8 with weights unpacked two bits at a time.

    c = round(x s), s = 127 / max |x| per row;    y[m, n] = (sum over k of c[m, k] w[n, k]) (scale[n] / s[m]) + b[n]

Bytes    weights are read as they are stored, an eighth of bfloat16's, once for each BM rows of x.
Numbers  whole sums in int32; the same bits as ops/ternary.py's reference, so no product is fused with an addition.
"""

# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from plait.kernels.triton.tuning import DEFAULTS, config

DEFAULTS["int8_rows"] = {"BLOCK": 2048, "num_warps": 4}
DEFAULTS["ternary"] = {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3}


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """(..., K) to (..., N) in x.dtype; arguments are those of `plait.ops.ternary.ternary_linear`."""
    (N, width), K = codes.shape, x.shape[-1]
    rows = x.reshape(-1, K).contiguous()
    M, y = rows.shape[0], x.new_empty(*x.shape[:-1], N)
    q = torch.empty(M, 4 * width, dtype=torch.int8, device=x.device)
    steps = torch.empty(M, dtype=torch.float32, device=x.device)
    _rows[(M,)](rows, q, steps, K, 4 * width, **config("int8_rows", K=K), enable_fp_fusion=False)
    c = dict(config("ternary", M=M, N=N, K=K))
    # few rows would waste most of a large tile; the processors' products take at least 16
    c["BM"] = min(c["BM"], max(16, triton.next_power_of_2(M)))
    grid = (triton.cdiv(N, c["BN"]), triton.cdiv(M, c["BM"]))
    _products[grid](q, steps, codes, scales, bias, y, M, N, width, **c, enable_fp_fusion=False)
    return y


@triton.jit
def _rows(x_ptr, q_ptr, step_ptr, K, width, BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    most, wrong = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        # not a number where one of x is none, or infinite
        wrong += x * 0.0
    s = tl.div_rn(1.0, tl.maximum(tl.max(most), 1e-5)) * 127.0
    tl.store(step_ptr + m, tl.div_rn(1.0, s) + tl.sum(wrong))
    for first in range(0, width, BLOCK):
        k = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        # adding 1.5 * 2^23 rounds to whole numbers, half to even
        code = (x * s + 12582912.0) - 12582912.0
        tl.store(q_ptr + m * width + k, code.to(tl.int8), mask=k < width)


@triton.jit
def _products(q_ptr, step_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, M, N, width, BM: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.arange(0, 64)
    # rows past the end read the first one, and are not stored
    q_rows = q_ptr + tl.where(m < M, m, 0).to(tl.int64)[:, None] * (4 * width) + j[None, :]
    w_rows = w_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * width + j[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for at in range(0, width, 64):
        packed = tl.load(w_rows + at)
        for field in tl.static_range(4):
            w = ((packed >> (2 * field)) & 3).to(tl.int8) - 1
            q = tl.load(q_rows + 4 * at + 64 * field)
            acc = tl.dot(q, w, acc, out_dtype=tl.int32)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    step = tl.load(step_ptr + m, mask=m < M, other=0.0)
    y = acc.to(tl.float32) * (scale[None, :] * step[:, None])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
