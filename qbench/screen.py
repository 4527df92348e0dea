"""What the user sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import codecs
import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

SILENCE = 60  # seconds after which a log that is no terminal gets a line
PLAIN = {"\u00b1": "+-", "\u00d7": "x", "\u2192": "->", "\u2013": "-"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def speak_any_encoding() -> None:
    """Let standard output and errors write what their encoding lacks in its letters ("+-" for "±") or as "?"."""
    codecs.register_error("qbench.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="qbench.plain")


def say(text: str, end: str = "\n") -> None:
    """Print `text`. Where that cannot be done any more (a closed pipe, a full disk) that is said; the work goes on."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for the rest of the process)
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"qbench: the output cannot be written any more ({reason}); the work goes on without it\n")


class Screen:
    """Prints lines and the progress of phases; `quiet` (worker processes other than the first) prints nothing.

    `label` stands before every line: which of several runs side by side it is of.
    """

    def __init__(self, quiet: bool = False, label: str = "") -> None:
        self.quiet, self.label, self.spoken = quiet, label, 0.0
        self.live = sys.stdout is not None and sys.stdout.isatty() and not (quiet or label)

    def line(self, text: str) -> None:
        """Print one line."""
        self.spoken = time.monotonic()
        if not self.quiet:
            say(f"{self.label}{text}" if text else "")

    def phase(self, name: str, total: int, done: int = 0) -> "Phase":
        """A phase of `total` steps of which `done` are behind us."""
        return Phase(self, name, total, done)


class Phase:
    """Progress of one phase, as a context manager."""

    def __init__(self, screen: Screen, name: str, total: int, done: int) -> None:
        self.screen, self.name, self.total, self.first = screen, name, total, done
        self.bar: Any = None
        self.task: Any = None
        self.start = time.monotonic()

    def __enter__(self) -> Self:
        if self.screen.live:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.first, note="")
        return self

    def advance(self, step: int, note: str = "") -> None:
        """Move the bar to `step`; `note` stays beside it."""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, **({"note": note} if note else {}))
        elif time.monotonic() - max(self.start, self.screen.spoken) > SILENCE:
            self.report(step, f"step {step} of {self.total}  {note}")

    def report(self, step: int, text: str) -> None:
        """One line about the state at `step`, with the time left."""
        done = step - self.first
        left = (time.monotonic() - self.start) / done * (self.total - step) if done else 0.0
        remaining = "" if step >= self.total else f"  {clock(left)} left"
        line = f"{self.name}  {text}{remaining}"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            self.screen.line(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


def clock(seconds: float) -> str:
    """Seconds as 9 s, 3:05 or 2:07:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
