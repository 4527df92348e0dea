"""Sweeps: one table, seeds as mean ± standard deviation, what is done is skipped, what cannot be asked is n/a."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from qbench.cli import overrides, sweep
from qbench.config import catalog
from qbench.errors import UserError
from qbench.figures import report

Cli = Callable[..., Any]


def last_table(text: str) -> list[str]:
    """The rows of the table at the end of `text`."""
    lines = text.splitlines()
    head = max(i for i, line in enumerate(lines) if line.startswith("method ") and "bits W/A" in line)
    return [
        line
        for line in lines[head + 2 :]
        if line.strip() and " runs: " not in line and not line.startswith("table and")
    ]


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
    said = tiny("-m", "method=flexor", "bits=0.33,0.3", "plan=true", "out=o")
    assert said.status == 0, said.err
    assert "2 runs: 0 done (0 of them before), 0 failed, 1 not applicable, 1 planned" in said.out
    assert "n/a: method=flexor: w_bits=0.33 needs n_in" in said.out


def test_a_sweep_of_which_nothing_is_applicable_has_failed(tiny: Cli) -> None:
    said = tiny("-m", "method=flexor", "bits=0.33", "out=o")
    assert said.status == 2
    assert "nothing of the sweep is applicable: method=flexor: w_bits=0.33 needs n_in" in said.err


def test_a_note_that_is_damaged_or_lost_is_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QBENCH_SWEEP", str(tmp_path))
    for number in range(3):
        cell = sweep.Cell.begin(number, ["method=pact", "bits=4"])
        if number < 2:
            cell.end({"overrides": ["method=pact"], "cells": ["pact"] * 5, "out": "o", "status": "planned"})
    path = tmp_path / "00000.json"
    path.write_text(path.read_text().replace("planned", "n/a"))
    assert sweep.table(tmp_path) == 1
    said = capsys.readouterr()
    assert "00000.json is corrupt" in said.err
    assert "run 3: it has left no 00002.json" in said.err
    assert "3 runs: 0 done (0 of them before), 2 failed, 0 not applicable, 1 planned" in said.out


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
    overrides.check(["method=pact", "train.lr=interval(0.001,0.1)", "hydra/sweeper=basic"], sweep=True)
    with pytest.raises(UserError, match=r"train\.lr=interval\(0\.001,0\.1\) is for a sweeper that searches"):
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
    assert [row[-1] for row in rows] == ["train.lr=1", "train.lr=2"]
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


class Search:
    """Hydra's contract for a sweeper that searches: what a job returns is the value of its trial, or raises."""

    def __init__(self, words: list[list[str]]) -> None:
        self.words = words
        self.values: list[float] = []

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> "Search":
        from hydra.core.plugins import Plugins

        context = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.launcher = Plugins.instance().instantiate_launcher(**context)
        return self

    def sweep(self, arguments: list[str]) -> None:
        for i, words in enumerate(self.words):
            (ret,) = self.launcher.launch([[*arguments, *words]], initial_job_idx=i)
            self.values.append(float(ret.return_value))


