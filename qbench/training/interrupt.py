"""Ctrl-C, SIGTERM and a time limit: the loop in hand is asked to stop, and stops where its state is whole."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEADLINE = "QBENCH_DEADLINE"  # seconds since 1970; in the environment, so that workers know it too
SWEEP = "QBENCH_SWEEP"  # the folder of a sweep's notes
STOPPED, OUT_OF_TIME = 130, 124  # exit statuses


class Interrupted(Exception):
    """The run was asked to stop: its state was saved; the message says how to go on."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Within the block, and in processes it starts, loops are asked to stop before `seconds` are over.

    A twentieth of them, from 1 s to a minute, is left for the step in hand and for saving.
    """
    if seconds is None or DEADLINE in os.environ:
        yield
        return
    os.environ[DEADLINE] = str(time.time() + seconds - min(60.0, max(1.0, seconds / 20)))
    try:
        yield
    finally:
        del os.environ[DEADLINE]


def out_of_time() -> bool:
    """Whether a time limit is over."""
    return time.time() > float(os.environ.get(DEADLINE, "inf"))


def sweep_stopped() -> bool:
    """Whether the sweep that this process works for was asked to stop."""
    folder = os.environ.get(SWEEP)
    return out_of_time() or (folder is not None and (Path(folder) / "stop").exists())


def stop_sweep() -> None:
    """Ask every process of the sweep to stop."""
    (Path(os.environ[SWEEP]) / "stop").touch()


def status() -> int:
    """The exit status of a command that was stopped."""
    return OUT_OF_TIME if out_of_time() else STOPPED


@contextmanager
def handling(signals: tuple[signal.Signals, ...], handler: Any) -> Iterator[None]:
    """Within the block `handler` has the signals; outside the main thread whoever owns them keeps them."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in signals:
            before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def interrupt(number: int, frame: Any) -> None:
    """SIGTERM outside a loop, as Ctrl-C."""
    raise KeyboardInterrupt


class Stop(AbstractContextManager["Stop"]):
    """Within the block the first Ctrl-C or SIGTERM only sets `asked`; a second one stops at once (KeyboardInterrupt).

    `asked` holds too when a time limit is over, or when the sweep that the run belongs to was asked to stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._looked = 0.0
        self._handling: AbstractContextManager[None] | None = None

    @property
    def asked(self) -> bool:
        """Whether the loop shall stop; clock and folder are looked at twice a second."""
        now = time.monotonic()
        if not self._asked and now - self._looked > 0.5:
            self._looked, self._asked = now, sweep_stopped()
        return self._asked

    def __enter__(self) -> "Stop":
        self._asked = False
        self._handling = handling(SIGNALS, self._on_signal)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._handling is not None
        self._handling.__exit__(None, None, None)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
