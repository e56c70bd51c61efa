"""Every kernel compiles to machine code for an H200, in bfloat16, and fits its registers and shared memory."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

# of one Hopper multiprocessor
SHARED_BYTES, REGISTERS = 227 * 1024, 65536


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton's tools for NVIDIA come with its x86-64 wheel")
def test_every_kernel_compiles_for_hopper_and_fits(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_for_hopper.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= 14
    for k in kernels:
        # nothing kept in memory for want of registers, and room for one program at least
        assert k["stack"] == 0, k
        assert k["registers"] * 32 * k["warps"] <= REGISTERS and k["shared"] <= SHARED_BYTES, k
        # 16 bytes per access, but for the step that moves a few numbers per channel
        assert k["wide"] or k["kernel"] == "conv._step", k