@pytest.fixture
def searching(tiny: Cli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """searching(search, *words): a command whose sweeper is `search`."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    store = ConfigStore.instance()
    store.store(group="hydra/sweeper", name="search", node={"_target_": "Search", "direction": "maximize"})

    def call(search: Search, *words: str) -> Any:
        monkeypatch.setattr(Plugins, "instantiate_sweeper", lambda self, **more: search.setup(**more))
        return tiny("-m", "hydra/sweeper=search", "out=o", *words)

    yield call
    del store.repo["hydra"]["sweeper"]["search.yaml"]


def test_a_search_goes_on_after_a_run_that_failed(searching: Cli, tmp_path: Path) -> None:
    search = Search([["train.lr=1e30"], ["train.lr=0.01"], ["bits=33"]])
    said = searching(search, "method=pact", "bits=4")
    assert said.status == 1, said.err
    assert re.search("failed: .*train.lr=1e30: the loss of method=pact became nan", said.err)
    (good,) = [r["accuracy_last"] for r in results(tmp_path / "o") if r["method"] == "pact"]
    assert search.values == [0.0, good, 0.0]
    assert "3 runs: 1 done (0 of them before), 1 failed, 1 not applicable" in said.out


def test_a_search_that_is_stopped_or_looks_for_the_worst_ends(searching: Cli) -> None:
    search = Search([["seed=0"], ["seed=1"], ["seed=2"]])
    said = searching(search, "method=float", "train.steps=100000", "time_limit=2s")
    assert said.status == 124, said.err
    assert search.values == []  # what was not computed is no value
    assert "1 runs: 0 done (0 of them before), 0 failed, 0 not applicable, 1 stopped" in said.out
    said = searching(search, "method=float", "hydra.sweeper.direction=minimize")
    assert said.status == 2
    assert "hydra.sweeper.direction=maximize is needed" in said.err


def result_of(**more: object) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "ptq", "w_bits": 4, "a_bits": 4, "model": "n", "dataset": "d", "budget": "b", "bits_per_weight": 4.0,
        "bytes": 1000, "float_accuracy": 90.0, "accuracy_last": 50.0, "seed": 0, "accuracy_best": None,
        "accuracy_before_training": None, "epoch_best": None, "protocol": "paper", "init": "float", "seconds": 1.0,
    }  # fmt: skip
    return {**base, **more}


SWEPT = [
    result_of(key=f"{w}{s}", seed=s, accuracy_last=50.0 + s, identity={"seed": s, "options": {"w_range": w}})
    for w in ("minmax", "mse")
    for s in (0, 1)
]


def test_a_table_says_what_was_swept_in_every_form() -> None:
    assert [row[-1] for row in report.rows(SWEPT)] == ["options.w_range=minmax", "options.w_range=mse"]
    text = report.table(SWEPT).splitlines()
    assert text[0].endswith("varies")
    assert "varies" not in report.table(SWEPT[:2])
    assert (
        report.table(SWEPT, form="csv")
        .splitlines()[1]
        .startswith("ptq (2 seeds),4/4,n,d,b,90.00 ± 0.00,-,50.50 ± 0.71")
    )
    assert report.table(SWEPT, form="md").splitlines()[1] == "| " + " | ".join(["---"] * 12) + " |"
    latex = report.table(SWEPT, form="latex")
    assert r"options.w\_range=mse \\" in latex
    assert r"50.50 $\pm$ 0.71" in latex
    found = json.loads(report.table(SWEPT, form="json"))
    assert [f["varies"] for f in found] == [{"options.w_range": "minmax"}, {"options.w_range": "mse"}]
    assert found[0]["accuracy_last"] == [50.0, 51.0]
    assert found[0]["seeds"] == [0, 1]


def test_weights_that_are_not_what_the_name_says_are_told() -> None:
    def told(*rules: dict[str, Any], w_bits: float = 4) -> str:
        return report.rows([result_of(w_bits=w_bits, identity={"method": {"rules": [*rules]}})])[0][-1]

    first, last = {"match": "@first", "weight": {"bits": 8}}, {"match": "@last", "keep": True}
    assert told(first, last, {"weight": {"bits": 4}}) == ""
    assert told(first, last) == "weights of 8 bits, not of 4"
    assert told(last) == "weights in float, not of 4"
    assert told(last, w_bits=32) == ""
    assert told({"weight": {"n_in": 8}}, w_bits=0.8) == ""  # flexor: bits follow from the wiring
    assert told({"replace": {"fold": "jacob"}}) == ""


@pytest.mark.parametrize("method", [m for m in catalog.names("method") if m != "float"])
def test_no_method_is_misnamed_as_it_stands(method: str) -> None:
    config = overrides.resolve_row([f"method={method}", "dataset=synthetic", "model=tiny"])
    rules = config["method"]["rules"]
    assert report.misnamed({"w_bits": config["w_bits"], "identity": {"method": {"rules": rules}}}) == ""


def test_copies_of_a_run_are_no_seeds() -> None:
    copies = [{**SWEPT[0], "folder": f"copy {i}"} for i in range(1000)]
    (row,) = report.rows(copies)
    assert row[0] == "ptq"
    assert row[7] == "50.00"


def test_the_table_takes_a_form(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "o" / "run").mkdir(parents=True)
    whole = {**SWEPT[0], "identity": {"data": {"name": "d", "checksum": "0", "augment": "none"}}}
    (tmp_path / "o" / "run" / "result.json").write_text(json.dumps(whole))
    said = cli("table", "o", "format=csv")
    assert said.out.splitlines()[1] == 'ptq,4/4,n,d,b,90.00,-,50.00,-,4.00,"1,000"'
    said = cli("table", "format=cvs", "o")
    assert said.status == 2
    assert "Did you mean 'csv'?" in said.err


def test_a_sweep_leaves_its_table_and_a_picture(tiny: Cli, tmp_path: Path) -> None:
    words = ("-m", "method=float", "seed=0,1", "train.lr=0.01,0.05", "out=o")
    said = tiny(*words)
    assert said.status == 0, said.err
    assert [row.split()[-1] for row in last_table(said.out)[:2]] == ["train.lr=0.01", "train.lr=0.05"]
    left = sorted(p.name for p in (tmp_path / "o").glob("sweep-*"))
    assert [Path(n).suffix for n in left] == [".csv", ".json", ".md", ".png"]
    assert len(json.loads(next((tmp_path / "o").glob("sweep-*.json")).read_text())) == 2
    assert tiny(*words).status == 0
    assert sorted(p.name for p in (tmp_path / "o").glob("sweep-*")) == left  # the same sweep, the same files


def test_compare_names_every_leaf_that_differs_and_what_matters_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"match": "*", "weight": {"bits": 4, "_target_": "x" * 80}}, {"keep": "why"}]
    config = {
        "method": {"name": "lsq", "rules": rules}, "model": {"name": "n"}, "options": {"first_last": 8},
        "train": {"lr": 0.1, "milestones": [1, 2]}, "seed": 0, "threads": None, "out": "a", "dataset": {"root": "x"},
    }  # fmt: skip
    result = {"accuracy_last": 91.25, "method": "lsq", "weights_sha256": "aa", "threads": 1, "seconds": 1.23456789}
    other_rules = [{**rules[0], "weight": {**rules[0]["weight"], "bits": 8}}, rules[1]]
    other = {
        **config, "method": {"name": "lsq", "rules": other_rules}, "train": {"lr": 1 / 3, "milestones": [1, 3]},
        "out": "b", "options": {"first_last": 32},
    }  # fmt: skip
    configs = {"a": config, "b": other}
    results = {"a": result, "b": {**result, "accuracy_last": 90.0, "weights_sha256": "bb", "threads": 2}}
    monkeypatch.setattr(report, "read_config", lambda folder: configs[folder.name])
    monkeypatch.setattr(report, "read_result", lambda path: results[path.parent.name])
    for name in configs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").touch()
    lines = [line.split() for line in report.compare(tmp_path / "a", tmp_path / "b").splitlines()]
    assert lines == [
        ["a", "b"],
        ["method.rules.0.weight.bits", "4", "8", "(+4)"],
        ["options.first_last", "8", "32", "(+24)"],
        ["train.lr", "0.1", "0.333333", "(+0.2333)"],
        ["train.milestones", "[1,", "2]", "[1,", "3]"],
        ["accuracy_last", "91.25", "90", "(-1.25)"],
        ["threads", "1", "2", "(+1)"],
    ]
    configs["b"] = {**other, "method": {"name": "pact", "rules": [], "title": "PACT"}}
    said = report.compare(tmp_path / "a", tmp_path / "b").splitlines()
    assert said[1].split() == ["method.name", "lsq", "pact"]
    assert not [line for line in said if "rules" in line or "title" in line]


def test_the_picture_of_a_sweep_has_a_line_per_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from qbench.figures import drawing, sweep_plot

    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path, dpi, forms: drawn.append(figure))
    two = [result_of(key=f"{m}{w}{s}", method=m, w_bits=w, seed=s, accuracy_last=40.0 + 5 * w + s, identity={"bits": w})
           for m in ("lsq", "pact") for w in (2, 4) for s in (0, 2)]  # fmt: skip
    assert sweep_plot.sweep(tmp_path / "p.png", two)
    (axes,) = drawn[0].axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["lsq", "pact"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2/4", "4/4"]
    assert list(axes.containers[0].lines[0].get_ydata()) == [51.0, 61.0]  # means of 50, 52 and 60, 62
    assert axes.containers[0].lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([51 - 2**0.5, 51 + 2**0.5])
    assert not sweep_plot.sweep(tmp_path / "p.png", [result_of(accuracy_last=None)])
