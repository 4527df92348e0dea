"""Runs side by side: worker processes that are ready before the first run reaches them; the table at the end."""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import current_process, set_start_method
from pathlib import Path
from threading import Thread
from typing import Any

from qbench.config.identity import digest
from qbench.errors import UserError
from qbench.figures import report
from qbench.files import atomic_write
from qbench.records import RESULT_SHAPE, named, read_json, sealed
from qbench.screen import Screen, say, speak_any_encoding
from qbench.shapes import check
from qbench.training.interrupt import SIGNALS, SWEEP, Interrupted, handling, status, stop_sweep, sweep_stopped

MEND = "the run itself may be done, the same command tells"
NOTE = {"overrides": [str], "cells": [str], "out": str, "status": str, "error?": str, "result?": dict}
TRIES = 2  # times that a run is begun whose worker is killed
NEEDED = ("qbench.training.run", "torch._dynamo", "torch.utils.tensorboard.writer", "matplotlib.backends.backend_agg")


@dataclass
class Cell:
    """One run of a sweep: what is noted of it in the sweep's folder, under its number."""

    number: int
    screen: Screen
    settled: dict[str, Any] | None = None  # what is noted of it, where there is nothing to do

    @classmethod
    def begin(cls, number: int, words: Sequence[str]) -> "Cell":
        """Begin it: where it is noted already (by a pool of workers that broke), or may not begin, it is settled."""
        pool = current_process().name != "MainProcess"
        cell = cls(number, Screen(label=f"[{number + 1}] " if pool else ""))
        noted = json.loads(cell._note.read_text(encoding="utf-8")) if cell._note.exists() else {}
        if noted.get("overrides") == [*words]:  # a search that begins anew may try something else under this number
            return replace(cell, settled=noted)
        tries = cell._note.with_suffix(".begun")
        begun = len(tries.read_bytes()) if tries.exists() else 0
        if begun >= TRIES:
            return cell._settled(words, "failed", f"lost: its worker was killed {begun} times")
        if sweep_stopped():
            return cell._settled(words, "stopped", "not begun")
        with tries.open("ab") as file:
            file.write(b".")
        say(f"\n[{number + 1}] {' '.join(words)}")
        return cell

    @property
    def _note(self) -> Path:
        return Path(os.environ[SWEEP]) / f"{self.number:05d}.json"

    def _settled(self, words: Sequence[str], status: str, error: str) -> "Cell":
        note = {**_nothing(words), "status": status, "error": error}
        self.end(note)
        return replace(self, settled=note)

    def end(self, note: dict[str, Any]) -> None:
        """Note what it came to."""
        atomic_write(self._note, json.dumps(sealed(json.loads(json.dumps(note)))))


def _nothing(words: Sequence[str]) -> dict[str, Any]:
    """What is known of a cell that was not composed."""
    given = dict(w.partition("=")[::2] for w in words)
    cells = [given.get(k, "") for k in ("method", "bits", "model", "dataset", "budget")]
    return {"overrides": [*words], "cells": cells, "out": given.get("out", "outputs")}


def sweep_of(run: Callable[[], Any], overrides: Sequence[str]) -> int:
    """Do the runs that `run` starts, and print what they came to; returns the exit status.

    Where a worker is killed (as the system does when memory is out) its pool ends, and a new one goes on; a run whose
    worker is killed twice is told as lost.
    """
    with tempfile.TemporaryDirectory(prefix="qbench-sweep-", ignore_cleanup_errors=True) as folder:
        os.environ |= {SWEEP: folder, "HYDRA_FULL_ERROR": "1"}  # errors come back here
        try:
            while not _done(run, overrides):
                say("qbench: a worker was killed (out of memory?); its runs go on in a new one")
        finally:
            code = table(Path(folder))
            del os.environ[SWEEP], os.environ["HYDRA_FULL_ERROR"]
    return code


def _done(run: Callable[[], Any], overrides: Sequence[str]) -> bool:
    """Whether the pool of workers lived to the end."""
    try:
        with workers(overrides):
            run()
    except Interrupted:  # out of a search, which was asked to stop; its notes say so
        return True
    except Exception as error:
        if type(error).__name__ not in ("TerminatedWorkerError", "BrokenProcessPool"):
            raise
        return False
    return True


def _asked_to_stop(number: int, frame: Any) -> None:
    """The first Ctrl-C or SIGTERM of a pool's owner: its workers save and stop by themselves."""
    if sweep_stopped():
        raise KeyboardInterrupt
    stop_sweep()
    say("\nqbench: stopping; the runs in hand save their state (once more: at once)")


