"""Compile the Triton kernels for an H200 without a GPU, in bfloat16, and print what each one uses as JSON lines.

Operations are called on processor tensors with a driver that only names its target; kernels are compiled down to
machine code and never launched. A script of its own, since Triton decides at import whether kernels are interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from plait import ops


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report(kernel: JITFunction, compiled: object) -> None:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])  # type: ignore[attr-defined]
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    facts = {
        name: int(re.search(f"{word}:(\\d+)", usage)[1]) for name, word in (("registers", "REG"), ("stack", "STACK"))
    }  # type: ignore[index]
    # PTX: the widest accesses to memory, in bytes
    wide = "v4.b32" in compiled.asm["ptx"] or "cp.async.cg" in compiled.asm["ptx"]  # type: ignore[attr-defined]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared  # type: ignore[attr-defined]
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    print(json.dumps({"kernel": name, **facts, "warps": warps, "shared": shared, "wide": wide}), flush=True)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_(dtype.is_floating_point)


def back(*ys: Tensor) -> None:
    torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])


def call_everything() -> None:
    """Every operation with kernels, at the sizes of an 8B model's layers."""
    wide = zeros(2, 64, 18560)
    z, xBC = wide[..., :8192], wide[..., 8192:18432]
    back(ops.squared_relu(zeros(64, 4096)))
    back(ops.rms_norm(zeros(64, 4096), zeros(4096)))
    back(*ops.add_rms_norm(zeros(64, 4096), zeros(64, 4096), zeros(4096)))
    back(ops.gated_rmsnorm(zeros(2, 64, 8192), z, zeros(8192), groups=8))
    starts = torch.zeros(2, 64, dtype=torch.bool)
    back(ops.causal_conv1d(xBC, zeros(10240, 4), zeros(10240), initial=zeros(2, 10240, 4), starts=starts))
    back(ops.causal_conv1d(xBC, zeros(10240, 4)))
    with torch.no_grad():
        row, slots = xBC[:, 0], torch.zeros(2, dtype=torch.int64)
        ops.causal_conv1d_step(row, zeros(8, 10240, 4), zeros(10240, 4), zeros(10240), slots=slots)
        x, B, C = row.split([8192, 1024, 1024], dim=1)
        given = (
            x.unflatten(1, (128, 64)),
            zeros(2, 128),
            zeros(128),
            B.unflatten(1, (8, 128)),
            C.unflatten(1, (8, 128)),
        )
        ops.selective_state_update(zeros(2, 128, 64, 128, dtype=torch.float32), *given, D=zeros(128))
        ops.selective_state_update(zeros(2, 128, 64, 128, dtype=torch.float16), *given, slots=slots, rounding_seed=1)


def main() -> int:
    triton.runtime.driver.set_active(Driver())
    launch, seen = JITFunction.run, set()

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            report(self, compiled)
        return compiled

    JITFunction.run = compile_only
    with ops.use("triton"):
        call_everything()
    return 0


if __name__ == "__main__":
    sys.exit(main())
