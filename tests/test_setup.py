"""How the package is built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_builds_of_one_source_share_no_object_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexit 1\n')
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [*command, "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env=os.environ | {"CC": str(compiler), "CXX": str(compiler)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, "without a compiler that works, plait installs all the same"
    if not log.is_file():
        pytest.skip("this kind of processor has no native kernels")
    objects = [line.split(" -o ")[1].split()[0] for line in log.read_text().splitlines() if " -o " in line]
    assert len(objects) > 1 and len(set(objects)) == len(objects)
