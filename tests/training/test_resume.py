"""Cut off anywhere and started again, a run ends with the same weights and the same records, bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qbench import files

Cli = Callable[..., Any]
TINY = (
    "model=tiny",
    "dataset=synthetic",
    "budget=smoke",
    "tensorboard=false",
    "device=cpu",
    "checkpoint_seconds=0",
    "out=o",
)
LONG = ("train.steps=300", "train.evaluate_every=2", "init=scratch")
METHODS = {
    "pact": ("method=pact", "bits=2"),
    "flexor": ("method=flexor", "bits=0.8"),
    "gupta": ("method=gupta", "options.rounding=stochastic"),
}


def run_folder(out: Path, name: str) -> Path:
    (found,) = out.glob(f"{name}-*")
    return found


def wait_for_step(out: Path, name: str, step: int, one: "subprocess.Popen[str]") -> None:
    """Return once the checkpoint of the run has passed `step`."""
    from qbench.records import read_metrics

    until = time.monotonic() + 240
    while time.monotonic() < until:
        folders = list(out.glob(f"{name}-*"))
        if (
            folders
            and (folders[0] / "checkpoint.pt").is_file()
            and any(r["step"] >= step for r in read_metrics(folders[0]))
        ):
            return
        assert one.poll() is None, one.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def finished(out: Path, name: str) -> tuple[str, str]:
    """(weights_sha256, metrics.jsonl) of the finished run, and no trace of the interruption."""
    folder = run_folder(out, name)
    result = json.loads((folder / "result.json").read_text())
    assert not (folder / "checkpoint.pt").exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"], "temporary files are left"
    return result["weights_sha256"], (folder / "metrics.jsonl").read_text()


@pytest.fixture
def straight(cli: Cli, tmp_path: Path) -> Callable[[str], tuple[str, str]]:
    """The outcome of a run that nobody interrupts."""

    def call(name: str) -> tuple[str, str]:
        said = cli(*METHODS[name], *LONG, *TINY, "out=straight", "checkpoint_seconds=1e9")
        assert said.status == 0, said.err
        return finished(tmp_path / "straight", name)

    return call


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_random_steps(
    name: str, process: Cli, cli: Cli, straight: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    words = (*METHODS[name], *LONG, *TINY)
    draw = random.Random(name)
    for step in sorted(draw.sample(range(1, 200), 2)):
        one = process(*words)
        wait_for_step(tmp_path / "o", name, step, one)
        one.send_signal(signal.SIGKILL)
        one.communicate()
        assert one.returncode == -signal.SIGKILL
        assert not (run_folder(tmp_path / "o", name) / "result.json").exists()
    said = cli(*words, "checkpoint_seconds=1e9")
    assert said.status == 0, said.err
    assert "resumed at step" in said.out
    assert finished(tmp_path / "o", name) == straight(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_ctrl_c_saves_says_how_to_go_on_and_does(
    process: Cli, cli: Cli, straight: Callable[[str], tuple[str, str]], tmp_path: Path, number: int
) -> None:
    words = (*METHODS["pact"], *LONG, *TINY)
    one = process(*words)
    wait_for_step(tmp_path / "o", "pact", 20, one)
    one.send_signal(number)
    _, err = one.communicate(timeout=120)
    assert one.returncode == 130
    assert "The same command goes on" in err
    assert "of 300" in err
    assert "Traceback" not in err
    said = cli(*words)
    assert said.status == 0, said.err
    assert "resumed at step" in said.out
    assert finished(tmp_path / "o", "pact") == straight("pact")


def test_cut_off_between_training_and_result(tiny: Cli, tmp_path: Path) -> None:
    """The last checkpoint is that of the last step; the run then only evaluates and writes."""
    tiny("method=float", "out=straight")
    kill = (
        "import os, signal, sys\n"
        "from qbench.training import execute\n"
        "from qbench.cli.command import main\n"
        "execute.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])\n"
    )
    words = ("method=float", *TINY)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{kill}", *words], cwd=tmp_path
    )
    assert done.returncode == -signal.SIGKILL
    said = tiny("method=float", "out=o")
    assert said.status == 0, said.err
    assert "resumed at step 6 of 6" in said.out
    assert finished(tmp_path / "o", "float") == finished(tmp_path / "straight", "float")


def test_two_runs_that_want_the_same_parent_train_it_once(process: Cli, tmp_path: Path) -> None:
    both = [process("method=pact", f"bits={bits}", *TINY, "parent.steps=150") for bits in (2, 4)]
    said = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sum("float training  epoch" in out for out, _ in said) == 1
    (parent,) = (tmp_path / "o").glob("float-*")
    records = [json.loads(line) for line in (parent / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r.get("phase") == "train"]
    assert len(steps) == len(set(steps))
    assert len(list((tmp_path / "o").glob("pact-*/result.json"))) == 2


def test_the_lock_of_a_dead_process_stops_nobody(process: Cli, tiny: Cli, tmp_path: Path) -> None:
    words = ("method=float", *TINY, "train.steps=2000")
    one = process(*words)
    wait_for_step(tmp_path / "o", "float", 1, one)
    lock = run_folder(tmp_path / "o", "float") / ".lock"
    assert lock.is_file()
    one.kill()
    one.communicate()
    with files.locked(lock, lambda: pytest.fail("the lock of a killed process is held")):
        pass


def test_a_living_lock_is_waited_for(process: Cli, tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o", "plan=true")
    said = tiny("method=float", "out=o")
    folder = run_folder(tmp_path / "o", "float")
    (folder / "result.json").unlink()
    with files.locked(folder / ".lock"):
        one = process("method=float", *TINY)
        assert one.stdout is not None
        line = one.stdout.readline()
        assert "waiting: another process is at work" in line
        assert one.poll() is None
    assert one.wait(timeout=120) == 0
    assert said.status == 0


def test_a_run_that_goes_on_otherwise_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.training import checkpoint, execute

    words = (*METHODS["pact"], *LONG, *TINY)
    assert cli(*words, "threads=2", "time_limit=1s").status == 124
    reads: list[str] = []
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path: (reads.append(path.name), load(path))[1])
    monkeypatch.setattr(execute, "code_hash", lambda config: "0123456789")
    said = cli(*words, "threads=1")
    assert said.status == 0, said.err
    assert reads.count("checkpoint.pt") == 1
    assert "note: continued with other code, threads 1 (before: 2): the result may differ" in said.out
    folder = run_folder(tmp_path / "o", "pact")
    result = json.loads((folder / "result.json").read_text())
    first, then = result["resumed"]
    assert (first["step"], first["threads"], then["threads"]) == (0, 2, 1)
    assert 0 < then["step"] < 300
    assert first["code"] != then["code"] == result["code"] == "0123456789"
    assert cli(*words, "threads=1", "out=straight").status == 0
    told = cli("compare", folder, run_folder(tmp_path / "straight", "pact")).out
    assert "resumed.0.threads" in told