def _be_a_worker(owner: int) -> None:
    """Let this process of a pool leave Ctrl-C to its owner, start processes of its own, and end with its owner."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    speak_any_encoding()
    set_start_method("spawn", force=True)  # loky's own method is unknown to the processes of workers=2
    Thread(target=_watch, args=(owner,), daemon=True).start()


def _watch(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1)
    shutil.rmtree(os.environ.get(SWEEP, ""), ignore_errors=True)
    os._exit(1)


@contextmanager
def workers(overrides: Sequence[str]) -> Iterator[None]:
    """Within the block the sweep's launcher finds its workers, where `overrides` ask for one with several.

    Each computes with one thread. Those of joblib import what a run needs (2 s) while Hydra still composes the runs,
    and are ended as soon as the last run is done; after an error they are left to end by themselves.
    """
    launcher = next((o.partition("=")[2] for o in overrides if o.startswith("hydra/launcher=")), "basic")
    if launcher != "basic":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if launcher != "joblib":
        yield
        return
    from joblib import Parallel, delayed, effective_n_jobs, register_parallel_backend
    from joblib._parallel_backends import LokyBackend
    from joblib.externals.loky import get_reusable_executor

    class Ready(LokyBackend):  # type: ignore[misc]
        """joblib's pool, each process of which is made one of ours before it waits for work."""

        def configure(self, *args: Any, **more: Any) -> Any:
            return super().configure(*args, **more, initializer=_import, initargs=(os.getpid(),))

    asked = next((o.partition("=")[2] for o in overrides if o.startswith("hydra.launcher.n_jobs=")), "-1")
    count = effective_n_jobs(int(asked))
    if count == 1:
        yield
        return
    # joblib keeps its processes for the next Parallel of the same settings: that of Hydra's launcher.
    register_parallel_backend("loky", Ready)
    parallel = Parallel(count, backend="loky", max_nbytes=None)
    early = Thread(target=lambda: parallel(delayed(int)() for _ in range(count)), daemon=True)
    early.start()
    with handling(SIGNALS, _asked_to_stop):
        yield
    early.join()
    get_reusable_executor().shutdown(kill_workers=True)


def _import(owner: int) -> None:
    """Import what every run imports; none of it will ever be garbage, so the collector need not look at it again."""
    _be_a_worker(owner)
    for name in NEEDED:
        import_module(name)
    gc.freeze()


def read_note(path: Path) -> dict[str, Any]:
    """What is noted of a run; a note that is damaged is one of a run that failed."""
    try:
        note = read_json(path, NOTE, MEND)
        with named(path, MEND):
            check(note, {"done": {"result": RESULT_SHAPE}, "planned": {}}.get(note["status"], {"error": str}))
        return dict(note)
    except UserError as error:
        return {**_nothing([f"run {int(path.stem) + 1}"]), "status": "failed", "error": str(error)}


def table(folder: Path) -> int:
    """Print the table of a sweep from the notes that its runs left in `folder`, and leave it where they lie.

    Returns 0 when nothing failed.
    """
    notes = [read_note(path) for path in sorted(folder.glob("*.json"))]
    for begun in sorted(folder.glob("*.begun")):
        if not begun.with_suffix(".json").exists():
            why = {"status": "stopped" if sweep_stopped() else "failed", "error": f"it has left no {begun.stem}.json"}
            notes.append({**_nothing([f"run {int(begun.stem) + 1}"]), **why})
    results = [n["result"] for n in notes if n["status"] == "done"]
    others = [[*n["cells"], "", "", n["status"]] for n in notes if n["status"] != "done"]
    say("")
    say(report.table(results, others))
    failed = [n for n in notes if n["status"] == "failed"]
    for n in failed:
        print(f"failed: {' '.join(n['overrides'])}: {n['error']}", file=sys.stderr)
    skipped = sum(bool(n.get("result", {}).get("reused")) for n in notes)
    count = Counter(n["status"] for n in notes)
    more = "".join(f", {count[k]} {k}" for k in ("planned", "stopped") if count[k])
    say(
        f"\n{len(notes)} runs: {count['done']} done ({skipped} of them before), "
        f"{count['failed']} failed, {count['n/a']} not applicable{more}"
    )
    if results:
        _leave(notes, results, others)
    if notes and count["n/a"] == len(notes):  # then it is no method that lacks a width, but the words are wrong
        raise UserError(f"nothing of the sweep is applicable: {notes[0]['error']}")
    if count["stopped"]:
        say("The same command goes on with what was stopped.")
        return status()
    return 1 if failed else 0


def _leave(notes: list[dict[str, Any]], results: list[dict[str, Any]], others: list[list[str]]) -> None:
    """The table as text, csv and json and one picture, in the sweep's out folder, named by its words."""
    from qbench.figures.sweep_plot import sweep

    base = Path(notes[0]["out"]) / f"sweep-{digest([n['overrides'] for n in notes])}"
    try:
        for form, ending in (("md", "md"), ("csv", "csv"), ("json", "json")):
            atomic_write(base.with_suffix(f".{ending}"), report.table(results, others, form) + "\n")
        form = notes[0].get("figures", "png")
        sweep(base.with_suffix(f".{form}"), results, forms=(form,))
        say(f"table and picture: {base}.md .csv .json .{form}")
    except UserError as error:
        print(f"qbench: {error}", file=sys.stderr)
