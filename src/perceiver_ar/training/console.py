"""Messages of a training run, and the signals that stop it."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


class LogConsole(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads the messages any more, as after `2>&1 | head`: training goes on without them."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.on_broken_pipe()  # the terminal is gone; SIGHUP may follow, or not, as under setsid


console = LogConsole(stderr=True, highlight=False, markup=False)
"""Quiet on all ranks but the first (see `resources.resolve`)."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TERMINALS = [stream for stream in (1, 2) if os.isatty(stream)]  # found now: after a hangup isatty is False


def say(message: str, style: str | None = None) -> None:
    """Prints a message on stderr, above the progress bar. A terminal may wrap it, a log does not."""
    console.print(message, style=style, soft_wrap=True)


class Interrupted(KeyboardInterrupt):
    """Training ended early because the user asked for it. The message has the command that resumes it."""


class StopAtOnce(BaseException):
    """A signal that does not wait for the running step."""


def drop_terminal_after_hangup(number: int) -> None:
    """After a SIGHUP, discards output to the terminal: writing to a closed one raises OSError."""
    if number not in (signal.SIGINT, signal.SIGTERM):
        for stream in TERMINALS:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


@contextmanager
def signals_taken_by(handler: Callable[[int, Any], None] | signal.Handlers) -> Iterator[None]:
    """Inside, `handler` handles SIGINT, SIGTERM and SIGHUP.

    Ignored signals stay ignored, as nohup needs. Only the main thread can handle signals; in others nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    wanted = [number for number in SIGNALS if main and signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        while handlers:
            signal.signal(*handlers.popitem())


def interrupt(number: int, frame: Any) -> None:
    """As handler of a signal, ends what is running, so that half-made files are removed."""
    drop_terminal_after_hangup(number)
    raise Interrupted("interrupted")


class StopRequest:
    """A signal asks to stop after the running step; a second one raises StopAtOnce."""

    def __init__(self) -> None:
        self.made = False

    def on_signal(self, number: int, frame: Any) -> None:
        drop_terminal_after_hangup(number)
        if self.made:
            raise StopAtOnce
        self.made = True
        say("\nStopping after this step; once more to stop immediately.")
