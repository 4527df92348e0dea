"""The command line as the tests call it: inside this process, or as a process of its own."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process that a test starts
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line has it

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import torch

from qbench.kernels import build

matplotlib.use("agg")
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
KERNELS = str(build.folder())  # the user's own, which are known by their source: compiled once, not once in each pytest
TINY = ("model=tiny", "dataset=synthetic", "budget=smoke", "tensorboard=false", "device=cpu")


@dataclass(frozen=True)
class Said:
    """What a command line answered."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data cache and a data root that no other test sees."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QBENCH_CACHE", str(folder))
    monkeypatch.setenv("QBENCH_DATA", str(folder / "data"))
    monkeypatch.setenv("QBENCH_KERNELS", KERNELS)
    return folder


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """cli(*words): `qbench *words` in this process, in an empty folder; relative `out` folders lie in it."""
    from qbench.cli.command import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["qbench"])
        status = main([str(w) for w in words])
        return Said(status, *capfd.readouterr())

    return call


@pytest.fixture
def tiny(cli: Callable[..., Said]) -> Callable[..., Said]:
    """tiny(*words): `cli` for the smallest run there is; later words win."""

    def call(*words: object) -> Said:
        keys = {str(w).partition("=")[0] for w in words}
        return cli(*(w for w in TINY if w.partition("=")[0] not in keys), *words)

    return call


class Processes:
    """Starts command lines as processes in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *words: object, **environment: str) -> "subprocess.Popen[str]":
        """Start `python -m qbench *words`."""
        return self.script("-m", "qbench", *words, **environment)

    def script(self, *words: object, **environment: str) -> "subprocess.Popen[str]":
        """Start `python *words`."""
        one = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env={k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), **environment}.items() if v},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(one)
        return one


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Processes]:
    """process(*words): a command line of its own, in an empty folder; what still runs at the end is killed."""
    processes = Processes(tmp_path)
    yield processes
    for one in processes.started:
        if one.poll() is None:
            one.kill()
        one.communicate()
