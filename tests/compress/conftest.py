"""Documents for the tests of compression."""

import pytest
from tests.train.tiny import write_documents

from plait.data.shards import Dataset


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_documents(tmp_path_factory.mktemp("words") / "data")
