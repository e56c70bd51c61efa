"""Native kernels are tested in every build that this processor can run."""

from collections.abc import Iterator

import pytest

from plait.kernels.native import library


@pytest.fixture(params=["avx512", "avx2", "neon"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the kernels' loader take one build, as on a processor of that kind."""
    wanted, best = request.param, library.target()
    if wanted != best and not (best == "avx512" and wanted == "avx2"):
        pytest.skip(f"this processor cannot run {wanted}; it has {best or 'none of ours'}")
    if not (library.FOLDER / f"activation_{wanted}.so").is_file():
        pytest.skip("the native kernels are not compiled: no C++ compiler when plait was installed")
    monkeypatch.setattr(library, "target", lambda: wanted)
    library.library.cache_clear(), library._function.cache_clear()
    yield wanted
    library.library.cache_clear(), library._function.cache_clear()
