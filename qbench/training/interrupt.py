"""Ctrl-C: the loop in hand is asked to stop, and stops where its state is whole."""

import signal
from contextlib import AbstractContextManager
from typing import Any


class Interrupted(Exception):
    """Ctrl-C: the state was saved; the message says how to go on."""


class Stop(AbstractContextManager["Stop"]):
    """Within the block the first Ctrl-C only sets `asked`; a second one stops at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._ours = False

    def __enter__(self) -> "Stop":
        self.asked = False
        try:
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
            self._ours = True
        except ValueError:  # not the main thread: whoever owns it handles Ctrl-C
            self._ours = False
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
