"""Native kernels are tested in every build that this processor can run."""

from collections.abc import Iterator

import pytest

from plait.kernels.native import library

# what runs an AVX-512 build runs an AVX2 build too
RUNS = {"avx512": ["avx512", "avx2"], "": ["none"]}


@pytest.fixture(params=RUNS.get(library.target(), [library.target()]))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the kernels' loader take one build, as on a processor of that kind."""
    wanted = request.param
    if not (library.FOLDER / f"activation_{wanted}.so").is_file():
        pytest.skip("the native kernels are not compiled: no C++ compiler when plait was installed")
    monkeypatch.setattr(library, "target", lambda: wanted)
    library.library.cache_clear(), library._function.cache_clear()
    yield wanted
    library.library.cache_clear(), library._function.cache_clear()
