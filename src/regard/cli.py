"""The ``regard`` command: what the user got wrong is one line and exit code 2, Ctrl-C one line and 130.

The commands are in :mod:`regard.commands`, which is loaded under this roof: an interrupt may come at any time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

STOPPED = 130
"""The exit code of a command that was interrupted."""
AGAIN = 0.5
"""Seconds after which an interrupt that came while modules were loaded, and may have been swallowed there, comes again."""
WRONG = (ValueError, TypeError, OSError, ModuleNotFoundError, MemoryError)
"""What is raised for something that the user got wrong, or that the machine lacks."""


class _Interrupts:
    """Raises ``KeyboardInterrupt`` and remembers it: interrupted code may turn it into another error."""

    def __init__(self) -> None:
        self.came = False
        self._alarm: Any = None  # whose alarms they were before

    def __enter__(self) -> _Interrupts:
        ours = threading.current_thread() is threading.main_thread()  # no other may ask for signals
        self._asked = ours and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # a job in the background is left alone
        if self._asked:
            self._before = signal.signal(signal.SIGINT, self._come)
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked:
            if self._alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                signal.signal(signal.SIGALRM, self._alarm)
            signal.signal(signal.SIGINT, self._before)

    def _come(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        while frame is not None:
            if "importlib" in frame.f_code.co_filename:  # who loads something optional goes on without it, after any error
                self._ask_again()
                break
            frame = frame.f_back
        raise KeyboardInterrupt

    def _ask_again(self) -> None:
        if hasattr(signal, "setitimer"):
            before = signal.signal(signal.SIGALRM, self._come)
            self._alarm = before if self._alarm is None else self._alarm
            signal.setitimer(signal.ITIMER_REAL, AGAIN)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    words = "stopped"
    problem: str | None = None
    with _Interrupts() as interrupts:
        try:
            from . import commands

            words = commands.stopped(arguments)
            code = commands.run(arguments)
        except BaseException as error:
            if interrupts.came or isinstance(error, KeyboardInterrupt):
                code, problem = STOPPED, words
            elif isinstance(error, SystemExit):
                raise
            else:
                code, problem = 2, _problem(error)
                if problem is None:
                    raise
        else:
            problem = words if code == STOPPED else None
    if problem is not None:
        print(problem, file=sys.stderr, flush=True)
    if interrupts.came and code == STOPPED:
        sys.stdout.flush()
        os._exit(STOPPED)  # Python ends by the signal instead where it came within an `exec`, of which imports have many
    sys.exit(code)


def _open_streams() -> None:
    """Replace closed streams by empty ones, and write characters that an encoding lacks as escapes."""
    for name in ("stdin", "stdout", "stderr"):  # in order: a file that were opened instead would be written to by others
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  # to the end
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _problem(error: BaseException) -> str | None:
    """The message for a mistake of the user; None for an error of the program."""
    message = getattr(error, "format_message", None)  # of the command line's own parser
    if message is None and isinstance(error, RuntimeError) and "memory" in str(error):
        return f"regard: there is not enough memory for this: {str(error).strip().splitlines()[0]}"
    if message is None and not isinstance(error, WRONG):
        return None
    text = " ".join((message() if message else str(error)).split())
    return f"regard: {text or type(error).__name__}"


if __name__ == "__main__":
    main()
