"""The benchmark: its names and numbers, what it holds a later version to, its page; start-up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qbench import kernels
from qbench.bench import busy, command, gpu, memory, page
from qbench.bench.setting import STEPS, Setting, trainer
from qbench.bench.timing import Entry, alternate, ratio
from qbench.bench.whole import FIRST_STEP
from qbench.config import catalog
from qbench.errors import UserError

Cli = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "benchmarks.json"


def entry(name: str = "step/pact", mode: str = "fp32/torch", value: float = 1.5, **more: Any) -> dict[str, Any]:
    facts = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2", "python": "3"}
    plain = Entry(name, mode, value, "the base", value / 10, 0.1, 100.0, "resnet20", 128, 5, {"w_bits": 4, "a_bits": 4})
    return {**plain.plain(), "machine": facts, **more}


def test_acts_take_turns_and_ratios_are_taken_round_by_round() -> None:
    turns: list[str] = []
    times = alternate({"a": lambda: turns.append("a"), "b": lambda: (turns.append("b"), 0.5)[1]}, rounds=3, warm=1)
    assert turns == ["a", "b"] * 4
    assert times["b"] == [0.5] * 3
    assert all(0 < t < 0.1 for t in times["a"])
    assert ratio([1.0, 6.0, 10.0], [1.0, 3.0, 2.0]) == 2.0


def test_quick_benchmark_writes_a_list_of_entries(cli: Cli, tmp_path: Path) -> None:
    said = cli("bench", "quick=true", "only=step/pact,step/ls?,data/augment", "rounds=1", "threads=1", "out=o")
    assert said.status == 0, said.err
    entries = command.read(tmp_path / "o" / "bench.json")
    assert isinstance(entries, list)
    steps = {(e["name"], e["mode"].partition("/")[0]) for e in entries if e["name"].startswith("step/")}
    assert steps == {(f"step/{m}", p) for m in ("pact", "lsq") for p in ("fp32", "bf16")}
    for e in entries:
        assert e["ratio"] > 0
        assert e["seconds"] > 0
        assert e["base_seconds"] > 0
        assert set(e["machine"]) >= {"cpu", "cores", "threads", "torch"}
        assert e["name"] in said.out
    assert {e["mode"].partition("/")[2] for e in entries if e["name"] == "step/pact"} <= {"compiler", "torch"}
    assert next(e["images_per_s"] for e in entries if e["name"] == "data/augment") > 0
    # What is measured again replaces what was there; the rest stays.
    assert cli("bench", "quick=true", "only=step/pact", "rounds=1", "precision=fp32", "out=o").status == 0
    again = command.read(tmp_path / "o" / "bench.json")
    assert len(again) == len(entries)
    assert [e for e in again if e["name"] != "step/pact"] == [e for e in entries if e["name"] != "step/pact"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("only=step/pct",), "nothing is called step/pct"),
        (("threads=" + "9" * 30,), "threads must be a whole number in 1..1024"),
        (("check", "margin=nan"), "margin must be a number of at least 0, got nan"),
        (("rounds=0",), "rounds must be a whole number in 1..1000, got 0"),
        (("quick=yes",), "quick must be true or false, got 'yes'"),
        (("model=resnet21",), "resnet20"),
        (("kernels=gpu",), "compile, cpp, torch"),
        (("onyl=x",), "Did you mean 'only='"),
        (("chek",), "check"),
        (("page", "against=nowhere.json"), "no nowhere.json"),
    ],
)
def test_wrong_words_are_named(cli: Cli, words: tuple[str, ...], message: str) -> None:
    said = cli("bench", *words)
    assert said.status == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_method_is_timed_with_everything_it_switches_on() -> None:
    setting = Setting(models=("tiny",), batch=8)
    loop, x, y = trainer(setting.config("qat", "tiny"), torch.device("cpu"), "fp32")
    loop._step(x, y)
    assert loop.state.step == STEPS * 9 // 10 + 1
    from qbench.quant.surgery import activation_quantizers

    assert all(q.enabled for q in activation_quantizers(loop.model).values())  # `delay` is over


def test_the_check_names_what_got_worse() -> None:
    old = [entry(), entry("step/lsq", value=1.0), entry("step/gone")]
    new = [entry(value=1.86), entry("step/lsq", value=1.3), entry("step/new", value=9.0)]
    assert command.worse(new, old, 0.25) == ["step/lsq fp32/torch: 1.0 -> 1.3"]
    assert command.worse(new, old, 0.5) == []
    with pytest.raises(UserError, match="nothing that was measured"):
        command.worse([entry("step/new")], old, 0.25)


def test_accuracies_get_worse_by_falling() -> None:
    old = [entry("accuracy/digits", "bf16", 1.0)]
    assert command.worse([entry("accuracy/digits", "bf16", 0.7)], old, 0.25) == ["accuracy/digits bf16: 1.0 -> 0.7"]
    assert command.worse([entry("accuracy/digits", "bf16", 1.4)], old, 0.25) == []


def test_the_check_fails_on_a_doctored_file(cli: Cli, tmp_path: Path) -> None:
    words = ("quick=true", "only=memory/pact,step/pact", "rounds=1", "precision=fp32", "threads=1")
    assert cli("bench", *words, "out=o").status == 0
    path = tmp_path / "o" / "bench.json"
    entries = {e["name"]: e for e in command.read(path)}
    doctored = {"memory/pact": 1.0, "step/pact": 1e-3}  # honest bytes; a time that no step takes
    path.write_text(json.dumps([{**e, "ratio": e["ratio"] * doctored[n]} for n, e in entries.items()]))
    said = cli("bench", "check", f"against={path}", *words)
    assert said.status == 1
    assert "slower than in" in said.out
    assert "by more than 25%" in said.out
    (line,) = [line for line in said.out.splitlines() if " -> " in line]
    assert line.split()[:2] == ["step/pact", f"{entries['step/pact']['mode']}:"]
    assert "Traceback" not in said.out + said.err
    assert cli("bench", "check", f"against={path}", *words, "margin=1e9").status == 0


def test_a_bench_file_is_what_was_written(tmp_path: Path) -> None:
    command.write(tmp_path, [entry(), entry("data/augment")])
    path = tmp_path / "bench.json"
    whole = path.read_text()
    assert [e["name"] for e in command.read(path)] == ["data/augment", "step/pact"]
    for content in (whole.replace("1.5", "1.6"), whole[:-9], "[]]", "[5]", json.dumps([entry(value=0.0)])):
        path.write_text(content)
        with pytest.raises(UserError, match=r"bench\.json is corrupt.*delete its line 'checksum'"):
            command.read(path)
    path.write_text(json.dumps([entry()]))  # as it once was
    assert len(command.read(path)) == 1


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def act() -> None:
        x = torch.zeros(1000, dtype=torch.uint8)
        y = torch.zeros(500, dtype=torch.uint8)
        del x
        torch.zeros(900, dtype=torch.uint8)
        del y

    assert 1500 <= memory.peak(act, torch.device("cpu")) < 1600


def test_the_check_measures_twice_before_it_fails(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.json").write_text(json.dumps([entry(), entry("step/lsq")]))
    measured: list[tuple[str, ...]] = []

    def measure(setting: Setting) -> list[dict[str, Any]]:
        measured.append(setting.only)
        return [entry(value=9.0), entry("step/lsq", value=9.0 if len(measured) == 1 else 1.0)][: 3 - len(measured)]

    monkeypatch.setattr(command, "measure", measure)
    said = cli("bench", "check", "against=old.json")
    assert said.status == 1
    assert "step/pact fp32/torch: 1.5 -> 9.0" in said.out
    assert measured == [command.SHORT, ("step/lsq", "step/pact")] or set(measured[1]) == {"step/lsq", "step/pact"}
    monkeypatch.setattr(command, "measure", lambda setting: [entry(value=1.4)])
    said = cli("bench", "check", "against=old.json")
    assert said.status == 0
    assert "a processor" in said.out


def test_the_page_shows_every_entry(cli: Cli, tmp_path: Path) -> None:
    peer = entry("peer/brevitas", values={"w_bits": 4, "a_bits": 4, "version": "0.13"})
    other = entry("step/lsq", model="mobilenet_v2", value=1.111)
    held = entry("memory/lsq", values={"bytes": 2**20 * 234, "base_bytes": 2**20 * 188})
    kept = {"mean": 98.1, "std": 0.2, "base_mean": 98.3, "base_std": 0.1}
    auto = entry("depthwise/float", "bf16", 0.8, values={"auto": "bf16"})
    accuracy = entry("accuracy/kernels", "lsq 2/2", 0.998, values=kept)
    more = [held, auto, accuracy, entry("data/augment", "resident", 0.01)]
    (tmp_path / "b.json").write_text(json.dumps([entry(), other, peer, *more]))
    assert cli("bench", "page", "against=b.json").status == 0
    text = (tmp_path / "b.md").read_text()
    assert "| pact 4/4 | resnet20 | 1.50 | 100 |" in text
    assert "| lsq 4/4 | mobilenet_v2 | 1.11 | 100 |" in text
    assert "brevitas 0.13" in text
    assert "| data/augment | resident | 0.01 |" in text
    assert "a processor, 2 cores, 2 threads" in text
    assert "| 234 MiB |" in text
    assert "| 98.10 ± 0.20 % | 98.30 ± 0.10 % |" in text
    assert "| bf16 |" in text


def test_the_committed_page_is_that_of_the_committed_numbers() -> None:
    entries = command.read(COMMITTED)
    assert COMMITTED.with_suffix(".md").read_text() == page.page(entries)
    names = {e["name"] for e in entries}
    for wanted in ("float/train", "float/eval", "step/pact", "step/lsq", "data/augment", "start/help", "sweep/12"):
        assert wanted in names
    assert names <= {*(f"step/{n}" for n in catalog.names("method")), *(n for n in names if not n.startswith("step/"))}
    for e in entries:
        assert set(e["machine"]) <= {"cpu", "cores", "threads", "torch", "python", "gpu"}


def test_a_run_takes_its_first_step_soon(tmp_path: Path) -> None:
    """Under four seconds on a quiet machine; held against importing torch, which any run has to."""

    def seconds(*words: str) -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env={**command_environment()})
        assert done.returncode == 0
        return time.perf_counter() - start

    def command_environment() -> dict[str, str]:
        from qbench.bench.whole import _environment

        return {**_environment(), "OMP_NUM_THREADS": "1"}

    kernels.available()  # compiled before: that is done once on a machine
    torch_alone = min(seconds("-c", "import torch") for _ in range(2))
    run = seconds("-c", FIRST_STEP, "method=pact", "bits=4", "init=scratch", "model=tiny", "out=o")
    assert run < 4 + 4 * torch_alone
    heavy = "{'sklearn', 'torchvision', 'matplotlib', 'tensorboard', 'scipy'} & set(sys.modules)"
    code = FIRST_STEP.replace("os._exit(0)", f"os._exit(len({heavy}))")
    words = ("method=pact", "bits=4", "init=scratch", "model=tiny", "tensorboard=false", "out=p")
    assert seconds("-c", code, *words) > 0  # exit status: how many slow imports came before the first step


def test_what_a_gpu_is_measured_by_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU in its place, where nothing becomes a graph; the times mean nothing."""
    said: list[str] = []
    setting = Setting(models=("tiny",), batch=8, rounds=1, precisions=("fp32", "bf16"), quick=True, say=said.append)
    setting.kernels = ("torch",)
    monkeypatch.setattr(gpu, "METHODS", ("float", "flexor"))
    monkeypatch.setattr(gpu, "SIDE", (2,))
    found = [entry for job in gpu.jobs(setting).values() for entry in job()]
    names = [(e.name, e.mode) for e in found]
    assert names == [
        *((f"gpu/step/{m}", f"{p}/eager") for m in ("float", "flexor") for p in ("fp32", "bf16")),
        *(("gpu/data", "resident"), ("gpu/side", "bf16/2 runs")),
    ]
    assert all(e.seconds and e.base_seconds and e.ratio > 0 and e.images_per_s for e in found)
    assert said == [f"  gpu/step/{m}: no graph, the run is not on a GPU" for m in ("float",) * 2 + ("flexor",) * 2]
    assert "## On a GPU" in page.page([{**e.plain(), "machine": entry()["machine"]} for e in found])


