"""Compile the native kernels: each .cpp of kernels/native becomes one small library per kind of processor.

Everything else about the package stands in pyproject.toml. Without a compiler the package installs all the same and
computes with PyTorch alone. `make native` compiles again after a change.
"""

import copy
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("src/plait/kernels/native")
# kernels/native/library.py chooses among these when the program runs
FLAGS = {
    "x86_64": {
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mfma -mf16c",
        "avx2": "-mavx2 -mfma -mf16c",
    },
    "aarch64": {"neon": ""},
}
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
# Apple's compiler has no OpenMP: one thread there
THREADS = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildNative(build_ext):
    """Plain shared libraries with a C interface, not Python modules."""

    def initialize_options(self) -> None:
        """All processors compile."""
        super().initialize_options()
        self.parallel = os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        """Each build has its own object files: those of one source are made at the same time."""
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp) / ext.name)
        super(BuildNative, alone).build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """package.name -> package/name.so, without the interpreter's tag."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None but those of the source: no PyInit."""
        return []

    def copy_file(self, infile: str, outfile: str, *args: object, **kwargs: object) -> tuple[str, bool]:
        """Written aside and renamed: a running program may have the old one mapped."""
        shutil.copy2(infile, f"{outfile}.new")
        os.replace(f"{outfile}.new", outfile)
        return outfile, True


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            f"plait.kernels.native.{source.stem}_{target}",
            sources=[str(source)],
            depends=[str(header) for header in sorted(FOLDER.glob("*.h"))],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fno-math-errno", *THREADS, *flags.split()],
            extra_link_args=THREADS,
            language="c++",
            optional=True,
        )
        for source in sorted(FOLDER.glob("*.cpp"))
        for target, flags in FLAGS.get(MACHINE, {}).items()
    ],
)
