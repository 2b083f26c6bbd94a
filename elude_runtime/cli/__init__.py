"""The command line `elude`: one module a command. Exit 0 done, 1 a check did not hold, 2 bad input."""

from __future__ import annotations

import signal
import sys
from types import FrameType

EXIT_CHECK_FAILED, EXIT_BAD_INPUT = 1, 2


def main() -> None:
    """Run a command; what a user can put right is one sentence and exit code 2, never a traceback."""
    try:
        from elude_runtime.cli.app import app
    except ModuleNotFoundError as error:
        print(
            f"elude needs the package {error.name}: pip install 'elude-serving[offline,serve]', in a checkout "
            "'.[offline,serve]'.",
            file=sys.stderr,
        )
        sys.exit(EXIT_BAD_INPUT)
    from elude_runtime.errors import EludeError

    # A supervisor's or container's SIGTERM ends a command as Ctrl-C does: servers stopped, temporary files gone.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except EludeError as error:
        print(f"elude: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
