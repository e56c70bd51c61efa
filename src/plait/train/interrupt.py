"""Turns Ctrl-C and SIGTERM into a wish to stop, so that a step and a checkpoint are never cut in two."""

import logging
import signal
import threading
from types import FrameType, TracebackType

log = logging.getLogger(__name__)


class Interrupts:
    """Inside `with`, the first signal only sets `asked`; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal that asked to stop, or empty."""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        # Python delivers signals to the main thread only, and only there may they be caught
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        log.info("%s: finishing this step, then saving; Ctrl-C again stops at once", self.asked)
