"""Compile every kernel as it would be launched on a GPU, at the 8B layer's sizes and in bfloat16, without having one.

Run as a script, in a process without the interpreter: it prints a JSON line per compiled kernel, and per case that
failed. Triton gets a driver that only names its target; launches compile and do nothing: results mean nothing.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "bench" / "gpu")]

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
    for name, run in cases:
        try:
            with use("triton"):
                run()
        except Exception as problem:
            print(json.dumps({"failed": name, "why": f"{type(problem).__name__}: {problem}"[:1000]}), flush=True)


if __name__ == "__main__":
    main()
