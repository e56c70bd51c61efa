"""mamba_ssm's chunked scan, from an installation or a checkout; its compiled extensions are not needed."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Mapping[str, object]], Tensor]


def mamba_scan(checkout: str) -> Scan | None:
    """The peer's scan as a function of x, dt, A, B, C and the rest; None where it is not here.

    Args:
        checkout: folder of state-spaces/mamba, or empty for an installed one.
    """
    folder = Path(checkout).expanduser() / "mamba_ssm" if checkout else None
    if folder is None:
        found = importlib.util.find_spec("mamba_ssm")
        folder = Path(found.origin).parent if found is not None and found.origin else None
    if folder is None or not folder.is_dir():
        return None
    # its package imports extensions that must be compiled; the Triton kernels do without
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder)]
    sys.modules["mamba_ssm"] = package
    try:
        combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except ImportError as problem:
        print(f"mamba_ssm cannot be imported: {problem}", file=sys.stderr)
        return None

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, rest: Mapping[str, object]) -> Tensor:
        # 256 is its own default, and its best on these shapes
        return combined(x, dt, A, B, C, chunk_size=256, D=rest["D"], dt_bias=rest["dt_bias"], dt_softplus=True)

    return scan
