import gzip
import random

import pytest
import zstandard

from plait.data.document import SourceError
from plait.data.sources.compressed import open_bytes

DATA = random.Random(0).randbytes(50_000) + b"line\n" * 20_000
PACK = {".gz": gzip.compress, ".zst": zstandard.compress, "": bytes}


@pytest.mark.parametrize("suffix", PACK)
def test_content_comes_back(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(PACK[suffix](DATA))
    with open_bytes(tmp_path / f"a{suffix}") as file:
        assert file.read() == DATA


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_frames_are_one_stream(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"".join(PACK[suffix](part) for part in (DATA, b"", b"tail")))
    with open_bytes(tmp_path / f"a{suffix}") as file:
        assert file.read() == DATA + b"tail"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("left", [0.001, 0.5, 0.999])
def test_a_file_cut_short_is_noticed(tmp_path, suffix, left):
    packed = PACK[suffix](DATA)
    (tmp_path / f"a{suffix}").write_bytes(packed[: max(1, int(len(packed) * left))])
    with (
        pytest.raises(SourceError, match=f"a{suffix} is corrupt or cut short"),
        open_bytes(tmp_path / f"a{suffix}") as file,
    ):
        file.read()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_packed_is_noticed(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"plain words, not packed")
    with pytest.raises(SourceError, match="is corrupt"), open_bytes(tmp_path / f"a{suffix}") as file:
        file.read()
