"""A run that is killed again and again ends as if nothing had happened."""

import importlib.util
from pathlib import Path
from types import ModuleType


def bench(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_run_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    # 20 kills: python bench/kill.py
    report = bench("kill").torture(tmp_path, kills=2, steps=30, save_every=3, seed=1)
    facts = {fact.name: fact.value for fact in report.facts}
    assert facts["killed in a step"] + facts["killed while saving"] == 2
    assert facts["unreadable checkpoints"] == 0 and facts["files left by kills"] == 0
    assert facts["weights equal bit for bit"] is True
    assert facts["losses equal bit for bit"] is True
