"""What every test relies on: a fixed seed, poisoned empty memory, the shared data folder, and the marks."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

# without a GPU, Triton kernels run in its interpreter; it reads this when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# tests are many and small: a second thread costs more than it brings, and one thread always adds in the same order
torch.set_num_threads(1)
# `with torch.device("meta")` lists the constructors it redirects at its first use, which must see torch's own and not
# the poisoned ones below: else models "on meta" would be allocated
with torch.device("meta"):
    torch.empty(0)

_SHARED = Path(__file__).resolve().parents[2] / "shared"
_NEEDS = {
    "slow": "slow test: run with --slow",
    "net": "needs the network: run with --net",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark, reason in _NEEDS.items():
        parser.addoption(f"--{mark}", action="store_true", help=f"also run tests marked {mark} ({reason})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark, reason in _NEEDS.items():
            if item.get_closest_marker(mark) and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def n_shapes(request: pytest.FixtureRequest) -> int:
    """How many random shapes a property test tries: a few in CI, a thousand with --slow."""
    return 1000 if request.config.getoption("--slow") else 20


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    if not _SHARED.is_dir():
        pytest.skip(f"no reference data: {_SHARED.name}/ is not beside the repository")
    return _SHARED


@pytest.fixture(scope="session", autouse=True)
def _compiler_knows_torch() -> None:
    """Let the compiler list torch's functions before any of them is replaced below; it looks only once."""
    torch.compile(lambda x: torch.empty_like(x), backend="eager")(torch.ones(1))


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what `torch.empty` gives to ops and kernels with NaN: an element that is never written must show."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


def _poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        # a compiler that traces us cannot look at the caller's frame
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(("plait.ops", "plait.kernels")) and tensor.is_floating_point():
            # some 8-bit and 4-bit formats have no NaN, and no fill either
            if tensor.element_size() > 1:
                tensor.fill_(float("nan"))
        return tensor

    return poisoned
