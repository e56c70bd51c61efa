"""The way in: `plait VERB ...` and `python -m plait VERB ...`."""

import signal
import sys
from typing import NoReturn

from plait.cli.launch import launch


def main() -> int:
    """Run the command line and return its exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    return launch(sys.argv[1:])


def _interrupt(signum: int, frame: object) -> NoReturn:
    # whoever can be stopped with Ctrl-C can be stopped by a scheduler
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
