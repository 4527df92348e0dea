"""What is read of a run is what was written, or is refused by file and field."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qbench.errors import UserError
from qbench.papers import results
from qbench.papers.results import Kept
from qbench.records import (
    opened,
    read_before,
    read_config,
    read_manifest,
    read_metrics,
    read_notes,
    read_result,
    read_results,
    sealed,
    trained,
)
from qbench.training.recorder import Recorder

RESULT: dict[str, Any] = {
    **{"method": "pact", "model": "tiny", "dataset": "digits", "budget": "smoke", "protocol": "paper", "init": "float"},
    **{"w_bits": 4, "a_bits": 4, "seed": 0, "bytes": 1, "seconds": 1.0, "bits_per_weight": 4.0, "key": "0123456789"},
    **{"accuracy_last": 91.7, "accuracy_best": 92.0, "epoch_best": 1.0, "float_accuracy": 93.0},
    **{"accuracy_before_training": 10.0, "identity": {"data": {"name": "digits", "checksum": "0", "augment": "none"}}},
}
CONFIG = """
method: {name: pact}
model: {name: tiny}
dataset: {name: digits}
train: {}
options: {}
distill: {}
w_bits: 4
a_bits: 4
seed: 0
init: float
device: cpu
threads: null
channels_last: true
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "pact-0123456789"
    with closing(Recorder(folder, tensorboard=False)) as recorder:
        (folder / "config.yaml").write_text(CONFIG)
        for step in range(3):
            recorder.scalars(step, step, "test", accuracy=90.0 + step, loss=0.1)
        recorder.result(RESULT)
    return folder


def test_a_run_is_read_as_it_was_written(run: Path) -> None:
    assert read_result(run / "result.json") == RESULT
    assert read_config(run)["w_bits"] == 4
    assert [r["accuracy"] for r in read_metrics(run)] == [90.0, 91.0, 92.0]


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "metrics.jsonl"])
def test_no_changed_digit_and_no_cut_goes_unseen(run: Path, name: str) -> None:
    path = run / name
    whole = path.read_text()
    digit = whole.index("9") if "9" in whole else whole.index("4")
    for content in (whole[:digit] + "3" + whole[digit + 1 :], whole[: whole.rindex("\n", 0, -1) + 1], "", "\ud800"):
        path.write_bytes(content.encode(errors="surrogatepass"))
        with pytest.raises(UserError, match=f"{name} is corrupt"):
            read_metrics(run) if name == "metrics.jsonl" else read_config(run)
    path.write_text(whole)
    assert read_config(run)
    assert read_metrics(run)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("method", 5, "method must be a text, got 5"),
        ("w_bits", "four", 'w_bits must be a number, got "four"'),
        ("w_bits", True, "w_bits must be a number, got true"),
        ("seed", 1.5, "seed must be a whole number, got 1.5"),
        ("accuracy_last", [], "accuracy_last must be a number or null"),
        ("identity", {}, "identity has no 'data'"),
        ("identity", {"data": 3}, "identity.data must be a mapping, got 3"),
        ("bytes", None, "bytes must be a whole number, got null"),
        ("bytes", 10**400, "is no number"),
        ("accuracy_last", float("nan"), "NaN is no number"),
    ],
)
def test_an_older_result_without_a_checksum_is_checked_by_its_shape(
    run: Path, field: str, value: Any, said: str
) -> None:
    path = run / "result.json"
    path.write_text(json.dumps(RESULT))
    assert read_result(path) == RESULT
    path.write_text(json.dumps({**RESULT, field: value}))
    with pytest.raises(UserError) as refused:
        read_result(path)
    assert said in str(refused.value)
    assert "result.json is corrupt" in str(refused.value)


