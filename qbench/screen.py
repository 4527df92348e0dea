"""What the user sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self


class Screen:
    """Prints lines and the progress of phases; `quiet` (worker processes other than the first) prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stdout.isatty() and not quiet

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            print(text, flush=True)

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
