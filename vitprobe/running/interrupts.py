"""Ctrl-C, a closed terminal and the system's request to end, held back while sums change.

A batch is added to several sums one after the other. A run that stopped in between and saved them
would add the batch again when it is resumed, and count a part of it twice.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C under torchrun arrives twice, from the terminal and from torchrun; somebody who presses it
# again after this many seconds does not want to wait for the batch to end.
AGAIN_S = 1.0
# One that came while an object was finalised is asked for once more after this many seconds.
LOST_S = 0.05


class Interrupted(Exception):
    """A run that was asked to stop; the message says how to resume it.

    Attributes:
        status: exit status of the process, 130 for Ctrl-C.
    """

    def __init__(self, message: str, status: int = 130) -> None:
        super().__init__(message)
        self.status = status


class HeldBack:
    """Within it ``KeyboardInterrupt`` comes between batches only.

    Handlers that others have set are left alone, and so are all outside the main thread. One within
    another takes the signals meanwhile.

    Args:
        takes: whether to take the signals at all; else they do what they do by default.

    Attributes:
        torn: a batch has begun to change the sums and has not ended.
        status: exit status that belongs to the signal that came.
    """

    def __init__(self, takes: bool = True) -> None:
        self.takes = takes
        self.torn = False
        self.status = 128 + signal.SIGINT
        self._holding = False
        self._first: float | None = None
        self._before: dict[int, Any] = {}
        self._unraisable: Any = None

    def __enter__(self) -> HeldBack:
        usual: dict[int, Any] = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: signal.SIG_DFL,
        }
        if hasattr(signal, "SIGHUP"):
            usual[signal.SIGHUP] = signal.SIG_DFL
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                current = signal.getsignal(number)
                if (current == handler and self.takes) or _outer(current):
                    mine = self._arrived if self.takes else handler
                    self._before[number] = signal.signal(number, mine)
        if self._before:
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before:
            sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, handler)
            outer = _outer(handler)
            if outer and outer._first is None and self.asked:
                # What comes twice within a moment is one request there, too.
                outer._first, outer.status = self._first, self.status

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Around everything that changes the sums; a signal that came meanwhile stops the run."""
        self._holding = True
        self.torn = True
        yield
        self.torn = False
        self._holding = False
        self._stop_if_asked()

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._first is not None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Around what must not be cut off; a signal then stops a run that is not stopping yet."""
        stopping, self._holding = self.asked, True
        try:
            yield
        finally:
            self._holding = False
        if not stopping:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.asked:
            raise KeyboardInterrupt

    def _lost(self, told: Any) -> None:
        """Python drops, and prints, what is raised while an object is finalised."""
        if not issubclass(told.exc_type, KeyboardInterrupt) or self._first is None:
            self._unraisable(told)
            return
        main, number = threading.main_thread().ident, self.status - 128
        self._first = None

        def again() -> None:
            if main is None or signal.getsignal(number) != self._arrived:
                return
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main, number)
            else:
                # Windows; who waits for something is not woken there.
                _thread.interrupt_main(signal.Signals(number))

        timer = threading.Timer(LOST_S, again)
        timer.daemon = True
        timer.start()

    def _arrived(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.status = now, 128 + number
            if not self._holding:
                raise KeyboardInterrupt
        elif now - self._first > AGAIN_S:
            raise KeyboardInterrupt


def _outer(handler: Any) -> HeldBack | None:
    """The one that a handler belongs to, if it does to one."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, HeldBack) else None
