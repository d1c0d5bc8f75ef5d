"""The command line `mole`: starts the commands of `commands`, and ends them after Ctrl-C wherever it strikes.

Little is imported here: Ctrl-C while the rest is read shall find somebody who knows what to do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mole_diffusion.app import WORKER_THREAD

if TYPE_CHECKING:
    from mole_diffusion.commands.together import app

__all__ = ["app", "main"]

_BY_SIGNAL = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mole` script.

    Args:
        arguments: of the command line; None are those of this process.
    """
    code = _run(arguments)
    # One more while Python ends would end it by the signal, with another exit code and a traceback.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if any(thread.name == WORKER_THREAD for thread in threading.enumerate()):
        # Python would end a thread in the middle of torch's code, which takes that for a crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit code."""
    interrupt = _Interrupt()
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, interrupt)
    try:
        from mole_diffusion.commands import together

        together.app(arguments, prog_name="mole")
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        # typer's code for a Ctrl-C that strikes while the commands answer the one before.
        if end.code != _BY_SIGNAL or not interrupt.came:
            return end.code
    except (KeyboardInterrupt, Exception):
        # Libraries that Ctrl-C left half imported fail in ways of their own.
        if not interrupt.came:
            raise
    else:
        return 0
    print("Stopped.", file=sys.stderr)
    return 1


class _Interrupt:
    """What Ctrl-C does: as Python itself, and it is remembered."""

    came = False

    def __call__(self, *_: Any) -> None:
        self.came = True
        raise KeyboardInterrupt


def __getattr__(name: str) -> Any:
    """`app`: all commands, read when somebody asks for them."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mole_diffusion.commands import together

    return together.app


if __name__ == "__main__":
    main()
