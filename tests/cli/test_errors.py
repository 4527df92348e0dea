"""Mistakes a user can make: each ends with one clear message and a non-zero status, never with a traceback."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Cli = Callable[..., Any]

# words of the command line -> what the message must say: what was got, and what is allowed or nearest
WORDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("method=pct",), ("'pct'", "Did you mean 'pact'?", "dorefa")),
    (("model=resnet21",), ("'resnet21'", "Did you mean 'resnet", "resnet20")),
    (("dataset=cifar",), ("'cifar'", "Did you mean 'cifar10", "digits")),
    (("budget=smok",), ("'smok'", "Did you mean 'smoke'?", "paper")),
    (("train.lrr=1",), ("'train.lrr'", "Did you mean 'train.lr'?")),
    (("lr=1",), ("'lr'", "Did you mean 'train.lr'?")),
    (("optoins.alpha=1",), ("'optoins.alpha'", "options.alpha")),
    (("method=flexor", "options.n_tip=3"), ("'options.n_tip'", "options.n_tap", "Options of method=flexor")),
    (("bits=0",), ("above 0", "got 0")),
    (("bits=-4",), ("above 0", "got -4")),
    (("bits=33",), ("got 33", "1..16")),
    (("bits=3.5",), ("got 3.5", "a whole number in 1..16")),
    (("bits=four",), ("got 'four'", "a number such as 4")),
    (("bits=2/4/8",), ("got '2/4/8'", "4 or 4/8")),
    (("bits=nan",), ("got nan", "above 0")),
    (("a_bits=99",), ("a_bits", "got 99", "1..16")),
    (("method=xnor", "bits=4"), ("xnor", "got 4", "w_bits of 1")),
    (("method=flexor", "bits=2/4"), ("a_bits", "got 4", "32 (float)")),
    (("method=flexor", "bits=0.8", "options.n_in=21"), ("n_in", "21", "n_out=20")),
    (("method=flexor", "bits=0.1", "options.n_tap=3"), ("n_tap", "at most n_in=2", "got 3")),
    (("method=flexor", "bits=0.83"), ("0.83", "0.8 (n_in=16)", "0.85 (n_in=17)")),
    (("train.schedule=cosin",), ("'cosin'", "Did you mean 'cosine'?", "onecycle")),
    (("train.optimizer=sdg",), ("'sdg'", "Did you mean 'sgd'?", "adam")),
    (("train.loss=hinge",), ("'hinge'", "squared_hinge")),
    (("train.lr=-0.1",), ("train.lr", "at least 0", "got -0.1")),
    (("train.lr=fast",), ("train.lr", "a number", "got 'fast'")),
    (("train.batch_size=0",), ("train.batch_size", "at least 1", "got 0")),
    (("train.accumulate=3",), ("train.accumulate", "a divisor of batch_size=32", "got 3")),
    (("train.epochs=1", "train.steps=5"), ("exactly one of epochs and steps", "1", "5")),
    (("train.label_smoothing=1.5",), ("train.label_smoothing", "0..1", "got 1.5")),
    (("train.evaluate_every=often",), ("train.evaluate_every", "above 0", "got 'often'")),
    (("train.milestones=[a]", "train.schedule=step"), ("train.milestones", "numbers", "a")),
    (("parent.schedule=cosin",), ("'cosin'", "Did you mean 'cosine'?")),
    (("precision=fp16",), ("'fp16'", "bf16", "fp32")),
    (("protocol=unifrom",), ("'unifrom'", "Did you mean 'uniform'?")),
    (("seed=-1",), ("seed", "at least 0", "got -1")),
    (("seed=one",), ("seed", "whole number", "got 'one'")),
    (("workers=0",), ("workers", "1..1024", "got 0")),
    (("workers=3",), ("workers=3", "must divide parent.batch_size=32")),
    (("threads=0",), ("threads", "1..1024", "got 0")),
    (("threads=100000",), ("threads", "1..1024", "got 100000")),
    (("device=gpu",), ("'gpu'", "auto, cpu, cuda")),
    (("init=nowhere.pt",), ("init=nowhere.pt", "scratch", "float", "checkpoint")),
    (("bits=2,4",), ("bits=2,4", "several values", "add -m")),
    (("method=pact", "bits"), ("'bits'", "name=value")),
    (("distill.weight=-1",), ("distill.weight", "at least 0", "got -1")),
    (("distill=5",), ("distill is a group of options", "distill.weight", "got distill=5")),
    (("train=lsq",), ("train is a group of options", "Did you mean method=lsq?")),
    (("checkpoint_seconds=abc",), ("checkpoint_seconds", "at least 0", "got 'abc'")),
    (("checkpoint_seconds=-1",), ("checkpoint_seconds", "at least 0", "got -1")),
    (("out=null",), ("out", "a path", "got None")),
    (("init=5",), ("init=5", "scratch", "checkpoint file or run folder that is there")),
    (("init=scrach",), ("init=scrach", "Did you mean 'scratch'?")),
    (("train.nesterov=abc",), ("train.nesterov", "true or false", "got 'abc'")),
    (("channels_last=abc",), ("channels_last", "true or false", "got 'abc'")),
    (("compile=abc",), ("compile", "true or false", "got 'abc'")),
    (("tensorboard=1",), ("tensorboard", "true or false", "got 1")),
    (("parent.lr=abc",), ("qbench: parent.lr must be a number", "got 'abc'")),
    (("parent.nesterov=abc",), ("qbench: parent.nesterov must be", "got 'abc'")),
    (("train.lr=nan",), ("train.lr", "at least 0", "got nan")),
    (("train.optimizer=LBFGS",), ("'LBFGS'", "adamw")),
    (("train.optimizer=torch.optim.LBFGS",), ("torch.optim.LBFGS", "several times in a step", "sgd")),
    (("train.optimizer=torch.optim.Sdg",), ("torch.optim.Sdg", "cannot be imported")),
    (("train.batch_size=100000",), ("train.batch_size=100000", "more than the 256 training images", "synthetic")),
    (("parent.batch_size=512",), ("parent.batch_size=512", "more than the 256 training images")),
    (("name=../../x",), ("name", "without /", "got '../../x'")),
    (("name=a/b",), ("name", "without /", "got 'a/b'")),
    (("name=" + "x" * 200,), ("name", "150 bytes")),
    (("time_limit=8x",), ("time_limit", "90s, 8m", "got '8x'")),
    (("time_limit=0",), ("time_limit", "90s, 8m", "got 0")),
    (("--bits", "4"), ("name=value", "bits=4 in place of --bits")),
    (("--learning-rate=3",), ("name=value", "lr=3")),
    (("+options.stepdecay=1",), ("'options.stepdecay'", "options.alpha")),
    (("++trian.lr=9",), ("'trian.lr'", "Did you mean 'train.lr'?")),
    (("~seed",), ("~seed", "taken away")),
    (("+method.rules=[{match: '*', keep: x}]",), ("take the place of every rule", "--config-dir")),
    (("train.milestones=" + "[" * 50000,), ("cannot read the command line",)),
    (("seed=" + "9" * 5000,), ("cannot read the command line at 'seed=999", "4300 digits")),
    (("train.lr=" + "9" * 400,), ("train.lr", "at least 0")),
    (("train.warmup=[,]",), ("cannot read the command line at 'train.warmup=[,]'",)),
    (("init=",), ("init=", "neither 'scratch' nor 'float'")),
    (("model.width=-",), ("model.width", "a number above 0", "got '-'")),
    (("model=resnet20", "model.preactivation=abc"), ("model.preactivation", "true or false", "got 'abc'")),
    (("method=inq", "options.of_bits=5"), ("options.of_bits", "a mapping", "got 5")),
    (("dataset.augment=flop",), ("dataset.augment", "crop_flip", "got 'flop'")),
    (("+hydra.lcuncher.n_jobs=2",), ("'hydra.lcuncher'", "Did you mean 'hydra.launcher'?")),
    (("method=recu", "options.tau=null"), ("cannot put the configuration together", "options.tau")),
    (("method=gptq", "options.group=inf"), ("options.group must be finite, got inf",)),
    (("model.width=1e308",), ("model.width", "at most 1000", "got 1e+308")),
    (("a_bits=true",), ("a_bits must be a number such as 4", "got 'True'")),
    (("dataset.size=null",), ("dataset.size", "a positive whole number", "got None")),
    (("-m", "dataset.noise=1,-1"), ("dataset.noise", "a number from 0", "got -1")),
    (("-m", "options.alpha=1,abc"), ("options.alpha", "a number", "got 'abc'")),
    (("-m", "options.alpha=interval(1,2)"), ("options.alpha=interval(1,2)", "a sweeper that searches")),
    (("-m", "bits=8,eight"), ("bits", "got 'eight'", "a number such as 4")),
    (("-m", "bits=interval(2,4)"), ("bits=interval(2,4)", "name the widths", "bits=2,3,4")),
    (("-m", "bits=range(4,2)"), ("bits=range(4,2)", "fits nothing")),
    (("-m", "seed=0,-1"), ("seed", "at least 0", "got -1")),
    (("-m", "hydra/launcher=jobslib", "seed=0,1"), ("'jobslib'", "Did you mean 'joblib'?", "basic")),
    (("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"), ("hydra.launcher.n_jobs", "-1: all cores", "got 0")),
    (("train.momentum=0.5", "train.optimizer=adam"), ("train.momentum=0.5 is not read", "optimizer=sgd or rmsprop")),
    (("train.nesterov=true", "train.optimizer=adam"), ("train.nesterov=True is not read", "optimizer=sgd")),
    (("train.betas=[0.5,0.9]",), ("train.betas=[0.5, 0.9] is not read with optimizer=sgd", "adamw")),
    (("train.betas=[0.5,0.9]", "train.optimizer=torch.optim.SGD"), ("not read with optimizer=torch.optim.SGD",)),
    (("train.eps=1e-5",), ("train.eps=1e-05 is not read with optimizer=sgd",)),
    (("parent.momentum=0.5", "parent.optimizer=adam"), ("parent.momentum=0.5 is not read with optimizer=adam",)),
    (
        ("train.label_smoothing=0.1", "train.loss=squared_hinge"),
        ("train.label_smoothing=0.1 is not read with loss=squared_hinge", "loss=cross_entropy"),
    ),
    (("train.gamma=0.5",), ("train.gamma=0.5 is not read with schedule=onecycle", "step or exponential")),
    (("options.alpha=abc",), ("method=pact: options.alpha must be a number", "got 'abc'")),
    (("method=lsq", "options.step_decay=some"), ("options.step_decay", "a number or same", "got 'some'")),
    (("method=binaryconnect", "options.update_scale=[x]"), ("update_scale", "a number or glorot or glorot_squared")),
    (("dataset.val=2.0",), ("dataset.val", "a fraction", "got 2.0")),
    (("dataset=digits", "dataset.classes=3"), ("dataset.classes=3", "10 classes")),
    (("dataset.train_size=0",), ("dataset.train_size", "positive", "got 0")),
    (("model.width=0",), ("model.width", "above 0", "got 0")),
    (("options.alpha=-1",), ("method=pact", "alpha", "above 0", "-1")),
    (("method=flexor", "options.s_doublings=0.5"), ("doublings", "a list of shares", "[0.75]", "got 0.5")),
    (("method=xnor", "options.k=no"), ("options.k", "true or false", "got 'no'")),
    (("method=irnet", "options.shift=2"), ("options.shift", "true or false", "got 2")),
    (("method=ttq", "options.t=abc"), ("method=ttq", "options.t", "a number", "got 'abc'")),
    (("method=ttq", "options.t=true"), ("options.t", "a number", "got True")),
    (("method=fda_bnn", "options.k=1.5"), ("options.k", "a whole number", "got 1.5")),
    (("method=bnn", "options.h=glorott"), ("options.h", "a number or glorot", "got 'glorott'")),
    (("method=abcnet", "options.u=3"), ("method=abcnet", "shifts", "a list of numbers", "got 3")),
    (("method=bireal", "options.act_gradient=foo"), ("act_gradient", "polynomial", "got 'foo'")),
]


@pytest.mark.parametrize(("words", "parts"), WORDS, ids=[" ".join(w) for w, _ in WORDS])
def test_wrong_words(tiny: Cli, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    said = tiny(*words)
    assert said.status == 2
    refused(said, *parts)
    assert len(said.err) < 600
    assert not Path("outputs").exists()


def refused(said: Any, *parts: str) -> None:
    assert said.status != 0
    assert "Traceback" not in said.err + said.out
    assert "unexpected" not in said.err
    for part in parts:
        assert part in said.err, said.err


def test_a_folder_of_own_configuration_switches_no_check_off(tiny: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = "name: narrow\n_target_: qbench.models.lenet.LeNet5\nwidth: 0.1\nbatch_norm: null\n"
    (tmp_path / "mine" / "model" / "narrow.yaml").write_text(text)
    words = ("--config-dir=mine", "model=narrow", "plan=true")
    assert tiny(*words).status == 0
    refused(tiny(*words, "train.lrr=1"), "'train.lrr'", "Did you mean 'train.lr'?")
    refused(tiny(*words[:1], "model=narow"), "'narow'", "Did you mean 'narrow'?", "resnet20")
    refused(tiny(*words, "seed=-1"), "seed", "at least 0")
    refused(tiny("--config-dir=nowhere", "seed=0"), "--config-dir", "no folder nowhere")
    for content, why in ((b"name: [", "node content"), (b"name: \xa0\n", "can't decode byte")):
        (tmp_path / "mine" / "model" / "odd.yaml").write_bytes(content)
        refused(tiny("--config-dir=mine", "model=odd"), "odd.yaml is corrupt", why, "--config-dir")
    (tmp_path / "mine" / "model" / "odd.yaml").unlink()
    (tmp_path / "mine" / "model" / "deep.yaml").write_text("name: " + "[" * 200_000)
    refused(tiny("--config-dir=mine", "model=deep"), "deep.yaml is corrupt", "deep in each other")


@pytest.mark.parametrize(
    "text", ["2026", "1_1_1", "a b", "a=b", "a(b", "a#b", "Größe", "a,b", "it's", "1e3", "true", "[x]", "a'b\"c"]
)
def test_words_stay_as_they_were_typed(text: str) -> None:
    from qbench.cli.overrides import compose

    found = compose([f"out=p/{text}", f"name={text}", f"dataset.root={text}", f"init={text}"])
    assert (found.out, found.name, found.dataset.root, found.init) == (f"p/{text}", text, text, text)


def test_paths_with_backslashes_and_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.cli.overrides import compose

    monkeypatch.setenv("HOME", "/srv/me")
    found = compose(["out=~/runs", r"dataset.root=C:\data\new\\"[:-1], "init='quoted by hand'"])
    assert (found.out, found.dataset.root, found.init) == (
        "/srv/me/runs",
        r"C:\data\new"[:11] + "\\",
        "quoted by hand",
    )


def test_paths_of_a_sweep_are_split_at_commas_outside_quotes() -> None:
    from qbench.cli.texts import typed

    assert typed(["init=a b,'c,d',scratch", "name=choice(x,y)", "bits=2,4"], sweep=True) == [
        "init='a b','c,d','scratch'",
        "name=choice(x,y)",
        "bits=2,4",
    ]


def test_a_run_lies_in_the_folder_that_was_typed(tiny: Cli, tmp_path: Path) -> None:
    assert tiny("method=float", "out=Größe (1) = #2", "name=1_1_1").status == 0
    (result,) = tmp_path.glob("Größe (1) = #2/1_1_1-*/result.json")
    sweep = ("-m", "method=float", "out=a b", "seed=0,1")
    assert tiny(*sweep).status == 0
    assert len(list(tmp_path.glob("a b/*/result.json"))) == 2
    assert result.is_file()


def test_an_unknown_command_names_the_commands(cli: Cli) -> None:
    said = cli("tabel")
    assert said.status == 2
    refused(said, "'tabel'", "Did you mean 'table'?", "compare")


def test_an_unknown_flag_names_the_flags(cli: Cli) -> None:
    for flag, right in (("--hepl", "--help"), ("--multi", "--multirun")):
        said = cli("method=pact", flag)
        assert said.status == 2
        refused(said, f"'{flag}'", f"Did you mean '{right}'?", "--config-dir")


def test_every_flag_of_hydra_is_known() -> None:
    from hydra._internal.utils import get_args_parser

    from qbench.cli.command import FLAGS

    assert {*get_args_parser()._option_string_actions} - {*FLAGS} == {"--version"}  # which is ours


def test_a_gpu_that_is_not_there(tiny: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(tiny("device=cuda"), "device=cuda", "no GPU", "device=cpu")


def test_a_data_set_that_is_not_there_and_no_network(
    tiny: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    said = tiny("dataset=mnist", f"dataset.root={tmp_path / 'nothing'}")
    refused(said, "mnist", str(tmp_path / "nothing"), "dataset.root")


def test_a_damaged_data_file(tiny: Cli, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03 cut off")
    refused(
        tiny("dataset=mnist", f"dataset.root={tmp_path / 'data'}"), "mnist", "incomplete or damaged", "dataset.root"
    )


def test_a_missing_image_folder(tiny: Cli, tmp_path: Path) -> None:
    refused(tiny("dataset=image_folder", f"dataset.root={tmp_path / 'none'}"), str(tmp_path / "none"))


def _float_run(tiny: Cli, tmp_path: Path) -> Path:
    assert tiny("method=float", "out=o").status == 0
    (folder,) = (tmp_path / "o").glob("float-*")
    return folder


def test_a_corrupt_result(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    path = _float_run(tiny, tmp_path) / "result.json"
    assert tiny("method=float", "out=o", "seed=1").status == 0
    for content in ('{"method": "flo', "{}", "[]"):
        path.write_text(content)
        refused(tiny("method=float", "out=o"), str(path.relative_to(tmp_path)), "corrupt", "move the folder away")
        refused(cli("compare", path.parent, path.parent), "result.json", "corrupt")
        said = cli("table", "o")  # the others are shown
        assert (said.status, "float" in said.out, "left out" in said.err) == (0, True, True)


@pytest.mark.parametrize("content", ["", "a: [", "dataset"])
def test_a_corrupt_configuration(tiny: Cli, cli: Cli, tmp_path: Path, content: str) -> None:
    folder = _float_run(tiny, tmp_path)
    (folder / "config.yaml").write_text(content)
    for words in (("eval", folder), ("compare", folder, folder)):
        refused(cli(*words), "config.yaml", "corrupt")


def test_a_parent_without_its_net(tiny: Cli, tmp_path: Path) -> None:
    folder = _float_run(tiny, tmp_path)
    (folder / "model.pt").unlink()
    refused(tiny("method=pact", "bits=4", "out=o"), folder.name, "lost its model.pt", "move the folder away")
    folder.rename(tmp_path / "away")
    assert tiny("method=pact", "bits=4", "out=o").status == 0


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half"])
def test_a_corrupt_model(tiny: Cli, cli: Cli, tmp_path: Path, content: bytes | str) -> None:
    path = _float_run(tiny, tmp_path) / "model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    for said in (cli("eval", path.parent), tiny("method=pact", "bits=4", f"init={path}", "out=p")):
        refused(said, "model.pt", "not a readable checkpoint", "delete it")


def test_a_corrupt_checkpoint_of_an_unfinished_run(tiny: Cli, tmp_path: Path) -> None:
    folder = _float_run(tiny, tmp_path)
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    refused(tiny("method=float", "out=o"), "checkpoint.pt", "not a readable checkpoint", "delete it")


def test_an_older_form_of_checkpoint_is_refused_by_name(tiny: Cli, tmp_path: Path) -> None:
    folder = _float_run(tiny, tmp_path)
    (folder / "result.json").unlink()
    torch.save({"step": 1, "model": {}}, folder / "checkpoint.pt")
    refused(tiny("method=float", "out=o"), "checkpoint.pt", "does not belong to this run")


def test_a_checkpoint_that_is_no_state_dict(tiny: Cli, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tiny("method=pact", f"init={tmp_path / 'list.pt'}"), "list.pt", "no state_dict")


def test_a_checkpoint_of_another_architecture(tiny: Cli, tmp_path: Path) -> None:
    path = _float_run(tiny, tmp_path) / "model.pt"
    said = tiny("method=pact", f"init={path}", "model=lenet5", "model.width=0.1")
    refused(said, "another architecture", "model.pt", "shape")


def test_a_damaged_data_cache_is_named_and_rebuilt(tiny: Cli, tmp_path: Path, own_cache: Path) -> None:
    import numpy as np
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(32):
                pixels = np.full((8, 8, 3), (i * 7) % 256 if name == "cat" else 255 - i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    words = ("method=float", "dataset=image_folder", f"dataset.root={tmp_path / 'images'}")
    assert tiny(*words, "out=a").status == 0
    (cached,) = own_cache.glob("*.tensors")
    cached.write_bytes(cached.read_bytes()[:-100])
    said = tiny(*words, "out=b")
    assert said.status == 0
    a, b = (json.loads(next((tmp_path / o).glob("*/result.json")).read_text()) for o in "ab")
    assert a["weights_sha256"] == b["weights_sha256"]


@pytest.mark.parametrize("out", ["file", "/proc/qbench"])
@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_a_folder_that_cannot_be_written(tiny: Cli, tmp_path: Path, flags: tuple[str, ...], out: str) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(tiny(*flags, "method=float", f"out={out}"), "cannot write", out, "out=DIR")


def test_a_full_disk(tiny: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(tiny("method=float", "out=o"), "cannot write", "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qbench.errors import UserError
    from qbench.files import atomic_write

    path = atomic_write(tmp_path / "f", "old")

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_loss_that_is_not_finite(tiny: Cli) -> None:
    said = tiny("method=float", "train.lr=1e30", "train.schedule=constant", "out=o")
    refused(said, "loss", "method=float", "at step", "of 6", "no checkpoint was written yet", "train.lr")


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tiny: Cli) -> None:
    words = (
        "init=scratch",
        "train.lr=1e30",
        "train.warmup=1",
        "train.schedule=constant",
        "checkpoint_seconds=0",
        "out=o",
    )
    said = tiny("method=float", *words)
    refused(said, "method=float", "last good checkpoint", "checkpoint.pt (step ")


def test_a_batch_of_one_value_per_channel_is_refused_in_words(tiny: Cli) -> None:
    net = ("model=mlp", "model.hidden=[16]", "model.batch_norm=true", "train.batch_size=1", "out=o")
    refused(tiny("method=float", *net), "batch-norm sees one value per channel with batch_size=1", "a larger batch")


def test_eval_table_and_compare_of_what_is_not_there(cli: Cli, tmp_path: Path) -> None:
    refused(cli("eval", "nowhere"), "no such run or checkpoint: nowhere")
    refused(cli("eval"), "a run folder or a checkpoint")
    refused(cli("table", "nowhere"), "no folder nowhere")
    refused(cli("table", "a", "b"), "one folder", "got 2")
    refused(cli("compare", "a"), "two run folders", "got 1")
    (tmp_path / "unfinished").mkdir()
    refused(cli("eval", "unfinished"), "unfinished is not a finished run")
    refused(cli("compare", "unfinished", "unfinished"), "unfinished is not a finished run")


def test_eval_takes_no_other_training_option(tiny: Cli, cli: Cli, tmp_path: Path) -> None:
    run = _float_run(tiny, tmp_path)
    refused(cli("eval", run, "bits=2"), "only dataset.*, device and allow may be set", "bits")
    refused(cli("eval", run, "dataset.rooot=3"), "'rooot'", "Did you mean 'root'?", "test_size")
    refused(cli("eval", run, "dataset.root"), "'dataset.root'", "name=value")


def test_one_failing_cell_of_a_sweep_stops_no_other(tiny: Cli) -> None:
    said = tiny("-m", "method=float", "train.lr=0.05,1e30,0.01", "out=o")
    assert said.status == 1
    assert "Traceback" not in said.err + said.out
    assert "3 runs: 2 done (0 of them before), 1 failed, 0 not applicable" in said.out
    assert "failed" in said.out
    assert "train.lr=1e30" in said.err or "train.lr=1e+30" in said.err
    assert "the loss of method=float" in said.err


def test_debug_shows_the_traceback(tiny: Cli) -> None:
    said = tiny("method=pact", "train.lr=-1", "debug=true")
    assert said.status == 2
    assert "Traceback" in said.err
    assert "train.lr must be" in said.err


def test_a_failed_command_leaves_no_result(tiny: Cli, tmp_path: Path) -> None:
    tiny("method=float", "train.lr=1e30", "out=o")
    assert not list((tmp_path / "o").rglob("result.json"))
