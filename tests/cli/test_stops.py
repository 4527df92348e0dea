"""How commands end: by a signal, a time limit, a killed worker, a reader that went away; what was done is kept."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qbench import screen

Cli = Callable[..., Any]
TINY = ("model=tiny", "dataset=synthetic", "budget=smoke", "tensorboard=false", "device=cpu", "out=o")
# Two runs that would go on for an hour, in two workers.
ENDLESS = (
    *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=float", "seed=0,1", "checkpoint_seconds=0"),
    *("train.steps=1000000", "train.evaluate_every=1e5", *TINY),
)


def running(out: Path, one: "subprocess.Popen[str]", count: int = 2) -> None:
    """Return once so many runs have written a checkpoint."""
    until = time.monotonic() + 400
    while len(list(out.glob("*/checkpoint.pt"))) < count:
        assert one.poll() is None, one.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)


def workers_of(owner: int) -> list[int]:
    """The processes of `owner` that compute: not the trackers of resources that Python and joblib start beside them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
            line = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(words[1]) == owner and words[0] != "Z" and "tracker" not in line:
            found.append(int(path.parent.name))
    return found


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_time_limit_saves_and_has_a_status_of_its_own(tiny: Cli, tmp_path: Path) -> None:
    words = ("method=float", "out=o")
    said = tiny(*words, "time_limit=0.1s")
    assert said.status == 124
    assert "stopped at step 1 of 6; everything is saved" in said.err
    assert "QBENCH_DEADLINE" not in os.environ
    said = tiny(*words)  # the limit names no other run
    assert said.status == 0
    assert "resumed at step 1 of 6" in said.out
    result = json.loads(next((tmp_path / "o").glob("*/result.json")).read_text())
    assert result["seconds"] <= result["seconds_total"]


def test_a_time_limit_is_that_of_the_whole_sweep(tiny: Cli) -> None:
    said = tiny("-m", "method=float", "seed=0,1,2", "out=o", "time_limit=0.1s")
    assert said.status == 124
    assert "3 runs: 0 done (0 of them before), 0 failed, 0 not applicable, 3 stopped" in said.out
    assert "goes on with what was stopped" in said.out
    assert "Traceback" not in said.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_pool_that_is_stopped_saves_its_runs_and_counts_them(process: Cli, tmp_path: Path, number: int) -> None:
    one = process(*ENDLESS)
    running(tmp_path / "o", one)
    if number == signal.SIGINT:  # a terminal sends it to all of them
        for worker in workers_of(one.pid):
            os.kill(worker, number)
    one.send_signal(number)
    out, err = one.communicate(timeout=400)
    assert one.returncode == 130, err
    assert "2 runs: 0 done (0 of them before), 0 failed, 0 not applicable, 2 stopped" in out
    assert out.count("everything is saved in") == 2
    assert "Traceback" not in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_their_owner_and_one_of_them_does_not_end_the_sweep(process: Cli, tmp_path: Path) -> None:
    one = process(*ENDLESS)
    running(tmp_path / "o", one)
    before = workers_of(one.pid)
    os.kill(before[0], signal.SIGKILL)
    until = time.monotonic() + 400
    while len(now := [w for w in workers_of(one.pid) if w not in before]) < 2:  # a new pool
        assert one.poll() is None, one.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    one.kill()
    out, _ = one.communicate()
    assert "a worker was killed" in out
    until = time.monotonic() + 30
    while any(map(alive, now)):
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_processes_of_one_run_save_together_when_their_owner_is_told_to_end(process: Cli, tmp_path: Path) -> None:
    words = ("method=float", "workers=2", "train.steps=1000000", "train.evaluate_every=1e5", "train.warmup=1")
    one = process(*words, *TINY)
    until = time.monotonic() + 400
    while not list((tmp_path / "o").glob("*/checkpoint.pt")):  # written after each epoch
        assert one.poll() is None, one.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    one.send_signal(signal.SIGTERM)
    _, err = one.communicate(timeout=200)
    assert one.returncode == 130, err
    assert "everything is saved in" in err
    assert "Traceback" not in err


