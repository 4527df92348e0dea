"""The recorder: what it writes can be read again, whole, after any kill."""

import json
import math
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from qbench.errors import UserError
from qbench.records import METRICS, opened, read_metrics
from qbench.training.recorder import Recorder, layer_histogram


def write(folder: Path, steps: range, **options: Any) -> None:
    with closing(Recorder(folder, **options)) as recorder:
        for step in steps:
            recorder.scalars(step, step / 4, "train", loss=1 / (step + 1), lr=0.1)
            recorder.trace(step, step / 4, {"conv1.input.alpha": 3.0 + step})


def events(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def test_round_trip(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        recorder.scalars(3, 0.25, phase="test", loss=torch.tensor(1.23456789), accuracy=None, lr=math.nan)
        recorder.trace(3, 0.25, {"a.step": math.inf})
        assert read_metrics(tmp_path) == [  # before close: each line is flushed
            {"step": 3, "epoch": 0.25, "phase": "test", "loss": 1.23457, "accuracy": None, "lr": None},
            {"step": 3, "epoch": 0.25, "traces": {"a.step": None}},
        ]
    assert not list(tmp_path.glob("events*"))


def test_no_file_reads_as_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    write(tmp_path, range(6), tensorboard=False)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step":6,"epo')
    write(tmp_path, range(3, 5), resume_step=2, tensorboard=False)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_without_resume_the_run_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, range(6), tensorboard=False)
    write(tmp_path, range(1), tensorboard=False)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 0]


@pytest.mark.parametrize("bad", ['{"step":1,"ep', "[1]", "{}", ""])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / METRICS).write_text('{"step":0}\n' + bad + '\n{"step":2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_a_whole_last_line_without_newline_counts(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step":0}\n{"step":1}')
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(6))
    write(tmp_path, range(3, 8), resume_step=2)
    found = events(tmp_path)
    assert [e.step for e in found.Scalars("loss/train")] == list(range(8))
    assert [e.value for e in found.Scalars("trace/conv1.input.alpha")] == [3.0 + step for step in range(8)]


def test_tensorboard_histograms(tmp_path: Path) -> None:
    codes = torch.tensor([-1, 0, 0, 1])
    layer = layer_histogram(torch.tensor([-0.9, 0.1, -0.1, 1.1]), codes * 1.0, codes, 3, bins=4)
    empty = layer_histogram(torch.zeros(0), torch.zeros(0), None, None)
    with closing(Recorder(tmp_path)) as recorder:
        recorder.histograms(5, 1.0, {"conv1": layer, "none": empty})
    found = events(tmp_path)
    assert sorted(found.Tags()["histograms"]) == ["codes/conv1", "latent/conv1", "quantized/conv1"]
    value = found.Histograms("codes/conv1")[0].histogram_value
    assert (value.num, value.sum, value.sum_squares) == (4, 0, 2)
    assert [c for c in value.bucket if c] == [1, 2, 1]
    assert read_metrics(tmp_path)[0]["histograms"]["conv1"]["codes"]["values"] == [-1, 0, 1]


def test_layer_histogram_by_hand() -> None:
    codes = torch.tensor([[0, 1], [1, 3]])
    found = layer_histogram(torch.tensor([[0.0, 0.6], [0.4, 2.0]]), codes * 0.5, codes, 4, bins=2)
    assert found["latent"] == {"counts": [3, 1], "lo": 0.0, "hi": 2.0}
    assert found["quantized"] == {"values": [0.0, 0.5, 1.5], "counts": [1, 2, 1]}
    assert found["codes"] == {"values": [0, 1, 3], "counts": [1, 2, 1], "distinct": 3, "entropy": 1.5}
    assert (found["levels"], found["count"], found["nonfinite"]) == (4, 4, 0)


def test_many_values_are_binned() -> None:
    codes = torch.arange(1024)
    found = layer_histogram(codes.float(), codes.float(), codes, 1024, bins=8)
    assert found["quantized"]["counts"] == [128] * 8
    assert found["codes"]["entropy"] == pytest.approx(10)
    assert found["codes"]["distinct"] == 1024


@pytest.mark.parametrize(
    ("latent", "total"),
    [
        (torch.zeros(0), 0),
        (torch.full((5,), 0.3), 5),
        (torch.zeros(3), 3),
        (torch.tensor(2.0), 1),
        (torch.tensor([math.nan, math.inf, 1.0]), 1),
        (torch.full((4,), math.nan), 0),
        (torch.tensor([-3e38, 3e38]), 2),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True), 2),
    ],
)
def test_odd_tensors(tmp_path: Path, latent: torch.Tensor, total: int) -> None:
    found = layer_histogram(latent, latent, torch.zeros(latent.shape, dtype=torch.int8), 2)
    assert sum(found["latent"]["counts"]) == sum(found["quantized"]["counts"]) == total
    assert found["nonfinite"] == latent.numel() - total
    assert math.copysign(1, found["codes"]["entropy"]) == 1
    assert found["codes"]["entropy"] == 0
    with closing(Recorder(tmp_path)) as recorder:
        recorder.histograms(0, 0.0, {"layer": found})


def test_result_is_sorted_whole_and_last(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as recorder:
        path = recorder.result({"seed": 0, "accuracy_last": 91.23456789, "accuracy_before_training": math.nan})
    assert path == tmp_path / "result.json"
    whole = json.loads(path.read_text())
    found = opened(whole)
    assert found.pop("files").keys() == {METRICS}
    assert list(found) == sorted(found)
    assert found == {"accuracy_before_training": None, "accuracy_last": 91.23456789, "seed": 0}
    assert [p.name for p in sorted(tmp_path.iterdir())] == [METRICS, "result.json"]


def test_close_twice(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.scalars(0, 0.0, loss=1.0)
    recorder.close()
    recorder.close()


def test_records_of_an_unfinished_run_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, tensorboard=False)) as first:
        for step in range(3):
            first.scalars(step, step, accuracy=90.0 + step)
        noted = first.sha256
        first.scalars(3, 3, accuracy=93.0)  # after the checkpoint
    again = {"resume_step": 2, "resume_records": 3, "resume_sha256": noted, "tensorboard": False}
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for damaged in (whole.replace("91", "81"), whole[: whole.index("\n") + 1], ""):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"metrics\.jsonl is corrupt: it is not what the run had written"):
            Recorder(tmp_path, **again)
    path.write_text(whole)
    with closing(Recorder(tmp_path, **again)) as second:
        assert (second.count, second.sha256) == (3, noted)
