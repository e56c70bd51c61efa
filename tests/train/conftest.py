"""A dataset that all tests of training share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import write_documents  # noqa: E402

from plait.data.shards import Dataset  # noqa: E402


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_documents(tmp_path_factory.mktemp("words") / "data")
