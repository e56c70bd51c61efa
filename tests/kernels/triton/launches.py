"""Compile every kernel as it would be launched on a GPU, at the 8B layer's sizes and in bfloat16, without having one.

Run as a script, in a process without the interpreter: it prints a JSON line per compiled kernel, and per case that
failed. Triton gets a driver that only names its target; launches compile and do nothing: results mean nothing.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "bench" / "gpu")]

if TYPE_CHECKING:
    from setting import Layer

TARGET = GPUTarget("cuda", 90, 32)
seen: set[str] = set()
compile_and_launch = JITFunction.run


def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
    kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
    if kernel.hash not in seen:
        seen.add(kernel.hash)
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        local = kernel.asm["ptx"].count(".local")
        print(json.dumps({"kernel": name, "shared": kernel.metadata.shared, "local": local}), flush=True)
    return kernel


def pretend() -> None:
    """CPU tensors say that they are on a GPU, and the GPU is an H200."""
    device = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda device=None: 0
    )
    driver.set_active(device)
    JITFunction.run = compile_only
    torch.Tensor.is_cuda = property(lambda self: True)
    about = SimpleNamespace(multi_processor_count=132, name="NVIDIA H200", major=9, minor=0)
    torch.cuda.get_device_properties = lambda device=None: about
    # what a tensor on the processor has as its index
    torch.cuda.current_device = lambda: None


def long_attention(layer: object, paged: bool) -> None:
    from inputs import cache

    from plait.ops.decode_attention import decode_attention

    t = cache(layer, 1, 8192, torch.device("cpu"), torch.bfloat16)
    if paged:
        for name in ("k_cache", "v_cache"):
            t[name] = t[name].unflatten(2, (-1, 64))[0].transpose(0, 1).contiguous()
        t["page_table"] = torch.arange(128, dtype=torch.int32)[None]
    decode_attention(**t)


def drawn(vocabulary: int) -> None:
    from plait.ops.sample import sample_ids

    logits, one = torch.randn(2, vocabulary).bfloat16(), torch.ones(2)
    sample_ids(logits, one.double() / 2, temperature=one, top_k=one.int(), top_p=one, min_p=one)


def with_all_arguments(layer: "Layer") -> dict[str, Callable[[], object]]:
    """The kernels' other forms: documents, pasts, slots and second gradients."""
    from inputs import cache, random, update, window

    from plait.ops.conv import causal_conv1d, causal_conv1d_step
    from plait.ops.decode_attention import decode_attention
    from plait.ops.norm import add_rms_norm
    from plait.ops.ssd import selective_state_update

    cpu, low = torch.device("cpu"), torch.bfloat16
    make = random(cpu, low)

    def packed_convolution() -> None:
        sizes = ((2, 300, layer.conv), (layer.conv, 4), (layer.conv,), (2, layer.conv, 4))
        x, w, bias, past = leaves = [make(*size).requires_grad_() for size in sizes]
        y = causal_conv1d(x, w, bias, initial=past, starts=torch.zeros(2, 300, dtype=torch.bool))
        torch.autograd.grad(y.sum(), leaves)

    def added() -> None:
        x, residual, w = leaves = [make(*size).requires_grad_() for size in ((2, 9, 4096), (2, 9, 4096), (4096,))]
        y, total = add_rms_norm(x, residual, w)
        torch.autograd.grad(y.sum() + total.sum(), leaves)

    def in_slots() -> None:
        slots = torch.arange(3)
        selective_state_update(**update(layer, 3, cpu, low, torch.bfloat16), slots=slots, rounding_seed=5)
        causal_conv1d_step(**window(layer, 3, cpu, low), slots=slots)

    def begun_late() -> None:
        decode_attention(**cache(layer, 2, 2048, cpu, low), starts=torch.zeros(2, dtype=torch.int64))

    return {f.__name__: f for f in (packed_convolution, added, in_slots, begun_late)}


def in_few_bits(rows: int, columns: int) -> None:
    from plait.ops.fp8 import quantize_fp8
    from plait.ops.hadamard import SIGNS, hadamard16
    from plait.ops.mx import quantize_mx
    from plait.ops.nvfp4 import quantize_nvfp4
    from plait.ops.operand import operand

    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    hadamard16(x)
    for block in (None, "row", (1, 128), (128, 128)):
        quantize_fp8(x, "e4m3", block=block, power_of_two=block == (1, 128))
    quantize_fp8(x[:, 1:].contiguous(), "e5m2", seed=5)
    for element in ("e4m3", "e2m1"):
        quantize_mx(x, element, seed=2**62)
    quantize_nvfp4(x, block=(16, 16))
    quantize_nvfp4(x)
    quantize_nvfp4(x, hadamard=SIGNS, seed=2**62, transposed=True)
    operand(x, element="e2m1", scale="e4m3", block=(1, 16), hadamard=SIGNS, seed=3, transposed=True)


def packed_ternary(n_rows: int) -> None:
    from plait.ops.ternary import ternary_linear

    x, codes = torch.randn(n_rows, 2560, dtype=torch.bfloat16), torch.zeros(6912, 640, dtype=torch.uint8)
    ternary_linear(x, codes, torch.ones(6912), torch.ones(6912))
    ternary_linear(x, codes, torch.ones(6912))


def main() -> None:
    pretend()
    import correct
    from clock import Bench
    from setting import full

    import plait.kernels.triton.decode_attention as decode
    from plait.ops.dispatch import use
    from plait.report import Report

    decode._multiprocessors = lambda device: 132
    setting = replace(full(), device=torch.device("cpu"))
    bench = Bench(setting, Report("compiled"))
    cases = [(name, lambda call=call, t=t: call(t)) for name, call, t in correct.cases(bench)]
    for paged in (False, True):
        cases.append(
            (f"long decode attention, paged: {paged}", lambda paged=paged: long_attention(setting.layer, paged))
        )
    cases.append(("sampling", lambda: drawn(setting.layer.vocabulary)))
    cases.append(("quantisers", lambda: in_few_bits(512, 4096)))
    cases += [(f"ternary, {n} rows", lambda n=n: packed_ternary(n)) for n in (1, 300)]
    cases += with_all_arguments(setting.layer).items()
    for name, run in cases:
        try:
            with use("triton"):
                run()
        except Exception as problem:
            print(json.dumps({"failed": name, "why": f"{type(problem).__name__}: {problem}"[:1000]}), flush=True)


if __name__ == "__main__":
    main()
