"""In what the runs of a claim differ beside what it is about: that may be what decides it. No torch here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qbench.papers.cards import Row

Setup = Mapping[str, Mapping[str, Any]]
SetupOf = Callable[[Row, str], Setup]  # of a row in a budget


def setup(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What two runs must share to be compared, by the parts of `cards.PARTS`: of a resolved configuration.

    A part holds names and values, so that of two nets the fields are told that differ; null and false are the same.
    """
    train, net, data = config["train"], config["model"], config["dataset"]
    length = f"{train['steps']} steps" if train["steps"] is not None else train["epochs"]
    read = {"step": ("milestones", "gamma"), "exponential": ("gamma",)}.get(train["schedule"], ())
    momentum = ("momentum", "nesterov") if train["optimizer"] == "sgd" else ()
    return {
        "start": {"": config["init"]},
        "optimizer": {"": train["optimizer"], **{k: train[k] for k in momentum}},
        "learning rate": {"": train["lr"]},
        "schedule": {"": train["schedule"], **{k: train[k] for k in ("warmup", *read)}},
        "epochs": {"": length},
        "batch size": {"": train["batch_size"]},
        "weight decay": {"": train["weight_decay"], "of": train["decay"]},
        "loss": {"": train["loss"], "label_smoothing": train["label_smoothing"]},
        "net": {"": net["name"], **{k: v for k, v in net.items() if k not in ("name", "_target_")}},
        "data": {"": data["name"], **{k: data.get(k) for k in ("augment", "preprocess", "mean", "std", "val")}},
    }


def differences(setups: Sequence[Setup], about: Sequence[str]) -> str:
    """The parts, but for those that the claim is `about`, in which the runs differ, with the values in their order.

    Of a part whose main value differs (two optimizers, two nets) its fields are not told.
    """
    told = []
    for part in (p for p in setups[0] if p not in about):
        names = dict.fromkeys(name for s in setups for name in s[part])
        values = {name: list(dict.fromkeys(_said(s[part].get(name)) for s in setups)) for name in names}
        differ = [name for name in names if len(values[name]) > 1]
        for name in differ[:1] if "" in differ else differ:
            told.append(f"{part}{f' {name}' if name else ''} ({', '.join(values[name])})")
    return "; ".join(told)


def _said(value: Any) -> str:
    if value is None or value is False:
        return "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "yes" if value is True else str(value)
