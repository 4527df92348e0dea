"""From the composed configuration to one plain dictionary in which nothing is left open. No torch here."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qbench.config import bits, catalog, layer_bits, options
from qbench.config.catalog import check_method
from qbench.config.identity import mark, neutral
from qbench.config.recipe import OPTIMIZERS, Recipe, merge, optimizer_class, unread
from qbench.config.stages import lengths, listed
from qbench.errors import UserError, unknown

ENDS = ("@first", "@last", "@ends")
SITES = ("weight", "input", "output", "error", "replace")
LENGTH = ("epochs", "steps")
_ONE_FOR_ALL = ("batch_size", "calibration")  # stages see the same batches
# What of a recipe belongs together: a rate is good for its update rule, and both for the start they were found for.
UPDATE = ("optimizer", "lr", "momentum", "nesterov", "betas", "eps")


class NotApplicable(UserError):
    """A cell of a sweep that this method does not have (say 4-bit XNOR)."""


def resolve(config: DictConfig) -> dict[str, Any]:
    """One plain dictionary: bits, recipes, first net and model options decided, interpolations filled in.

    Errors: UserError naming the option, what was got and what is allowed.
    """
    raw = OmegaConf.to_container(config.method, resolve=False)
    assert isinstance(raw, dict)
    check_method(raw, f"{raw['name']}.yaml" if raw.get("name") else "the method's YAML")  # type: ignore[arg-type]
    try:
        config.w_bits, config.a_bits = bits.resolve(raw, config.bits, config.w_bits, config.a_bits)  # type: ignore[arg-type]
    except UserError as error:
        raise NotApplicable(str(error)) from error
    recipe_init = (raw.get("recipe") or {}).get("init", raw["init"])
    if config.init is None:
        config.init = recipe_init if config.budget.name == "paper" else raw["init"]
    words = {f"${{options.{name}}}" for name in neutral(raw, OmegaConf.to_container(config.options, resolve=True))}  # type: ignore[arg-type]
    if words:
        with open_dict(config):
            config.method = mark(raw, words)
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    plain: dict[str, Any] = {str(k): v for k, v in whole.items() if k != "bits"}
    _check(plain)
    plain["distill"] = _distill(plain["distill"])
    method, budget = plain["method"], plain["budget"]
    paper = budget["name"] == "paper"
    needs = {**(method.get("needs") or {}), **((method.get("recipe") or {}).get("model", {}) if paper else {})}
    model = plain["model"]
    model.update({k: v for k, v in needs.items() if k in model and model[k] is None})
    for key, value in (budget.get("dataset") or {}).items():
        if plain["dataset"].get(key) is None:
            plain["dataset"][key] = value
    everywhere = {"precision": plain.pop("precision")}
    parent = [budget["parent"], plain["parent"], everywhere]
    before, own = _training(method, budget, plain["init"], plain["w_bits"])
    before, asked = [*before, _without(own, ("stages",))], [plain["train"], everywhere]
    train = [*parent, plain["train"]] if method["name"] == "float" else [*before, *asked]
    whole_parent, whole_train = merge(parent), merge(train)
    method["stages"] = _stages(method, asdict(whole_train), before, own.get("stages") or {}, asked)
    stages = [Recipe(**s["recipe"]) for s in method["stages"] if not s.get("act")]
    plain["parent"] = _read("parent", plain["parent"], whole_parent, [whole_parent])
    plain["train"] = _read("train", plain["train"], whole_train, stages or [whole_train])
    plain["layer_bits"] = layer_bits.read(plain["layer_bits"], method)
    _check_only(method["name"], method.get("rules") or [], plain["options"])
    rules = wanted(method.get("rules") or [], plain["options"], plain["protocol"])
    # with widths of single layers it is decided layer by layer what stays in float
    method["rules"] = rules if plain["layer_bits"] else [_without_float(rule) for rule in rules]
    plain["budget"] = budget["name"]
    return plain


def _distill(given: dict[str, Any]) -> dict[str, Any]:
    """The distillation with the net of its teacher as conf/model has it.

    Errors: UserError where the teacher is a run, which knows its net, or there is no teacher to which it could belong.
    """
    if given["model"] is None:
        return given
    if given["teacher"] is None or Path(given["teacher"]).expanduser().is_dir():
        why = "a run knows its net" if given["teacher"] else "the float parent has the run's own"
        raise UserError(f"distill.model={given['model']} is for a teacher that is a checkpoint: {why}")
    return {**given, "model": catalog.read("model", given["model"])}


def _training(
    method: Mapping[str, Any], budget: Mapping[str, Any], init: str, w_bits: float
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """(recipes of lower rank, the method's own for this budget), before what the user asks for."""
    budgets = method.get("budgets") or {}
    every = budgets.get("every") or {}
    if budget["name"] == "paper":
        recipe = method.get("recipe") or {}
        if not recipe and method["family"] != "float":
            raise UserError(f"method={method['name']} names no recipe of its paper (method.recipe) for budget=paper")
        by_bits = {float(k): v for k, v in (recipe.get("by_bits") or {}).items()}.get(w_bits, {})
        return [every], _without({**recipe, **by_bits}, ("init", "model", "by_bits"))
    own = budgets.get(budget["name"]) or {}
    if (init == "scratch") != (method["init"] == "scratch"):
        own = _without(own, (*UPDATE, *LENGTH))
    return [budget["scratch" if init == "scratch" else "finetune"], every], dict(own)


def _stages(
    method: Mapping[str, Any],
    train: Mapping[str, Any],
    before: list[Mapping[str, Any]],
    theirs: Mapping[str, Any],
    asked: list[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The stages with their whole recipes; lengths are those of the run's recipe, by the stages' shares.

    theirs: what the method changes of each in this budget, by name.
    """
    stages = listed(method.get("stages") or [], method["name"])
    for name in theirs:
        if name not in [s["name"] for s in stages]:
            raise unknown(f"stage of method={method['name']}", name, [s["name"] for s in stages])
    lower, higher = ([_without(part, LENGTH) for part in parts] for parts in (before, asked))
    out = []
    for stage, length in zip(stages, lengths(stages, train), strict=True):
        mine = [stage.get("recipe") or {}, theirs.get(stage["name"]) or {}]
        for part in mine:
            _check_stage(f"method={method['name']}, stage {stage['name']}", part, merge([*lower, *mine, length]))
        out.append({**stage, "recipe": asdict(merge([*lower, *mine, *higher, length]))})
    return out


def _check_stage(where: str, given: Mapping[str, Any], recipe: Recipe) -> None:
    """Errors: UserError where a stage's own recipe names what it does not read, whatever the user asks for."""
    for key in _ONE_FOR_ALL:
        if given.get(key) is not None:
            raise UserError(f"{where}: {key} is one for all stages, that of the run's recipe (train.{key})")
    for key in LENGTH:
        if given.get(key) is not None:
            raise UserError(f"{where}: {key} stands beside the stage's recipe, not in it")
    if why := unread(given, [recipe]):
        raise UserError(f"{where}: recipe.{why}")


def _check_only(method: str, rules: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
    """Errors: UserError naming an option of `only` that the method does not have, and the nearest."""
    for rule in rules:
        only = rule.get("only") or {}
        if not isinstance(only, Mapping):
            raise UserError(f"method={method}: 'only' of a rule must look like {{option: value}}, got {only!r}")
        for strange in only.keys() - options.keys():
            raise unknown(f"option of method={method} in 'only' of a rule", str(strange), map(str, options))


def wanted(rules: list[dict[str, Any]], options: Mapping[str, Any], protocol: str = "paper") -> list[dict[str, Any]]:
    """The rules as this protocol has them, without those for other values of an option (`only`: a value, or a list)."""
    fit = [r for r in rules if all(options[k] in (v, *_entries(v)) for k, v in (r.get("only") or {}).items())]
    fit = _uniform(fit) if protocol == "uniform" else fit
    return [_without(r, ("only", "uniform")) for r in fit]


def _entries(value: Any) -> list[Any]:
    """The entries of a list; nothing else has any."""
    return value if isinstance(value, list) else []


def _without(part: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k not in keys}


def _check(config: Mapping[str, Any]) -> None:
    options.check(config)
    if config["init_head"] and config["init"] in ("scratch", "float"):
        raise UserError(f"init_head=new is for init=CHECKPOINT, got init={config['init']}")
    check = config["method"].get("check")
    if check:
        module, _, name = check.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)(config["options"], config["w_bits"])
        except ValueError as error:
            raise NotApplicable(f"method={config['method']['name']}: {error}") from error


def _read(part: str, given: Mapping[str, Any], recipe: Recipe, readers: list[Recipe]) -> dict[str, Any]:
    """The recipe as a dictionary. Errors: NotApplicable where the user gave what none of its `readers` reads."""
    if recipe.optimizer not in OPTIMIZERS:
        optimizer_class(recipe.optimizer)  # now, and not after the parent is trained
    if why := unread(given, readers):
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
    """The same sites for every method: first and last layer in float; of all others the weights and the inputs.

    A rule says in `uniform` what changes in it: slots that are added, or taken away (null); `drop`: all of it.
    """
    out = [{"match": "@ends", "keep": "protocol=uniform: first and last layer in float"}] if rules else []
    for rule in rules:
        change = rule.get("uniform") or {}
        if change != "drop" and (rule.get("match") not in ENDS or "kind" in rule):
            out.append({k: v for k, v in {**rule, **change}.items() if v is not None})
    return out
