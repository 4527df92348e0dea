"""From the composed configuration to one plain dictionary in which nothing is left open. No torch here."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qbench.config import bits, options
from qbench.config.recipe import DEFAULTS, OPTIMIZERS, Recipe, merge, optimizer_class, unread
from qbench.errors import UserError

SITES = ("weight", "input", "output", "error", "replace")
FLOAT_METHOD: dict[str, Any] = {"name": "float", "w_bits": {"default": 32, "only": [32]}, "init": "scratch"}
UNREAD: dict[str, tuple[str, ...]] = {"step": (), "exponential": ("milestones",)}  # other schedules read neither


class NotApplicable(UserError):
    """A cell of a sweep that this method does not have (say 4-bit XNOR)."""


def resolve(config: DictConfig) -> dict[str, Any]:
    """One plain dictionary: bits, recipes, first net and model options decided, interpolations filled in.

    Errors: UserError naming the option, what was got and what is allowed.
    """
    raw = OmegaConf.to_container(config.method, resolve=False)
    assert isinstance(raw, dict)
    try:
        config.w_bits, config.a_bits = bits.resolve(raw, config.bits, config.w_bits, config.a_bits)  # type: ignore[arg-type]
    except UserError as error:
        raise NotApplicable(str(error)) from error
    recipe_init = (raw.get("recipe") or {}).get("init", raw["init"])
    config.init = config.init or (recipe_init if config.budget.name == "paper" else raw["init"])
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    plain: dict[str, Any] = {str(k): v for k, v in whole.items() if k != "bits"}
    _check(plain)
    method, budget = plain["method"], plain["budget"]
    paper = budget["name"] == "paper"
    recipe = dict(method.get("recipe") or {})
    recipe.pop("init", None)
    recipe_model = recipe.pop("model", {})
    needs = {**(method.get("needs") or {}), **(recipe_model if paper else {})}
    model = plain["model"]
    model.update({k: v for k, v in needs.items() if k in model and model[k] is None})
    for key, value in (budget.get("dataset") or {}).items():
        if plain["dataset"].get(key) is None:
            plain["dataset"][key] = value
    everywhere = {"precision": plain.pop("precision")}
    parent = [budget["parent"], plain["parent"], everywhere]
    own = (method.get("budgets") or {}).get(budget["name"], {})
    if method["name"] == "float":
        train = [*parent, plain["train"]]
    elif paper:
        train = [recipe, plain["train"], everywhere]
    else:
        phase = "scratch" if plain["init"] == "scratch" else "finetune"
        train = [budget[phase], _untimed(method, plain["init"], own), plain["train"], everywhere]
    plain["parent"], plain["train"] = (_read(k, plain[k], merge(v)) for k, v in (("parent", parent), ("train", train)))
    method["rules"] = [_without_float(rule) for rule in method.get("rules") or []]
    if plain["protocol"] == "uniform":
        method["rules"] = _uniform(method["rules"])
    plain["budget"] = budget["name"]
    return plain


def _untimed(method: Mapping[str, Any], init: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the method changes in a budget; learning rates meant for the other start are left out."""
    same_start = (init == "scratch") == (method["init"] == "scratch")
    return {k: v for k, v in own.items() if same_start or k not in ("lr", "epochs", "steps")}


def _check(config: Mapping[str, Any]) -> None:
    options.check(config)
    check = config["method"].get("check")
    if check:
        module, _, name = check.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)(config["options"], config["w_bits"])
        except ValueError as error:
            raise NotApplicable(f"method={config['method']['name']}: {error}") from error


def _read(part: str, given: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The recipe as a dictionary. Errors: NotApplicable where the user gave what it does not read."""
    if recipe.optimizer not in OPTIMIZERS:
        optimizer_class(recipe.optimizer)  # now, and not after the parent is trained
    if why := unread(given, recipe):
        raise NotApplicable(f"{part}.{why}")
    return asdict(recipe)


def _without_float(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule without the slots that were asked to stay in floating point (32 bits)."""
    sites = {s: rule[s] for s in SITES if isinstance(rule.get(s), dict)}
    left = {s: f for s, f in sites.items() if f.get("bits") != bits.FLOAT}
    if not sites or left.keys() == sites.keys():
        return rule
    rest = {k: v for k, v in rule.items() if k not in sites}
    return {**rest, **left} if left else {**rest, "keep": "left in float (32 bits asked for)"}


def _uniform(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same exceptions for every method: first and last layer in float, all else by the method's rules.

    Rules of another kind, such as for the ReLU before the last layer, are no exceptions: they shape the net.
    """
    general = [r for r in rules if r.get("match") not in ("@first", "@last") or "kind" in r]
    keep = "protocol=uniform: first and last layer in float"
    return [{"match": "@first", "keep": keep}, {"match": "@last", "keep": keep}, *general] if rules else []


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
        "protocol": "paper",
        "kernels": "auto",  # one parent for all tiers
        "train": config["parent"],
        "distill": {"weight": 0.0, "temperature": 1.0},
    }


def identity(config: Mapping[str, Any], data: Mapping[str, Any], init: str) -> dict[str, Any]:
    """What decides the numbers of a run: the configuration without folders, devices and display; the data by checksum.

    Values that are null, empty or a recipe's default are left out, so that a new option does not rename old results;
    so are those that the schedule does not read.
    """
    method, unread = config["method"], UNREAD.get(config["train"]["schedule"], ("milestones", "gamma"))
    out = {
        "method": {
            "name": method["name"],
            # the wording of a reason decides nothing
            "rules": [{k: bool(v) if k == "keep" else v for k, v in r.items()} for r in method.get("rules") or []],
            **{k: method.get(k) for k in ("hooks", "param_groups")},
        },
        "options": config["options"],
        "model": config["model"],
        "data": data,
        "recipe": {k: v for k, v in config["train"].items() if v != DEFAULTS[k] and k not in unread},
        "init": init,
        "seed": config["seed"],
        "bits": [config["w_bits"], config["a_bits"]],
        "distill": config["distill"] if config["distill"]["weight"] else None,
        "workers": config["workers"] if config["workers"] > 1 else None,
        "compile": config["compile"] or None,
        "kernels": config["kernels"] if config["kernels"] != "auto" else None,  # tiers differ by rounding
    }
    return _pruned(out)  # type: ignore[no-any-return]


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {k: _pruned(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None and v != {} and v != []}
    if isinstance(value, (list, tuple)):
        return [_pruned(v) for v in value]
    return value


def digest(content: Any) -> str:
    """Ten hex digits that name `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def folder_name(config: Mapping[str, Any], key: str) -> str:
    """<name>-<hash>; the name is method, bits, model and data set unless `name` was given."""
    method = config["method"]["name"]
    width = "" if method == "float" else f"-w{config['w_bits']:g}a{config['a_bits']:g}"
    default = f"{method}{width}-{config['model']['name']}-{config['dataset']['name']}"
    return f"{config['name'] or default}-{key}"