def test_a_run_whose_worker_is_killed_twice_is_told_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.cli.sweep import Cell, table

    monkeypatch.setenv("QBENCH_SWEEP", str(tmp_path))
    for settled in (False, False, True):  # begun, and begun again after its worker was killed
        assert (Cell.begin(3, ["method=pact", "bits=4"]).settled is not None) is settled
    note = json.loads((tmp_path / "00003.json").read_text())
    assert note["error"] == "lost: its worker was killed 2 times"
    assert table(tmp_path) == 1


def test_two_processes_of_a_run_within_a_pool(process: Cli, tmp_path: Path) -> None:
    words = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=float", "workers=2", "seed=0,1", *TINY)
    one = process(*words)
    out, err = one.communicate(timeout=500)
    assert one.returncode == 0, err
    assert "2 runs: 2 done" in out


class Closed:
    """A pipe whose reader went away."""

    encoding = "utf-8"

    def __init__(self, file: Any) -> None:
        self.file, self.calls = file, 0

    def write(self, text: str) -> None:
        self.calls += 1
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        return

    def fileno(self) -> int:
        return int(self.file.fileno())


def test_what_nobody_reads_stops_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with (tmp_path / "stdout").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Closed(file))
        screen.say("hello")
    assert "the output cannot be written any more (Broken pipe); the work goes on" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [1, 2], ids=["run", "sweep"])
def test_a_command_into_a_closed_pipe_does_its_work(process: Cli, tmp_path: Path, seeds: int) -> None:
    words = ("-m", "seed=0,1") if seeds == 2 else ()
    one = process(*words, "method=float", *TINY)
    one.stdout.close()
    err = one.stderr.read()
    assert one.wait(timeout=400) == 0, err
    assert len(list((tmp_path / "o").glob("*/result.json"))) == seeds
    assert err.count("the output cannot be written any more") == 1
    assert "Traceback" not in err


def test_ascii_output(process: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "o" / "Größe"
    result = {
        "method": "m", "w_bits": 4, "a_bits": 4, "model": "n", "dataset": "d", "budget": "b", "bits_per_weight": 4.0,
        "bytes": 1000, "float_accuracy": 90.0, "accuracy_best": None, "accuracy_before_training": None, "seconds": 1.0,
        "epoch_best": None, "protocol": "paper", "init": "float",
    }  # fmt: skip
    data = {"name": "d", "checksum": "0", "augment": "none"}
    for seed in (0, 1):
        (folder / str(seed)).mkdir(parents=True)
        more = {"accuracy_last": 50.0 + seed, "key": str(seed), "seed": seed, "identity": {"seed": seed, "data": data}}
        (folder / str(seed) / "result.json").write_text(json.dumps(result | more))
    one = process("table", folder, PYTHONIOENCODING="ascii")
    out, err = one.communicate(timeout=100)
    assert (one.returncode, err) == (0, "")
    assert "50.50 +- 0.71" in out
    one = process("table", tmp_path / "Maß", PYTHONIOENCODING="ascii")
    assert "no folder" in one.communicate(timeout=100)[1]


def test_a_log_is_not_silent_for_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = screen.Screen(label="[3] ")
    with shown.phase("training", 1000) as view:
        for step in range(1, 1000):
            now[0] += 1.0
            view.advance(step, "loss 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16  # one after each 61 seconds
    assert lines[0] == "[3] training  step 61 of 1000  loss 0.5  15:39 left"


def test_a_run_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    import shutil

    from qbench.errors import UserError
    from qbench.training.recorder import Recorder

    recorder = Recorder(tmp_path / "run", tensorboard=False)
    recorder.scalars(1, 0.5, loss=1.0)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"metrics\.jsonl was removed while the run was at work"):
        recorder.scalars(2, 1.0, loss=1.0)
    recorder.close()
