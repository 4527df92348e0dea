"""Attacks qbench in the ways that files, machines and users do, and counts in one table what comes of it.

    python scripts/attack.py [attacks] [seed] [NAME ...]

NAME: files, kills, options, or one row of the table; all of it by default. `attacks` is how many there are on each kind
of file and of each way to stop a command; of wrong options there are five times as many. What is attacked:

    files       each kind that is read: flipped bits, cut ends, pieces taken out, zeros, fields of another type
    kills       a command that is killed, or finds the disk full, before an operation on a file or at any time; then it
                is run again, and must end as if nothing had happened
    options     wrong values, names and quoting in runs, sweeps and all other commands

and what is seen:

    refused     the command says so and names the file or the option, or leaves the file out by name
    harmless    the same outcome as without the attack
    as asked    what was written by hand, or typed, is another valid wish, and the answer shows that it was followed
    SILENT      another outcome, and no word about it
    UNEXPECTED  an error that qbench did not foresee
    TRACEBACK, CRASH, HANG (60 s)

Exit status 1 where any of the last five was seen. tests/test_attack.py plants faults and sees that they are counted.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever is installed

import matplotlib.backends.backend_agg
import torch._dynamo
from attacks import files, kills, options, tree
from attacks.judging import Table, forked

import qbench.figures.sweep_plot
import qbench.training.execute
import qbench.training.finished

LOADED = (matplotlib, torch, qbench)  # once, here, and not by each process that is started below
PARTS = ("files", "kills", "options")


def main(arguments: Sequence[str]) -> int:
    attacks = int(arguments[0]) if arguments else 60
    seed = int(arguments[1]) if len(arguments) > 1 else 0
    return attack_all(attacks, seed, set(arguments[2:]))


def attack_all(attacks: int, seed: int, only: set[str]) -> int:
    """Attack everything, or what is named; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="qbench-attack-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        os.environ["QBENCH_CACHE"] = str(home / "cache")
        whole = prepared(home)
        table = Table()
        files.attack(home, whole, attacks, seed, only, table)
        kills.attack(home, whole, attacks, seed, only, table)
        options.attack(home, whole, attacks * 5, seed, only, table)
        return table.end()


def prepared(home: Path) -> Path:
    """The tree to attack. It is made where its copies will lie, as the cache of images knows them by their place."""
    forked(lambda: 0 if tree.compiled(home) else 1, home / "built", 600)
    if (home / "c++").is_file():
        os.environ["CXX"] = str(home / "c++")
    for work in (tree.prepare, files.warm_up):
        said = forked(work, home / "copy", 600)
        if said.status:
            raise SystemExit(f"the runs to attack could not be made:\n{said.out}\n{said.err}")
    return shutil.move(home / "copy", home / "whole")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
