"""Sweeps: one table, seeds as mean ± standard deviation, what is done is skipped, what cannot be asked is n/a."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from qbench.cli import overrides
from qbench.errors import UserError
from qbench.figures import report

Cli = Callable[..., Any]


def last_table(text: str) -> list[str]:
    """The rows of the table at the end of `text`."""
    lines = text.splitlines()
    head = max(i for i, line in enumerate(lines) if line.startswith("method ") and "bits W/A" in line)
    return [line for line in lines[head + 2 :] if line.strip() and " runs: " not in line]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted(out.rglob("result.json"))]


def test_methods_bits_and_seeds_in_one_table(tiny: Cli, tmp_path: Path) -> None:
    words = ("-m", "method=pact,dorefa", "bits=2,4", "seed=0,1", "out=o")
    said = tiny(*words)
    assert said.status == 0, said.err
    rows = last_table(said.out)
    assert len(rows) == 4
    assert all("(2 seeds)" in row for row in rows)
    of = [r for r in results(tmp_path / "o") if (r["method"], r["w_bits"]) == ("dorefa", 2)]
    values = [r["accuracy_last"] for r in of]
    (row,) = [row for row in rows if re.search(r"^dorefa .* 2/2 ", row)]
    assert f"{mean(values):.2f} ± {stdev(values):.2f}" in row
    assert "8 runs: 8 done (0 of them before), 0 failed, 0 not applicable" in said.out
    again = tiny(*words)
    assert again.status == 0
    assert again.out.count("skipped, done before") == 8
    assert last_table(again.out) == rows
    assert "8 runs: 8 done (8 of them before)" in again.out
    assert len(results(tmp_path / "o")) == 8 + 2  # one parent per seed


def test_a_cell_that_a_method_does_not_have_is_a_row_of_its_own(tiny: Cli) -> None:
    said = tiny("-m", "method=xnor,pact", "bits=1,2", "out=o")
    assert said.status == 0, said.err
    rows = last_table(said.out)
    assert len(rows) == 4
    (row,) = [row for row in rows if "n/a" in row]
    assert row.split()[:3] == ["xnor", "2", "tiny"]
    assert "4 runs: 3 done (0 of them before), 0 failed, 1 not applicable" in said.out
    assert "w_bits of 1" in said.out


def test_bits_that_no_wiring_of_flexor_gives_are_a_row_of_their_own(tiny: Cli) -> None:
    said = tiny("-m", "method=flexor", "bits=0.33", "out=o")
    assert said.status == 0, said.err
    assert "1 runs: 0 done (0 of them before), 0 failed, 1 not applicable" in said.out
    assert "n/a: method=flexor: w_bits=0.33 needs n_in" in said.out


def test_an_option_that_some_methods_lack_leaves_the_others_alone(tiny: Cli, tmp_path: Path) -> None:
    words = ("-m", "method=irnet,bwn,binary", "plan=true", "out=o")
    said = tiny(*words, "options.gradient=paper,exact")
    assert said.status == 0, said.err
    assert "6 runs: 0 done (0 of them before), 0 failed, 2 not applicable, 4 planned" in said.out
    assert [row.split()[0] for row in last_table(said.out) if "n/a" in row] == ["irnet"]  # equal rows are one
    assert said.out.count("n/a: unknown option of method=irnet 'gradient'. Did you mean 'act_gradient'?") == 2
    said = tiny(*words, "options.gradeint=paper")  # none has it
    assert (said.status, said.out) == (2, "")
    assert "unknown option 'options.gradeint'. Did you mean 'options.gradient'?" in said.err


def test_intervals_and_patterns_are_checked_too() -> None:
    overrides.check(["method=pact", "train.lr=interval(0.001,0.1)"], sweep=True)
    overrides.check(["method=glob(*nor)", "bits=1"], sweep=True)
    with pytest.raises(UserError, match="fits nothing"):
        overrides.check(["method=glob(zz*)"], sweep=True)
    with pytest.raises(UserError, match=r"train\.lrr"):
        overrides.check(["method=pact", "train.lrr=interval(0.001,0.1)"], sweep=True)


def test_plans_of_a_sweep_leave_nothing(tiny: Cli, tmp_path: Path) -> None:
    said = tiny("-m", "method=twn,ttq", "plan=true", "out=o")
    assert said.status == 0, said.err
    assert said.out.count("bits per quantized weight") == 2
    assert [row.split()[-1] for row in last_table(said.out)] == ["planned", "planned"]
    assert not (tmp_path / "o").exists()


def test_joblib_runs_side_by_side_with_one_thread_each(process: Cli, tmp_path: Path) -> None:
    words = ("model=tiny", "dataset=synthetic", "budget=smoke", "tensorboard=false", "device=cpu", "out=o")
    one = process(
        "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=float", "seed=0,1", *words, OMP_NUM_THREADS=""
    )
    out, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    assert len(last_table(out)) == 1
    assert "2 runs: 2 done" in out
    found = results(tmp_path / "o")
    assert [r["threads"] for r in found] == [1, 1]
    assert "Traceback" not in err


def test_the_runs_come_to_workers_that_have_imported_what_they_need(process: Cli) -> None:
    """Those that import early are those of Hydra's launcher, and none is left behind."""
    script = """
import os, sys, time
from dataclasses import asdict
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from joblib import Parallel, delayed
from qbench.cli.sweep import workers

settings = {k: v for k, v in asdict(JobLibLauncherConf()).items() if k != "_target_"}
settings |= {"n_jobs": 2, "backend": "loky", "timeout": None}  # as the launcher has them
with workers(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]):
    time.sleep(2)  # Hydra composes
    asked = delayed(eval)("(os.getpid(), 'torch._dynamo' in sys.modules)", {"os": os, "sys": sys})
    found = Parallel(**settings)(asked for _ in range(4))
assert all(ready for _, ready in found), found
for number, _ in found:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        continue
    raise AssertionError(f"{number} still runs")
"""
    one = process.script("-c", script)
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err


def test_rows_that_differ_in_anything_but_the_seed_stand_apart() -> None:
    base = {
        "method": "m", "w_bits": 4, "a_bits": 4, "model": "n", "dataset": "d", "budget": "b", "bits_per_weight": 4.0,
        "bytes": 1000, "accuracy_last": 50.0,
    }  # fmt: skip
    same = [{**base, "seed": s, "identity": {"seed": s, "teacher": f"seed {s}", "recipe": {"lr": 1}}} for s in (0, 1)]
    other = {**base, "seed": 0, "identity": {"seed": 0, "recipe": {"lr": 2}}}
    rows = report.rows([*same, other])
    assert [row[0] for row in rows] == ["m (2 seeds)", "m"]
    assert rows[0][7] == "50.00 ± 0.00"
    assert rows[1][7] == "50.00"
    assert rows[0][5] == "-"


def test_the_objective_is_the_last_accuracy(monkeypatch: pytest.MonkeyPatch, tiny: Cli, tmp_path: Path) -> None:
    from qbench.cli import command as module

    seen: list[float] = []
    job = module.job
    monkeypatch.setattr(module, "job", lambda config: (seen.append(value := job(config)), value)[1])
    assert tiny("-m", "method=float", "seed=0,1", "out=o").status == 0
    assert sorted(seen) == sorted(r["accuracy_last"] for r in results(tmp_path / "o"))