def test_a_result_of_another_run_does_not_count(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "pact-fedcba9876"
    run.rename(other)
    with pytest.raises(UserError, match="of another run: its key is 0123456789, not fedcba9876"):
        read_result(other / "result.json")
    other.rename(tmp_path / "a name of the user's")
    assert read_result(tmp_path / "a name of the user's" / "result.json") == RESULT


def test_one_bad_file_stops_nothing_else(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a", '{"method": "mine"}'), ("b", "[" * 200_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(content)
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / "result.json")  # nothing ever comes out of it
    assert [r["folder"] for r in read_results(tmp_path)] == [str(run)]
    err = capsys.readouterr().err
    assert err.count("left out: ") == 3
    assert all(str(tmp_path / name / "result.json") in err for name in "abc")


@pytest.mark.parametrize(
    "content",
    ["[" * 200_000, "{a: " * 200_000, "- " * 200_000, "a: &a [1]\nb: *a\n", "a: [", "dataset", "a: \x00", "{}"],
)
def test_yaml_that_could_cost_all_memory_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is corrupt"):
        read_config(tmp_path)


def test_a_record_is_checked_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step":0}\n{"step":1,"accuracy":"high"}\n')
    with pytest.raises(UserError, match=r"line 2: not a record \(accuracy must be .*number.*, got \"high\"\)"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(("content", "right"), [("A line.\n", True), ("A line.\nAnd a ha", False), ("", False)])
def test_notes_that_were_cut_off(tmp_path: Path, content: str, right: bool) -> None:
    assert read_notes(tmp_path) == ""
    (tmp_path / "notes.md").write_text(content)
    if right:
        assert read_notes(tmp_path) == content
    else:
        with pytest.raises(UserError, match=r"notes\.md looks cut off"):
            read_notes(tmp_path)


def test_the_accuracy_before_training(tmp_path: Path) -> None:
    for content, value in (("null", None), ("31.5", 31.5)):
        (tmp_path / "before.json").write_text(f'{{"accuracy_before_training": {content}}}')
        assert read_before(tmp_path) == value
    changed = json.dumps({**sealed({"accuracy_before_training": 31.5}), "accuracy_before_training": 13.5})
    for content in ("{}", '{"accuracy_before_training": "x"}', "{", changed):
        (tmp_path / "before.json").write_text(content)
        with pytest.raises(UserError, match=r"before\.json is corrupt"):
            read_before(tmp_path)


def test_what_a_run_has_written_must_be_there(run: Path) -> None:
    assert read_manifest(run) == {}, "older runs have none"
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing, though the run has written it"):
        read_metrics(run)
    (run / "manifest.json").write_text('{"weights": {}, "layers": "many"}')
    with pytest.raises(UserError, match=r"manifest\.json is corrupt \(layers must be a whole number"):
        read_manifest(run)


def test_a_parent_that_was_not_trained_is_none() -> None:
    assert trained(RESULT, Path("p")) == RESULT
    with pytest.raises(UserError, match=r"not trained \(epochs=0\).*parent\.epochs"):
        trained({**RESULT, "accuracy_last": None}, Path("p"))


def test_a_checksum_is_of_the_rest() -> None:
    whole = sealed({"a": 1})
    assert opened(whole) == {"a": 1}
    assert opened({"a": 1}) == {"a": 1}, "older files have none"
    with pytest.raises(ValueError, match="checksum"):
        opened({**whole, "a": 2})
    assert sealed(whole) == whole


def entry(row: str) -> dict[str, Any]:
    names = ("key", "seed", "budget", "w_bits", "a_bits", "bits_per_weight", "bytes", "seconds", "accuracy_last")
    return {"row": row, "earlier": False, "data": RESULT["identity"]["data"], "split": {}} | {
        k: RESULT[k] for k in names
    }


def test_results_of_a_study_are_sealed_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    text = Kept([entry("a"), entry("b")], {"c, seed 0, budget smoke": "failed"}).text()
    path.write_text(text)
    assert [e["row"] for e in results.read(tmp_path).entries] == ["a", "b"]
    content = json.loads(text)
    for runs, failed in (([entry("a")], content["failed"]), (content["runs"], {}), ([entry("x")], content["failed"])):
        path.write_text(json.dumps({**content, "runs": runs, "failed": failed}))
        with pytest.raises(UserError, match=r"results\.json is corrupt.*delete its line 'checksum'"):
            results.read(tmp_path)
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert len(results.read(tmp_path).entries) == 2
    path.write_text(json.dumps({**content, "runs": [{**entry("a"), "bytes": "many"}]}))
    with pytest.raises(UserError, match=r"runs\.0\.bytes must be a .*number"):
        results.read(tmp_path)
