"""What a run is known by: ten hex digits over everything that decides its numbers. No torch here.

A class counts by its own name (and its package, where that is not ours), not by the file in which it lies. Of a Method
every field counts but those of `UNDECIDING`; of the configuration's other keys those that `identity` names.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qbench.config import bits
from qbench.config.recipe import Recipe

# Fields of a Method that decide no number, or none that is not in the configuration elsewhere: bits, recipe, init.
UNDECIDING = (
    "title",
    "family",
    "arxiv",
    "summary",
    "w_bits",
    "a_bits",
    "init",
    "needs",
    "recipe",
    "budgets",
    "check",
    "unmoved",
    "added",
)
FLOAT_METHOD: dict[str, Any] = {"name": "float", "w_bits": {"default": 32, "only": [32]}, "init": "scratch"}
DEFAULTS = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(Recipe)}
UNREAD: dict[str, tuple[str, ...]] = {"step": (), "exponential": ("milestones",)}  # other schedules read neither
NEUTRAL = "_neutral_"  # the arguments of a node that come from an option at its neutral value: see `mark`


def parent_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the float parent: the same model, data and seed, trained with the parent's recipe."""
    return {
        **config,
        "name": None,
        "method": FLOAT_METHOD,
        "options": {},
        "w_bits": bits.FLOAT,
        "a_bits": bits.FLOAT,
        "init": "scratch",
        "init_head": None,
        "layer_bits": None,
        "force": False,
        "protocol": "paper",
        "kernels": "auto",  # one parent for all tiers
        "train": config["parent"],
        "distill": {"weight": 0.0, "temperature": 1.0},
    }


def needs_parent(config: Mapping[str, Any]) -> bool:
    """Whether a run asks for the float parent, to start from or to be taught by."""
    given = config["distill"]
    return config["init"] == "float" or bool(given["weight"] and not given.get("teacher") and not given.get("joint"))


def identity(config: Mapping[str, Any], data: Mapping[str, Any], init: str) -> dict[str, Any]:
    """What decides the numbers of a run: the configuration without folders, devices and display; the data by checksum.

    Values that are null, empty or a recipe's default are left out, so that a new field does not rename old results; so
    are settings that the schedule does not read, and options at the neutral value that a method's `added` gives them.
    """
    method = config["method"]
    options = {k: v for k, v in config["options"].items() if k not in neutral(method, config["options"])}
    out = {
        "method": {k: v for k, v in method.items() if k not in UNDECIDING},
        "options": options,
        "model": config["model"],
        "data": data,
        "recipe": _recipe(config["train"]),
        "init": init,
        "init_head": config.get("init_head"),
        "seed": config["seed"],
        "bits": [config["w_bits"], config["a_bits"]],
        "layer_bits": config.get("layer_bits"),
        "distill": {k: v for k, v in config["distill"].items() if k != "teacher"}
        if config["distill"]["weight"]
        else None,
        "workers": config["workers"] if config["workers"] > 1 else None,
        "compile": config["compile"] or None,
        "kernels": config["kernels"] if config["kernels"] != "auto" else None,  # tiers differ by rounding
    }
    if "stages" in out["method"]:
        out["method"]["stages"] = [{**s, "recipe": _recipe(s["recipe"])} for s in method["stages"] or ()]
    return named(out)  # type: ignore[no-any-return]


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    unread = UNREAD.get(recipe.get("schedule", ""), ("milestones", "gamma"))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()}  # as a file has them
    return {k: v for k, v in plain.items() if v != DEFAULTS[k] and k not in unread}


def neutral(method: Mapping[str, Any], options: Mapping[str, Any]) -> set[str]:
    """The options that were added later and have the value that leaves everything as it was before them."""
    return {k for k, v in (method.get("added") or {}).items() if k in options and options[k] == v}


def mark(node: Any, words: set[str]) -> Any:
    """`node` with the keys whose value is one of `words` (interpolations) listed beside them: `named` leaves them out.

    A node that holds nothing else but its class then decides nothing either: a hook or slot that came with the option.
    """
    if isinstance(node, Mapping):
        out = {k: mark(v, words) for k, v in node.items()}
        marked = sorted(k for k, v in node.items() if isinstance(v, str) and v in words)
        return {**out, NEUTRAL: marked} if marked else out
    if isinstance(node, list):
        return [mark(v, words) for v in node]
    return node


def named(value: Any) -> Any:
    """`value` without null, empty and neutral entries, its classes by their own names."""
    if isinstance(value, Mapping):
        skip = {*value.get(NEUTRAL, ()), NEUTRAL, "_partial_"}
        kept = {k: named(v) for k, v in value.items() if k not in skip}
        kept = {k: v for k, v in kept.items() if v is not None and v != {} and v != []}
        if NEUTRAL in value and kept.keys() == {"_target_"}:
            return None
        if "keep" in kept:
            kept["keep"] = True  # the wording of a reason decides nothing
        return {k: class_name(v) if k in ("_target_", "optimizer", "loss", "act") else v for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [v for v in map(named, value) if v is not None]
    return value


def class_name(target: Any) -> Any:
    """'qbench.methods.pact.PACT' -> 'PACT'; 'torch.nn.Identity' -> 'torch.Identity'; what is no dotted path stays."""
    if not isinstance(target, str) or "." not in target:
        return target
    package, own = target.partition(".")[0], target.rpartition(".")[2]
    return own if package == "qbench" else f"{package}.{own}"


def digest(content: Any) -> str:
    """Ten hex digits that name `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def folder_name(config: Mapping[str, Any], key: str) -> str:
    """<name>-<hash>; the name: method, bits (`mixed`: some layers have others), model, data set, unless given."""
    method = config["method"]["name"]
    width = "" if method == "float" else f"-w{width_of(config, 'w')}a{width_of(config, 'a')}"
    width += "-mixed" if config.get("layer_bits") else ""
    default = f"{method}{width}-{config['model']['name']}-{config['dataset']['name']}"
    return f"{config['name'] or default}-{key}"


def width_of(config: Mapping[str, Any], site: str) -> str:
    """The bits of weights ('w') or activations ('a') in words; 'learned' where the training decides them."""
    learned = (config["method"].get(f"{site}_bits") or {}).get("learned")
    return "learned" if learned else f"{config[f'{site}_bits']:g}"
