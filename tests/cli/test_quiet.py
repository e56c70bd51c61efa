"""Lines are left out inside the block, and come again behind it, whatever ended it."""

import logging

import pytest

from plait.cli.quiet import quiet


def test_a_level_comes_back_also_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("somebody.inside")
    with caplog.at_level(logging.INFO):
        with pytest.raises(RuntimeError), quiet("somebody.inside", below=logging.WARNING):
            log.info("left out")
            log.warning("said")
            raise RuntimeError
        log.info("again")
    assert [record.message for record in caplog.records] == ["said", "again"]
