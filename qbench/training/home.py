"""A run's folder: who may write there, what is left over, and a finished run that is computed anew."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from qbench import files
from qbench.errors import UserError
from qbench.records import BEFORE, RESULT
from qbench.screen import Screen
from qbench.training import evaluation
from qbench.training.run import Run

LOCK = ".lock"
CHECKPOINT = "checkpoint.pt"


def make(folder: Path) -> None:
    """Errors: UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from error


@contextmanager
def sole_owner(folder: Path, screen: Screen) -> Iterator[None]:
    """Hold the folder's lock, the first of several workers for all of them."""
    if evaluation.rank() > 0:
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(
                files.locked(folder / LOCK, lambda: screen.line(f"waiting: another process is at work in {folder}"))
            )
        except OSError as error:
            raise _not_written(folder, error) from error
        yield


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {folder}: {error.strerror}. Choose another folder with out=DIR.")


def clean(folder: Path) -> None:
    """Remove what a finished run has no use for; a kill right after its result was written leaves it lying."""
    for name in (CHECKPOINT, BEFORE):
        (folder / name).unlink(missing_ok=True)
    files.remove_parts(folder)


def left_over(folder: Path) -> bool:
    """Whether there is something to `clean`."""
    return any((folder / name).exists() for name in (CHECKPOINT, BEFORE))


def beside(run: Run) -> Run:
    """The same run in a folder beside its own, where it is computed anew while the finished one stays."""
    return replace(run, folder=run.folder.with_name(f"{run.folder.name}.anew"))


def take_place(run: Run, screen: Screen) -> None:
    """Put what `beside` has finished, if it has, into the run's own place; what was there is kept as FOLDER.old-1, ...

    A kill at any moment loses neither: the next command for this run takes up what is finished and not in its place.

    Errors: UserError where the folders cannot be renamed.
    """
    anew = beside(run).folder
    if not (anew / RESULT).is_file():
        return
    try:
        if run.folder.exists():
            if any(path.name != LOCK for path in run.folder.iterdir()):
                old = next(
                    p for n in count(1) if not (p := run.folder.with_name(f"{run.folder.name}.old-{n}")).exists()
                )
                run.folder.rename(old)
                screen.line(f"computed anew; what was there before is kept in {old}")
            else:
                shutil.rmtree(run.folder)
        anew.rename(run.folder)
    except OSError as error:
        raise UserError(f"{anew} is finished, but cannot be renamed to {run.folder}: {error.strerror}") from error