def test_steps_are_timed_by_the_clock_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return 30.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu.seconds(torch.device("cuda"), lambda: asked.append("step"), 3) == pytest.approx(0.01)
    assert asked == ["record", "step", "step", "step", "record", "synchronize"]


def test_a_gpu_that_is_not_there_is_named(cli: Cli) -> None:
    said = cli("bench", "device=cuda", "quick=true")
    assert (said.status, "torch sees no GPU" in said.err) == (2, True) or torch.cuda.is_available()
    assert "Traceback" not in said.err


def test_a_step_beside_busy_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies reach the processes that take the steps, the programs run while they do, and all end."""
    started: list[str] = []
    asked: list[dict[str, str]] = []
    real, elsewhere = subprocess.Popen, busy.Elsewhere

    def start(words: list[str], **options: Any) -> Any:
        started.append(words[-1])
        return real(words, **options)

    class Noted(elsewhere):  # type: ignore[valid-type, misc]
        def __enter__(self) -> Any:
            asked.append({name: os.environ[name] for name in busy.NAMES if name in os.environ})
            return super().__enter__()

    monkeypatch.setattr(busy.subprocess, "Popen", start)
    monkeypatch.setattr(busy, "Elsewhere", Noted)
    monkeypatch.setattr(busy, "POLICIES", {name: busy.POLICIES[name] for name in ("default", "passive")})
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    found = list(busy.steps(Setting(models=("tiny",), batch=4, rounds=1, threads=1)))
    assert [e.mode for e in found] == [f"{n} beside/{p}" for n in (0, 1, 2) for p in ("default", "passive")]
    assert all(e.ratio == 1 for e in found if e.mode.endswith("default"))
    assert asked == [{}, {"OMP_WAIT_POLICY": "PASSIVE"}]
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert started == [busy.PROGRAM] * 3
    assert "how OpenMP's threads wait" in page.page([{**e.plain(), "machine": entry()["machine"]} for e in found])
