"""Runs side by side: worker processes that are ready before the first run reaches them; the table at the end."""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from qbench.errors import UserError
from qbench.figures import report

NEEDED = ("qbench.training.run", "torch._dynamo", "torch.utils.tensorboard.writer", "matplotlib.backends.backend_agg")


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
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.externals.loky import get_reusable_executor

    asked = next((o.partition("=")[2] for o in overrides if o.startswith("hydra.launcher.n_jobs=")), "-1")
    count = effective_n_jobs(_whole(asked))
    if count == 1:
        yield
        return
    # joblib keeps its processes for the next Parallel of the same settings: that of Hydra's launcher.
    parallel = Parallel(count, prefer="processes", max_nbytes=None)
    early = Thread(target=lambda: parallel(delayed(_import)() for _ in range(count)), daemon=True)
    early.start()
    yield
    early.join()
    get_reusable_executor().shutdown(kill_workers=True)


def _whole(text: str) -> int:
    try:
        return int(text) or 1
    except ValueError:
        raise UserError(f"hydra.launcher.n_jobs must be a whole number, got '{text}'") from None


def _import() -> None:
    """Import what every run imports; none of it will ever be garbage, so the collector need not look at it again."""
    for name in NEEDED:
        import_module(name)
    gc.freeze()


def table(folder: Path) -> int:
    """Print the table of a sweep from the notes that its runs left in `folder`, and leave it where they lie.

    Returns 0 when nothing failed.
    """
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results = [n["result"] for n in notes if n["status"] == "done"]
    others = [[*n["cells"], "", "", n["status"]] for n in notes if n["status"] != "done"]
    print()
    print(report.table(results, others))
    failed = [n for n in notes if n["status"] == "failed"]
    for n in failed:
        print(f"failed: {' '.join(n['overrides'])}: {n['error']}", file=sys.stderr)
    skipped = sum(bool(n.get("result", {}).get("reused")) for n in notes)
    count = Counter(n["status"] for n in notes)
    print(f"\n{len(notes)} runs: {count['done']} done ({skipped} of them before), ", end="")
    planned = f", {count['planned']} planned" if count["planned"] else ""
    print(f"{count['failed']} failed, {count['n/a']} not applicable{planned}")
    if results:
        _leave(notes, results, others)
    return 1 if failed else 0


def _leave(notes: list[dict[str, Any]], results: list[dict[str, Any]], others: list[list[str]]) -> None:
    """The table as text, csv and json and one picture, in the sweep's out folder, named by its words."""
    from qbench.config.resolve import digest
    from qbench.figures.sweep_plot import sweep
    from qbench.files import atomic_write

    base = Path(notes[0]["out"]) / f"sweep-{digest([n['overrides'] for n in notes])}"
    try:
        for form, ending in (("md", "md"), ("csv", "csv"), ("json", "json")):
            atomic_write(base.with_suffix(f".{ending}"), report.table(results, others, form) + "\n")
        sweep(base.with_suffix(".png"), results)
        print(f"table and picture: {base}.md .csv .json .png")
    except UserError as error:
        print(f"qbench: {error}", file=sys.stderr)
