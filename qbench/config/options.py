"""Every option of conf/config.yaml: its type, its range and its words, said once. No torch here.

Those of data sets are beside it; what else lies under `model` and `method` is checked by the classes they name.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbench.config import bits, catalog, data
from qbench.config.identity import needs_parent
from qbench.config.kinds import NAME, PATH, START, TIME, Kind, is_number, number, numbers, one_of, truth, whole
from qbench.config.recipe import FIELDS, KERNELS, PRECISIONS
from qbench.errors import UserError, unknown

PROTOCOLS = ("paper", "uniform")
PICTURES = ("png", "svg", "pdf")
MOST = 1024  # threads or processes: far above it the system refuses them, or OpenMP dies


class Bits(Kind):
    """Widths as `qbench.config.bits` reads them."""

    def check(self, name: str, value: Any) -> None:
        bits.parse(value) if name == "bits" else value is None or bits.number(name, value)


BITS = Bits("", lambda x: False, null=True)


def _is_there(path: Any) -> bool:
    return PATH.allows(path) and Path(path).expanduser().exists()


# Read by qbench.config.layer_bits once the method is known.
LAYERS = Kind(
    "patterns of layers with their bits, such as {layer3.*:2,fc:8/8}, or a YAML file that is there",
    lambda x: (isinstance(x, Mapping) and len(x) > 0) or (isinstance(x, str) and Path(x).expanduser().is_file()),
    null=True,
)
RECIPE = {name: replace(kind, null=True) for name, kind in FIELDS.items()}  # null: as budget and method say
OPTIONS: dict[str, Kind] = {
    "name": NAME,
    "bits": BITS,
    "w_bits": BITS,
    "a_bits": BITS,
    "layer_bits": LAYERS,
    "seed": whole(0),
    "init": START,
    "init_head": one_of("new", null=True),
    "protocol": one_of(*PROTOCOLS),
    "precision": one_of(*PRECISIONS, null=True),
    "device": one_of("auto", "cpu", "cuda"),
    "threads": whole(1, MOST, null=True),
    "workers": whole(1, MOST),
    "channels_last": truth(),
    "compile": truth(),
    "graph": one_of("auto", True, False),
    "kernels": one_of(*KERNELS),
    **{f"{part}.{name}": kind for part in ("train", "parent") for name, kind in RECIPE.items()},
    "distill.weight": number(0),
    "distill.temperature": number(0, above=True),
    "distill.labels": number(0, null=True),
    "distill.teacher": Kind("a run folder or a checkpoint that is there", _is_there, null=True),
    "distill.model": one_of(*catalog.names("model"), null=True),
    "distill.joint": truth(null=True),
    "out": PATH,
    "checkpoint_seconds": number(0),
    "time_limit": TIME,
    "tensorboard": truth(),
    "figures": one_of(*PICTURES),
    "force": truth(),
    "plan": truth(),
    "debug": truth(),
}
# Those of our own nets, whichever of them have it.
MODEL: dict[str, Kind] = {
    "width": Kind("a number above 0, at most 1000", lambda x: is_number(x) and 0 < x <= 1000),
    "depth": whole(1),
    "hidden": numbers("a list of whole numbers above 0", lambda xs: all(x > 0 and x == int(x) for x in xs)),
    "padding": whole(0),
    "shortcut": one_of("A", "B"),
    **dict.fromkeys(
        ("preactivation", "shortcut_per_conv", "raw_shortcut", "final_norm", "batch_norm", "pool_first"),
        truth(null=True),
    ),
    **dict.fromkeys(("dropout", "dropout_in"), number(0, 1, below=True, null=True)),
}
GROUPS = ("train", "parent", "distill")  # of options; `options`, `model`, `method`, `dataset` and `budget` beside them
# What a run knows beside them: Hydra's own, of which one is ours to check.
HYDRA = {
    "hydra.launcher.n_jobs": Kind("a whole number other than 0 (-1: all cores)", lambda n: type(n) is int and n != 0)
}

# What some options of methods take in place of a number.
WORDS: dict[str, tuple[str, ...]] = {
    "apot.input_alpha": (),
    "binaryconnect.h": ("glorot",),
    "binaryconnect.update_scale": ("glorot", "glorot_squared"),
    "bnn.h": ("glorot",),
    "bnn.update_scale": ("glorot", "glorot_squared"),
    "dsq.alpha_decay": ("same",),
    "flexor.alpha": ("he",),
    "flexor.s_warmup": ("lr",),
    "hwgq.positive": (),
    "lsq.step_decay": ("same",),
    "pact.alpha": (),
    "pact_sawb.alpha": (),
    "qil.gradient_scale": ("lsq",),
    "ttq.scale_decay": ("same",),
}


def check(config: Mapping[str, Any]) -> None:
    """Check every value of a composed configuration, and that nothing stands in it that no option is.

    Errors: UserError naming the first option that is wrong, what was got and what is allowed.
    """
    for group in GROUPS:
        if not isinstance(config[group], Mapping):
            raise _no_value(group, config[group])
        names = [k.partition(".")[2] for k in OPTIONS if k.startswith(f"{group}.")]
        for strange in sorted(set(config[group]) - set(names)):
            raise unknown(f"{group} option", strange, names)
    if not isinstance(config["options"], Mapping):
        raise _no_value("options", config["options"])
    for name, kind in OPTIONS.items():
        group, _, key = name.rpartition(".")
        place = config[group] if group else config
        if key in place:  # `bits` is spent once a configuration is resolved
            kind.check(name, place[key])
    told = [k for k in ("teacher", "model", "joint") if config["distill"].get(k) is not None]
    if told and not config["distill"]["weight"]:
        raise UserError(f"distill.{told[0]} is for distill.weight above 0")
    check_method(config["method"]["name"], config["options"])
    for name, value in config["model"].items():
        if name in MODEL and config["model"]["name"] in catalog.names("model"):
            MODEL[name].check(f"model.{name}", value)
    data.check(str(config["dataset"].get("name")), config["dataset"])


def _no_value(group: str, value: Any) -> UserError:
    names = [k for k in OPTIONS if k.startswith(f"{group}.")]
    meant = next((g for g in catalog.GROUPS if str(value) in catalog.names(g)), None)
    hint = f" Did you mean {meant}={value}?" if meant else ""
    return UserError(
        f"{group} is a group of options ({', '.join(names[:4]) or 'options.NAME'} ...), got {group}={value}.{hint}"
    )


def check_size(config: Mapping[str, Any], images: int) -> None:
    """Check, of a resolved configuration, that there are `images` enough for a batch.

    Errors: UserError where a recipe that trains asks for a larger one.
    """
    parts = ("train", "parent") if needs_parent(config) else ("train",)
    for part in parts:
        recipe = config[part]
        if recipe["batch_size"] > images and (recipe["steps"] or recipe["epochs"]):
            raise UserError(
                f"{part}.batch_size={recipe['batch_size']} is more than the {images} training images of "
                f"dataset={config['dataset']['name']}"
            )


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Of the `options` of our own methods that are given: a truth value or a number where the default is one."""
    for name, value in options.items():
        if isinstance(value, float) and not is_number(value):
            raise UserError(f"method={method}: options.{name} must be finite, got {value}")
    for name, default in (catalog.options(method) if method in catalog.names("method") else {}).items():
        words = WORDS.get(f"{method}.{name}")
        if isinstance(default, bool):
            kind = truth()
        elif isinstance(default, Mapping):
            kind = Kind("a mapping", lambda x: isinstance(x, Mapping))
        elif isinstance(default, int):
            kind = Kind("a whole number", lambda x: is_number(x) and float(x).is_integer(), null=True)
        elif isinstance(default, float) or words is not None:
            kind = number(null=True, words=words or ())
        else:
            continue
        if name in options:
            kind.check(f"method={method}: options.{name}", options[name])
