"""Leave out what parts of the program say, where the command says it better itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*names: str, below: int) -> Iterator[None]:
    """Silence the lines of these loggers below a level, inside the block only.

    Args:
        names: of loggers, such as "plait.train".
        below: the least level that is still shown, such as logging.WARNING.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(below)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
