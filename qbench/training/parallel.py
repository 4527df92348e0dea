"""One run on several processes of this machine (torch.distributed); the first one writes."""

import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.records import read_json
from qbench.screen import Screen
from qbench.training import device
from qbench.training.interrupt import SIGNALS, Interrupted, handling
from qbench.training.run import Run, prepare

LOST = "lost another worker"
NOTE = {"result?": dict, "kind?": str, "error?": str}  # what a worker leaves: one of the first and the others
Perform = Callable[[Run, Screen], dict[str, Any]]  # of a module, as the processes import it


def in_workers(config: dict[str, Any], workers: int, perform: Perform) -> dict[str, Any]:
    """Let `perform` do the run of `config` in `workers` processes that average their gradients; returns the result.

    Each gets its share of every batch and of the CPU threads, or a GPU of its own. Backend: nccl where every worker has
    a GPU, else gloo.

    Errors: what stopped the first worker, as UserError where it was one.
    """
    for part in ("parent", "train") if config["init"] == "float" or config["distill"]["weight"] else ("train",):
        if (size := config[part]["batch_size"]) % workers:  # equal shares: what a step averages needs no weights
            raise UserError(f"workers={workers} must divide {part}.batch_size={size}")
    threads = config["threads"] or max(1, device.threads(None) // workers)
    with tempfile.TemporaryDirectory(prefix="qbench-workers-") as folder:
        ended = ""
        try:
            context = mp.start_processes(  # type: ignore[attr-defined]
                _work,
                args=(workers, {**config, "threads": threads}, folder, perform),
                nprocs=workers,
                start_method="spawn",
                join=False,
            )

            def passed_on(number: int, frame: Any) -> None:
                """SIGTERM to every worker; a terminal has sent its Ctrl-C to them already."""
                for pid in context.pids() if number == signal.SIGTERM else ():
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)

            with handling(SIGNALS, passed_on):
                while not context.join():
                    pass
        except mp.ProcessExitedException as error:  # type: ignore[attr-defined]
            ended = str(error)
        notes = [read_json(path, NOTE) for path in sorted(Path(folder).glob("*.json"))]
    note = next((n for n in notes if "result" not in n and n["kind"] != LOST), None)
    ended = ended or next((n["error"] for n in notes if n.get("kind") == LOST), "")
    if note is None and not ended:
        return dict(notes[0]["result"])
    if note is None:
        raise UserError(f"a worker ended ({ended}). The same command goes on from the last checkpoint.")
    if note["kind"] == "Interrupted":
        raise Interrupted(note["error"])
    raise UserError(note["error"]) if note["kind"] == "UserError" else RuntimeError(note["error"])


def _work(rank: int, workers: int, config: dict[str, Any], folder: str, perform: Perform) -> None:
    nccl = torch.cuda.device_count() >= workers and config["device"] != "cpu"
    if nccl:
        torch.cuda.set_device(rank)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("nccl" if nccl else "gloo", init_method=store, rank=rank, world_size=workers)
    note: dict[str, Any]
    try:
        note = {"result": perform(prepare(config), Screen(quiet=rank > 0))}
    except (UserError, Interrupted) as error:
        note = {"kind": type(error).__name__, "error": str(error)}
    except Exception as error:
        # what gloo and NCCL say when another worker is gone is not the cause
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        told = traceback.format_exc() if config["debug"] else repr(error)
        note = {"kind": LOST if lost else "Exception", "error": told}
    atomic_write(Path(folder) / f"{rank}.json", json.dumps(note))
    if "result" not in note:  # the others may wait for this worker in vain: end them all
        os._exit(0 if rank == 0 else 1)
    dist.destroy_process_group()
