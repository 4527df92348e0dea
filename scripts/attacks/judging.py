"""A command in a process of its own, and what came of an attack on it."""

import os
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qbench.errors import UserError

SECONDS = 60
GOOD = ("refused", "harmless", "as asked")
BAD = ("SILENT", "UNEXPECTED", "TRACEBACK", "CRASH", "HANG")
Work = Callable[[], int]


@dataclass(frozen=True)
class Said:
    """What a command answered; a signal's number is a negative status."""

    status: int
    out: str
    err: str


def forked(work: Work, folder: Path, seconds: int = SECONDS) -> Said:
    """`work` in a process of its own in `folder`; what it starts is killed with it where it hangs."""
    folder.mkdir(exist_ok=True)
    told = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            for number, path in enumerate(told, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            signal.alarm(seconds)
            status = work()
        except UserError as error:
            print(f"qbench: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, how = os.waitpid(child, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in told)
    return Said(os.waitstatus_to_exitcode(how), out, err)


def broken(found: Said) -> str:
    """The kind of failure that no damage excuses; empty where there is none."""
    if found.status == -signal.SIGALRM:
        return "HANG"
    if found.status < 0:
        return "CRASH"
    if "Traceback" in found.out + found.err or found.status == 99:
        return "TRACEBACK"
    return "UNEXPECTED" if re.search(r"unexpected \w+: ", found.err + found.out) else ""


def judged(path: Path, clean: Said, found: Said) -> str:
    """What came of an attack on the file `path`: `clean` was said of the whole one, `found` of the damaged one.

    Refused: a line on stderr names the file, and the command has failed or says that it left the file out.
    """
    if failure := broken(found):
        return failure
    lines = [line for line in found.err.splitlines() if path.name in line]
    if lines and (found.status != 0 or any("left out" in line for line in lines)):
        return "refused"
    same = plain(found.out) == plain(clean.out) and found.status == clean.status
    return "harmless" if same else "SILENT"


def plain(text: str) -> str:
    """Output without what differs from run to run: times."""
    return re.sub(r"\d+(\.\d+)? ?(s|ms|seconds|img/s|images/s)\b|seconds +[\d.]+|images/s +[\d,]+", "", text)


def fresh(whole: Path, home: Path) -> Path:
    """A copy of the whole tree, in place of the last one."""
    copy = home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy, symlinks=True)
    return copy


class Table:
    """Counts, one row for each thing that was attacked; what is bad is told on stderr as it is seen."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        head = ("what", "by", "attacks", *GOOD, *BAD)
        print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head), flush=True)

    def row(self, what: str, by: str, counts: Counter[str]) -> None:
        self.total += counts
        print(self._line(what, by, counts), flush=True)

    def end(self) -> int:
        """Print the sum; returns the exit status: 1 where anything bad was seen."""
        print(self._line("all", "", self.total), flush=True)
        return 1 if any(self.total[k] for k in BAD) else 0

    def _line(self, what: str, by: str, counts: Counter[str]) -> str:
        return f"| {what} | {by} | {counts.total()} | {' | '.join(str(counts[k]) for k in (*GOOD, *BAD))} |"


def tell(outcome: str, what: str, seed: int, number: int, how: str, found: Said) -> None:
    """Say how to see a bad outcome again, and the end of what the command said."""
    if outcome in BAD:
        said = " / ".join((found.err.strip() or found.out.strip()).splitlines()[-3:])
        print(f"{outcome}: {what}, seed {seed}, attack {number}: {how}\n    {said[-400:]}", file=sys.stderr, flush=True)
