"""How a command ends: its exit status, and one line on stderr for what went wrong."""

from __future__ import annotations

import io
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

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
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where stdout is not UTF-8 (a pipe on Windows), ‖x‖ or a name must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    with HeldBack() as stops:
        try:
            body()
        except VitprobeError as error:
            if debug:
                traceback.print_exc()
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
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if not ran_out(error):
                raise
            if debug:
                traceback.print_exc()
            tell(f"Out of memory ({describe(error)}).{RESUME if saved() else ''}")
            return FAILED
    return 0


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
