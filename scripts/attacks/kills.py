"""Commands that are killed, or find the disk full, and are run again: they must end as if nothing had happened."""

import errno
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.judging import Said, Table, Work, broken, forked, fresh, plain, tell
from attacks.tree import WORDS, bench_entry, end_of, study_run
from qbench.bench import command as bench
from qbench.cli import command

# What changes files, among the events that Python tells of (sys.addaudithook).
EVENTS = (
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("shutil.copyfile", "shutil.move", "shutil.rmtree", "fcntl.flock"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RUN = (*WORDS, "train.evaluate_every=0.5", "parent.evaluate_every=0.5", "checkpoint_seconds=0")


@dataclass(frozen=True)
class Scene:
    """A command, and what it ends with."""

    work: Work
    end: Callable[[], str]


def scenes() -> dict[str, Scene]:
    found = {
        "a run and its float parent": Scene(typed(*RUN, "method=pact", "bits=4", "out=r"), lambda: end_of(Path("r"))),
        "a run on images in a zip": Scene(
            typed(
                *RUN, "dataset=image_folder", "dataset.root=d/images.zip", "train.batch_size=8", "method=float", "out=z"
            ),
            lambda: end_of(Path("z")),
        ),
        "a sweep": Scene(
            typed("-m", *RUN, "method=pact,dorefa", "init=scratch", "out=w"),
            lambda: end_of(Path("w")) + plain(tables(Path("w"))),
        ),
        "a study": Scene(study_run, lambda: end_of(Path("s/n")) + plain(study_end(Path("s/q/toy")))),
        "bench out=": Scene(bench_twice, lambda: Path("b/bench.json").read_text(encoding="utf-8")),
    }
    if os.environ.get("CXX", "").endswith("/c++"):
        kernels = (*WORDS, "kernels=cpp", "method=pact", "bits=4", "init=scratch", "train.steps=2", "out=k")
        found["building the kernels"] = Scene(typed(*kernels), lambda: end_of(Path("k")))
    return found


def attack(home: Path, whole: Path, attacks: int, seed: int, only: set[str], table: Table) -> None:
    """Of each command `attacks` kills before an operation on a file, as many full disks, as many kills at any time."""
    for name, scene in scenes().items():
        if only and name not in only and "kills" not in only:
            continue
        fresh(whole, home)
        count = home / "count"
        clean = forked(counting(scene.work, count), home / "copy")
        if clean.status:
            raise SystemExit(f"{name}: {clean}")
        operations, seconds = count.read_text(encoding="utf-8").split()
        end = forked(showing(scene), home / "copy").out
        for way, made in ways(scene.work, int(operations), float(seconds)).items():
            counts: Counter[str] = Counter()
            for number in range(attacks):
                chance = random.Random(f"{seed} {name} {way} {number}")
                fresh(whole, home)
                outcome, how, found = once(home, scene, made, chance, end, times=3 if "times" in way else 1)
                counts[outcome] += 1
                tell(outcome, f"{name}, {way}", seed, number, how, found)
            table.row(name, way, counts)


def ways(work: Work, operations: int, seconds: float) -> dict[str, Callable[[random.Random], tuple[Work, str]]]:
    """Ways to stop a command that does so many operations on files in so many seconds."""
    return {
        "killed before an operation on a file": lambda c: at(work, c.randrange(operations), kill),
        "disk full at an operation on a file": lambda c: at(work, c.randrange(operations), full),
        "killed at any time, up to three times": lambda c: later(work, c.random() * seconds),
    }


def once(
    home: Path,
    scene: Scene,
    made: Callable[[random.Random], tuple[Work, str]],
    chance: random.Random,
    end: str,
    times: int,
) -> tuple[str, str, Said]:
    """Stop the command, start it again, and compare; what it says when the disk is full is judged, too."""
    hows, said, done = [], False, False
    for _ in range(chance.randint(1, times)):
        work, how = made(chance)
        hows.append(how)
        found = forked(work, home / "copy")
        said, done = "No space left" in found.out + found.err, found.status == 0
        if found.status == -signal.SIGKILL:
            continue
        if failure := broken(found) or ("" if done or said else "UNEXPECTED"):
            return failure, how, found
    found = forked(scene.work, home / "copy")
    if failure := broken(found) or ("UNEXPECTED" if found.status else ""):  # nobody has to put anything right by hand
        return failure, "; ".join(hows), found
    shown = forked(showing(scene), home / "copy")
    if shown.out != end and not (done and said):  # done, but not as asked for, and that was told
        return "SILENT", "; ".join(hows), shown
    return ("refused" if said else "harmless"), "; ".join(hows), found


# Ways to stop.


def kill(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def at(work: Work, number: int, act: Callable[[str], None]) -> tuple[Work, str]:
    """`act` before the operation on a file of that number, and the operation in words."""

    def run() -> int:
        left = [number]

        def count(event: str, path: str) -> None:
            left[0] -= 1
            if left[0] == -1:
                print(f"{act.__name__} before {event} {path}", file=sys.stderr)
                act(path)

        listen(count)
        return work()

    return run, f"{act.__name__} before operation {number}"


def later(work: Work, seconds: float) -> tuple[Work, str]:
    """A kill after `seconds`."""

    def run() -> int:
        if os.fork() == 0:  # not by a timer: that a library may have taken
            owner = os.getppid()
            time.sleep(seconds)
            if os.getppid() == owner:
                os.kill(owner, signal.SIGKILL)
            os._exit(0)
        return work()

    return run, f"killed after {seconds:.2f} s"


def counting(work: Work, note: Path) -> Work:
    """The command, which notes how many operations on files it has done, in how many seconds."""

    def run() -> int:
        seen = [0]
        owner, began = os.getpid(), time.monotonic()

        def count(event: str, path: str) -> None:
            if os.getpid() == owner:
                seen[0] += 1

        listen(count)
        status = work()
        number = seen[0]
        note.write_text(f"{number} {time.monotonic() - began}", encoding="utf-8")
        return status

    return run


def listen(to: Callable[[str, str], None]) -> None:
    """Call `to` before each operation that changes a file here, for the rest of this process."""
    here = os.getcwd()
    sync = os.fsync

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS and event != "open":
            return
        path = str(arguments[0])
        flags = arguments[2] if event == "open" and len(arguments) > 2 and isinstance(arguments[2], int) else 0
        if event == "open" and not (flags & WRITING):
            return
        inside = event == "fcntl.flock" or not os.path.isabs(path) or path.startswith(here)
        if inside and not path.startswith("/dev") and os.getcwd() == here:
            to(event, path)

    def fsync(descriptor: int) -> None:
        to("fsync", "")
        sync(descriptor)

    os.fsync = fsync  # no event tells of it
    sys.addaudithook(hook)


# What is done, and what it ends with.


def typed(*words: str) -> Work:
    def run() -> int:
        here = Path.cwd()
        os.environ |= {"QBENCH_CACHE": str(here / "kept"), "QBENCH_KERNELS": str(here / "built")}
        return command.main(list(words))

    return run


def showing(scene: Scene) -> Work:
    def run() -> int:
        print(scene.end())
        return 0

    return run


def tables(out: Path) -> str:
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(out.glob("sweep-*.csv")))


def study_end(folder: Path) -> str:
    """results.json without what differs from run to run."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    entries = [{k: v for k, v in e.items() if k != "seconds"} for e in content["runs"]]
    return json.dumps([entries, content["failed"]], sort_keys=True)


def bench_twice() -> int:
    for name in ("step/lsq", "step/pact"):
        bench.write(Path("b"), [bench_entry(name, 1.25)])
    return 0
