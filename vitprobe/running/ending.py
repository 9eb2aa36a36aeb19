"""How a command ends: its exit status, and one line on stderr for what went wrong."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import IO, Any, cast

from vitprobe.errors import VitprobeError, describe, ran_out
from vitprobe.running import processes
from vitprobe.running.interrupts import HeldBack, Interrupted

FAILED = 2
RESUME = " Run the same command to resume."
GRACE_S = 1.0


def guarded(
    body: Callable[[], None], debug: bool = False, saved: Callable[[], bool] = lambda: False
) -> int:
    """Call ``body``; what a user can put right becomes one line on stderr.

    Args:
        body: the command.
        debug: show where an error was raised.
        saved: whether the same command would go on from a state on disk.

    Returns:
        The exit status.
    """
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        # Where stdout is not UTF-8 (a pipe on Windows), ‖x‖ or a name must not end a run.
        out.reconfigure(errors="backslashreplace")
    # Programs without a terminal may have neither stream.
    with (
        HeldBack() as stops,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(cast(IO[str], _Out(out or nowhere))),
        redirect_stderr(cast(IO[str], _Err(sys.stderr or nowhere))),
    ):
        try:
            body()
            sys.stdout.flush()
        except VitprobeError as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, Unprintable):
                _give_up(out)
            tell(str(error))
            return FAILED
        except Interrupted as stop:
            tell(str(stop))
            return stops.status if stops.asked else stop.status
        except KeyboardInterrupt:
            tell(f"Stopped.{RESUME if saved() else ''}")
            return stops.status
        except BrokenPipeError:
            # The reader of stdout has left (head, less): nothing to tell it, nothing went wrong.
            _give_up(out)
        except Exception as error:
            if not ran_out(error):
                raise
            if debug:
                traceback.print_exc()
            tell(f"Out of memory ({describe(error)}).{RESUME if saved() else ''}")
            return FAILED
    return 0


class Unprintable(VitprobeError):
    """stdout cannot be written; files have been by then."""


class _Stream:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> Any:
        raise NotImplementedError


class _Out(_Stream):
    """stdout, whose errors are told from those of other files."""

    def _try(self, call: Callable[..., Any], *args: str) -> Any:
        try:
            return call(*args)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Unprintable(f"stdout cannot be written: {error.strerror}.") from error


class _Err(_Stream):
    """stderr, which may be a file on a disk that is full: no run ends for a remark."""

    def _try(self, call: Callable[..., Any], *args: str) -> Any:
        with suppress(OSError):
            return call(*args)


def _give_up(stream: IO[str]) -> None:
    """Let Python, as it ends, write what is left in a stream that cannot be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(message: str) -> None:
    """One line for the whole run, whichever process has it to say: torchrun then ends the others.

    What all of them meet the first process tells.
    """
    who = "vitprobe"
    with suppress(KeyboardInterrupt), HeldBack() as stops, stops.undisturbed():
        if not processes.is_main_process():
            who = f"vitprobe (process {os.environ['RANK']})"
            time.sleep(GRACE_S)
        if processes.first_to_tell():
            print(f"{who}: {message}", file=sys.stderr)
