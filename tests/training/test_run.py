"""What a run leaves behind, what it starts from, and the commands that read it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qbench.cli.command import split
from qbench.config import catalog
from qbench.records import sealed
from qbench.training import checkpoint
from qbench.training.finished import evaluate, rebuild

KEYS = {
    "method", "model", "dataset", "budget", "w_bits", "a_bits", "seed", "protocol", "init", "float_accuracy",
    "accuracy_before_training", "accuracy_last", "accuracy_best", "accuracy_at_best_val", "bits_per_weight", "bytes",
    "seconds", "weights_sha256", "version", "torch", "threads", "device", "precision", "code", "identity", "key",
}  # fmt: skip
FILES = {
    "result.json",
    "metrics.jsonl",
    "manifest.json",
    "config.yaml",
    "model.pt",
    "curves.png",
    "histograms.png",
    "activations.png",
    "telemetry.png",
    ".lock",
}
Cli = Callable[..., Any]


def folder_of(out: Path, start: str) -> Path:
    (found,) = out.glob(f"{start}-*")
    return found


def result_of(out: Path, start: str) -> dict[str, Any]:
    return json.loads((folder_of(out, start) / "result.json").read_text())


def test_a_run_leaves_everything_and_tells_it(tiny: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tiny("method=pact", "bits=4", "out=o")
    assert said.status == 0, said.err
    for words in ("float parent", "before training", "after training", "bits per weight", "bytes", "curves.png"):
        assert words in said.out
    folder = folder_of(tmp_path / "o", "pact")
    assert {p.name for p in folder.iterdir()} == FILES
    result = result_of(tmp_path / "o", "pact")
    assert set(result) >= KEYS
    assert (result["method"], result["w_bits"], result["a_bits"]) == ("pact", 4, 4)
    parent = result_of(tmp_path / "o", "float")
    assert result["float_accuracy"] == parent["accuracy_last"] == parent["float_accuracy"]
    assert result["accuracy_before_training"] is not None
    assert result["threads"] == 1
    assert 4 <= result["bits_per_weight"] < 4.5
    manifest = json.loads((folder / "manifest.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr("qbench.training.finished.load", None)  # the net is there without its data
        model = rebuild(folder)
    assert set(manifest["weights"]) == {n for n, _ in model.named_parameters()}
    assert {n for n, e in manifest["weights"].items() if "quantizer" in e} == {"conv2.weight"}
    assert all(e["why"] for e in manifest["weights"].values() if "quantizer" not in e and "part_of" not in e)
    assert set(manifest["activations"]) == {"relu1", "relu2"}


def test_the_same_command_again_says_what_came_out(tiny: Cli, tmp_path: Path) -> None:
    first = tiny("method=float", "out=o")
    stamp = (folder_of(tmp_path / "o", "float") / "model.pt").stat().st_mtime_ns
    again = tiny("method=float", "out=o")
    assert (first.status, again.status) == (0, 0)
    assert "done before" in again.out
    assert "other code" not in again.out
    assert (folder_of(tmp_path / "o", "float") / "model.pt").stat().st_mtime_ns == stamp


def test_a_result_of_other_code_is_reported_as_such(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    path = folder_of(tmp_path / "o", "float") / "result.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "code": "0123456789"})))
    assert "made by other code" in tiny("method=float", "out=o").out


def test_a_result_of_other_threads_or_torch_is_reported_as_such(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    path = folder_of(tmp_path / "o", "float") / "result.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "torch": "1.0"})))
    assert "note: that result was made with torch 1.0 (here 2." in tiny("method=float", "out=o").out
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "torch": str(torch.__version__)})))
    assert "note" not in tiny("method=float", "out=o").out
    assert "made with threads 1 (here 2)" in tiny("method=float", "out=o", "threads=2").out


def test_a_kill_behind_the_result_leaves_nothing_for_good(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    folder = folder_of(tmp_path / "o", "float")
    before = {p.name for p in folder.iterdir()}
    for name in ("checkpoint.pt", "before.json"):
        (folder / name).write_text("left")
    said = tiny("method=float", "out=o")
    assert said.status == 0, said.err
    assert {p.name for p in folder.iterdir()} == before


def test_a_finished_run_is_computed_anew_and_nothing_of_it_is_lost(tiny: Cli, tmp_path: Path) -> None:
    words = ("method=pact", "bits=4", "out=o")
    tiny(*words)
    folder = folder_of(tmp_path / "o", "pact")
    path, mark = folder / "result.json", folder / "mine"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "code": "0123456789"})))
    first = json.loads(path.read_text())
    mark.touch()
    assert "force=true computes it anew" in tiny(*words).out
    stopped = tiny(*words, "force=true", "time_limit=1s", "train.warmup=0")  # a limit that is over at once
    assert stopped.status == 124, stopped.err
    assert mark.exists()
    assert (tmp_path / "o" / f"{folder.name}.anew" / "checkpoint.pt").exists()
    assert tiny(*words).out.startswith("done before")
    said = tiny(*words, "force=true")
    assert said.status == 0, said.err
    old = tmp_path / "o" / f"{folder.name}.old-1"
    assert f"kept in {Path('o') / old.name}" in said.out
    assert (old / "mine").exists()
    assert json.loads((old / "result.json").read_text()) == first
    now = json.loads(path.read_text())
    assert (now["weights_sha256"], now["key"]) == (first["weights_sha256"], first["key"])
    assert now["code"] != first["code"]
    assert {p.name.rpartition(".")[2] for p in (tmp_path / "o").glob("pact-*.*")} == {"old-1"}
    assert len(list((tmp_path / "o").glob("float-*"))) == 1  # the parent is as it was
    assert tiny("-m", *words, "seed=0").out.count("1 of them before") == 1


@pytest.mark.parametrize("moved", [True, False])
def test_what_is_finished_and_not_in_its_place_yet_is_taken_up(tiny: Cli, tmp_path: Path, moved: bool) -> None:
    tiny("method=float", "out=o")
    folder = folder_of(tmp_path / "o", "float")
    anew = folder.with_name(f"{folder.name}.anew")
    shutil.copytree(folder, anew)
    (anew / "mine").touch()
    if moved:  # killed between the two renames
        folder.rename(folder.with_name(f"{folder.name}.old-1"))
    said = tiny("method=float", "out=o")
    assert said.status == 0, said.err
    assert "done before" in said.out
    assert (folder / "mine").exists()
    assert not anew.exists()
    assert (tmp_path / "o" / f"{folder.name}.old-1" / "result.json").exists()


def test_pictures_in_another_format(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=pact", "bits=4", "out=o", "figures=svg")
    folder = folder_of(tmp_path / "o", "pact")
    assert {p.name for p in folder.glob("*.svg")} == {
        f"{n}.svg" for n in ("curves", "histograms", "activations", "telemetry")
    }
    assert not list(folder.glob("*.png"))
    said = tiny("method=pact", "bits=4", "out=o", "figures=pdf")  # done before: from its files
    assert "curves.pdf" in said.out
    assert (folder / "activations.pdf").read_bytes().startswith(b"%PDF")


def test_one_parent_for_all(tiny: Cli, tmp_path: Path) -> None:
    assert "training it once" in tiny("method=pact", "bits=4", "out=o").out
    said = tiny("method=lsq", "bits=2", "out=o")
    assert "training it once" not in said.out
    assert "float parent: " in said.out
    assert len(list((tmp_path / "o").glob("float-*"))) == 1


def test_a_run_that_finds_its_parent_goes_on_like_one_that_trains_it(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=pact", "bits=4", "out=a")
    tiny("method=float", "out=b")
    tiny("method=pact", "bits=4", "out=b")
    a, b = result_of(tmp_path / "a", "pact"), result_of(tmp_path / "b", "pact")
    assert a["weights_sha256"] == b["weights_sha256"]
    assert a["accuracy_last"] == b["accuracy_last"]


def test_scratch_has_no_accuracy_before_training(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=pact", "bits=4", "init=scratch", "out=o")
    result = result_of(tmp_path / "o", "pact")
    assert result["accuracy_before_training"] is None
    assert result["float_accuracy"] is None
    assert not list((tmp_path / "o").glob("float-*"))


def test_post_training_quantization_takes_no_step(tiny: Cli, tmp_path: Path) -> None:
    assert tiny("method=ptq", "bits=8", "out=o").status == 0
    result = result_of(tmp_path / "o", "ptq")
    assert result["accuracy_last"] == result["accuracy_before_training"]
    assert abs(result["accuracy_last"] - result["float_accuracy"]) < 5
    assert not (folder_of(tmp_path / "o", "ptq") / "curves.png").exists()
    said = tiny("method=pact", "bits=4", "out=o", "train.epochs=0")  # likewise: calibrated alone, and no curve
    assert said.status == 0, said.err
    assert not (folder_of(tmp_path / "o", "pact") / "curves.png").exists()


def test_init_from_a_checkpoint_by_key_and_by_order_and_shape(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    state = torch.load(folder_of(tmp_path / "o", "float") / "model.pt", weights_only=True)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    renamed = {f"net.{i}": v for i, (k, v) in enumerate(state.items()) if not k.endswith("num_batches_tracked")}
    torch.save(renamed, tmp_path / "renamed.pt")
    parent = result_of(tmp_path / "o", "float")
    sums, nets = set(), []
    for name in ("wrapped.pt", "renamed.pt"):
        said = tiny("method=pact", "bits=4", f"init={name}", f"out={name}.out")
        assert said.status == 0, said.err
        assert ("net.0 -> conv1.weight" in said.out) == (name == "renamed.pt")
        result = result_of(tmp_path / f"{name}.out", "pact")
        assert result["float_accuracy"] == parent["accuracy_last"]
        sums.add(result["weights_sha256"])
        nets.append(torch.load(folder_of(tmp_path / f"{name}.out", "pact") / "model.pt", weights_only=True))
    for key, value in nets[0].items():
        if isinstance(value, torch.Tensor):  # only batch-norm's counter of batches was not in the renamed file
            assert torch.equal(value, nets[1][key]) != key.endswith("num_batches_tracked"), key
    again = tiny("method=pact", "bits=4", f"init={folder_of(tmp_path / 'o', 'float')}", "out=folder")
    assert again.status == 0
    assert result_of(tmp_path / "folder", "pact")["weights_sha256"] in sums


def test_a_checkpoint_trained_on_other_data_is_refused(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    said = tiny("method=pact", f"init={folder_of(tmp_path / 'o', 'float')}", "dataset.val=0.1", "out=o")
    assert said.status == 2
    assert "other data" in said.err


@pytest.mark.parametrize("method", ["pact", "ptq", "flexor"])
def test_eval_gives_the_recorded_accuracy(tiny: Cli, cli: Cli, tmp_path: Path, method: str) -> None:
    tiny(f"method={method}", "out=o", f"bits={2 if method == 'flexor' else 4}")
    folder, result = folder_of(tmp_path / "o", method), result_of(tmp_path / "o", method)
    assert evaluate(folder)[2] == result["accuracy_last"]
    for path in (folder, folder / "model.pt"):
        said = cli("eval", path)
        assert said.status == 0, said.err
        assert f"accuracy {result['accuracy_last']:.2f} %" in said.out


def test_eval_reads_options_as_a_run_does(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    folder = folder_of(tmp_path / "o", "float")
    said = cli("eval", folder, "dataset.test_size=32")
    assert said.status == 0, said.err
    assert f"accuracy {evaluate(folder, {'test_size': 32})[2]:.2f} %" in said.out


def test_eval_of_a_plain_checkpoint(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    state = checkpoint.load(folder_of(tmp_path / "o", "float") / "model.pt")
    torch.save(state, tmp_path / "a, (plain)=net.pt")
    said = cli("eval", "a, (plain)=net.pt", "model=tiny", "dataset=synthetic", "budget=smoke", "device=cpu")
    assert said.status == 0, said.err
    assert f"accuracy {result_of(tmp_path / 'o', 'float')['accuracy_last']:.2f} %" in said.out


def test_compare_and_table(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    tiny("method=pact", "bits=4", "out=o")
    tiny("method=pact", "bits=2", "out=o")
    a, b = sorted((tmp_path / "o").glob("pact-*"))
    said = cli("compare", a, b)
    assert said.status == 0
    assert "w_bits" in said.out
    assert "bytes" in said.out
    assert "seed" not in said.out.replace("seeds", "")
    same = cli("compare", a, a)
    assert same.out.strip() == "no difference"
    table = cli("table", "o").out
    assert len(table.splitlines()) == 2 + 3
    assert "4/4" in table
    assert "2/2" in table


def test_plan_prints_and_leaves_nothing(tiny: Cli, tmp_path: Path) -> None:
    said = tiny("method=pact", "bits=4", "out=o", "plan=true")
    assert said.status == 0, said.err
    for words in (
        "method:",
        "conv2.weight",
        "first and last layer",
        "bits per quantized weight",
        "steps + 6",
        "of training",
    ):
        assert words in said.out
    assert not (tmp_path / "o").exists()


def test_a_plan_counts_the_parent_that_is_still_to_train(tiny: Cli) -> None:
    words = ("method=lsq", "bits=4", "init=scratch", "distill.weight=1", "out=o", "plan=true")
    assert "for the float parent" in tiny(*words).out  # the teacher
    assert "for the float parent" not in tiny(*words, "distill.weight=0").out
    assert tiny("method=float", "out=o").status == 0
    assert "for the float parent" not in tiny(*words).out
    assert "for the float parent" in tiny(*words, "parent.batch_size=16").out  # another parent


@pytest.mark.parametrize("joined", [True, False])
def test_a_folder_of_own_configuration(tiny: Cli, tmp_path: Path, joined: bool) -> None:
    own = tmp_path / "conf" / "method" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((catalog.conf_folder() / "method" / "pact.yaml").read_text())
    folder = [f"--config-dir={tmp_path / 'conf'}"] if joined else ["--config-dir", tmp_path / "conf"]
    said = tiny(*folder, "method=mine", "bits=4", "out=o", "plan=true")
    assert said.status == 0, said.err
    assert split(["--cfg", "job", "-m", "bits=4"]) == (["--cfg", "job", "-m"], ["bits=4"])


def test_a_validation_split_chooses_the_epoch(tiny: Cli, tmp_path: Path) -> None:
    said = tiny("method=float", "out=o", "dataset.val=0.25", "train.steps=12", "train.evaluate_every=0.25")
    assert said.status == 0, said.err
    result = result_of(tmp_path / "o", "float")
    records = [json.loads(x) for x in (folder_of(tmp_path / "o", "float") / "metrics.jsonl").read_text().splitlines()]
    of = {p: {r["step"]: r["accuracy"] for r in records if r.get("phase") == p} for p in ("val", "test")}
    assert len(of["val"]) > 3
    best = max(of["val"], key=lambda step: (of["val"][step], -step))
    assert result["accuracy_at_best_val"] == pytest.approx(of["test"][best], rel=1e-5)
    assert result["accuracy_best"] == pytest.approx(max(of["test"].values()), rel=1e-5)
    assert result["accuracy_last"] == pytest.approx(of["test"][max(of["test"])], rel=1e-5)


def test_without_a_validation_split_there_is_none(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "out=o")
    assert result_of(tmp_path / "o", "float")["accuracy_at_best_val"] is None


def test_uniform_protocol_keeps_first_and_last_in_float(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=lsq", "bits=4", "protocol=uniform", "out=o")
    manifest = json.loads((folder_of(tmp_path / "o", "lsq") / "manifest.json").read_text())
    assert "uniform" in manifest["weights"]["conv1.weight"]["why"]
    assert "uniform" in manifest["weights"]["fc.weight"]["why"]
    assert manifest["weights"]["conv2.weight"]["bits"] == 4


def test_distillation_uses_the_parent_and_makes_another_run(tiny: Cli, tmp_path: Path) -> None:
    assert tiny("method=pact", "bits=4", "out=o").status == 0
    said = tiny("method=pact", "bits=4", "distill.weight=1", "out=o")
    assert said.status == 0, said.err
    runs = [json.loads((p / "result.json").read_text()) for p in (tmp_path / "o").glob("pact-*")]
    assert len(runs) == 2
    assert runs[0]["weights_sha256"] != runs[1]["weights_sha256"]


def test_a_teacher_may_be_any_run_or_checkpoint_and_names_the_run(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "model=mlp", "out=teachers")
    teacher = folder_of(tmp_path / "teachers", "float")
    words = (
        "method=lsq",
        "bits=4",
        "init=scratch",
        "distill.weight=0.7",
        "distill.labels=0.3",
        "distill.temperature=2",
    )
    one = tiny(*words, f"distill.teacher={teacher}", "out=run")
    assert one.status == 0, one.err
    assert "float training" not in one.out  # the parent is not needed
    weights = f"distill.teacher={teacher / 'model.pt'}"
    two = tiny(*words, weights, "distill.model=mlp", "out=checkpoint")
    assert two.status == 0, two.err
    a, b = result_of(tmp_path / "run", "lsq"), result_of(tmp_path / "checkpoint", "lsq")
    assert a["weights_sha256"] == b["weights_sha256"]
    assert a["identity"]["teacher"] == b["identity"]["teacher"]
    other = tiny(*words, "out=run", "distill.joint=true")
    assert other.status == 0, other.err
    assert len({json.loads(p.read_text())["weights_sha256"] for p in (tmp_path / "run").glob("lsq*/result.json")}) == 2
    assert "fc.weight has shape [10, 512]" in tiny(*words, weights, "out=o").err  # the run's own net does not take it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("distill.teacher=nowhere", "distill.weight=1"), "distill.teacher must be a run folder or a checkpoint"),
        (("distill.joint=true",), "distill.joint is for distill.weight above 0"),
        (("distill.weight=1", "distill.model=mlp"), "distill.model=mlp is for a teacher that is a checkpoint"),
        (("distill.weight=1", "distill.model=resnett20"), "Did you mean 'resnet20'?"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(words: tuple[str, ...], said: str, tiny: Cli) -> None:
    found = tiny("method=lsq", "bits=4", *words, "plan=true")
    assert found.status == 2
    assert said in found.err


def test_a_teacher_of_other_data_is_refused(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "dataset.train_size=90", "out=teachers")
    said = tiny("method=lsq", "distill.weight=1", f"distill.teacher={folder_of(tmp_path / 'teachers', 'float')}")
    assert said.status == 2
    assert "was trained on other data" in said.err


def test_bf16_runs(tiny: Cli, tmp_path: Path) -> None:
    said = tiny("method=pact", "bits=4", "precision=bf16", "out=o")
    assert said.status == 0, said.err
    assert result_of(tmp_path / "o", "pact")["precision"] == "bf16"
