from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from plait.data.document import Document, SourceError
from plait.data.sources import parquet


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    return path


def test_rows_come_back_in_order(tmp_path):
    texts = [f"text {i} é👩" for i in range(1000)]
    file = write(tmp_path / "a.parquet", text=texts, number=list(range(1000)))
    assert [document.text for document in parquet.read(file, "text", Counter())] == texts


def test_the_column_can_be_chosen_and_sources_come_along(tmp_path):
    file = write(tmp_path / "a.parquet", body=["x", None, "y"], source=["s", "t", None], license=["MIT", None, None])
    skipped = Counter()
    assert list(parquet.read(file, "body", skipped)) == [
        Document(text="x", source="s", licence="MIT"),
        Document(text="y"),
    ]
    assert skipped == {"empty": 1}


def test_a_missing_or_foreign_column_is_named(tmp_path):
    file = write(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(SourceError, match="no column 'text', only body, number; set --field"):
        list(parquet.read(file, "text", Counter()))
    with pytest.raises(SourceError, match="column 'number' holds int64, not text"):
        list(parquet.read(file, "number", Counter()))


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_broken_file_is_named(tmp_path, keep):
    file = write(tmp_path / "a.parquet", text=["x" * 100] * 100)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SourceError, match="a.parquet is no readable Parquet file"):
        list(parquet.read(file, "text", Counter()))
