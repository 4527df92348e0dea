"""Overrides (name=value) to a configuration, with the nearest right name in place of a wrong one. No torch here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.cli.texts import typed
from qbench.config import catalog
from qbench.config.data import KINDS
from qbench.config.options import HYDRA, MODEL, OPTIONS, check_method
from qbench.errors import UserError, nearest, unknown
from qbench.records import named, text_of
from qbench.shapes import parsed_yaml

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# What other tools call our options.
SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "batch": "batch_size",
    "bit_width": "bits",
    "bitwidth": "bits",
    "n_bits": "bits",
    "wbits": "w_bits",
    "abits": "a_bits",
    "num_epochs": "epochs",
    "arch": "model",
    "data": "dataset",
    "gpu": "device",
}


# What may be added with + or ++: its class, or the merging of recipes, refuses what it does not know.
OPEN = ("model.", "budget.parent.", "budget.finetune.", "budget.scratch.", "hydra.")


_RULES = (
    "{} would take the place of every rule of the method. Write a method of your own (mine.yaml in FOLDER/method, with "
    "--config-dir=FOLDER), or set what a rule holds: method.rules.0.weight.bits=8"
)


def compose(overrides: Sequence[str], own: Path | None = None) -> "DictConfig":
    """The configuration as Hydra composes it, with the files of the user's `own` folder."""
    import hydra
    from hydra.core.override_parser.types import Quote, QuotedString

    if own is not None:
        place = QuotedString(text=f"file://{own.resolve()}", quote=Quote.single).with_quotes()
        overrides = [f"hydra.searchpath=[{place}]", *overrides]
    with hydra.initialize_config_dir(str(catalog.conf_folder()), version_base="1.3"):
        return hydra.compose("config", overrides=typed(overrides))


def resolve_row(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of one run, as `resolve` makes it; names are only looked up where one is wrong."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qbench.config.resolve import resolve

    try:
        return resolve(compose(overrides))
    except (HydraException, OmegaConfBaseException):
        check(overrides)
        raise


def parse(overrides: Sequence[str], sweep: bool = False) -> "list[Override]":
    """The overrides as Hydra reads them; several values of one name are for a sweep alone."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"'{text}' is not of the form name=value. Example: method=pact bits=4")
    parsed = []
    for text, word in zip(overrides, typed(overrides, sweep), strict=True):
        try:
            parsed += OverridesParser.create().parse_overrides([word])
        except (HydraException, ValueError) as error:  # ValueError: of a number of more than 4300 digits
            why = f"{str(error).splitlines()[0]:.200}"
            raise UserError(f"cannot read the command line at '{text:.100}': {why}") from error
        except RecursionError:
            raise UserError(
                f"cannot read the command line at '{text:.100}': brackets within brackets, too deep"
            ) from None
    for p in parsed:
        if p.is_sweep_override() and not sweep:
            raise UserError(f"{p.input_line} has several values: add -m to run one after the other")
    return parsed


def forced(overrides: Sequence[str]) -> list[str]:
    """The overrides of a sweep, in which not every method need have every option: Hydra adds where it is not."""
    return [f"++{o}" if o.startswith("options.") else o for o in overrides]


def check_options(method: str, overrides: Sequence[str]) -> None:
    """Check that `method` has the options that `forced` has added to a cell of a sweep; else it is not applicable."""
    from qbench.config.resolve import NotApplicable

    if method not in catalog.names("method"):
        return  # the user's own (--config-dir): nothing was forced
    for word in overrides:
        option = re.match(r"\+\+options\.(\w+)", word)
        if option and option[1] not in catalog.options(method):
            raise NotApplicable(str(unknown(f"option of method={method}", option[1], catalog.options(method))))


def check(overrides: Sequence[str], sweep: bool = False, own: Path | None = None) -> None:
    """Check the names in `overrides`, every value of a sweep, and its first cell; errors offer the nearest right name.

    own: a folder of the user's own configuration.
    """
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from qbench.config.resolve import NotApplicable, resolve

    plain, groups, first = [], [], []
    methods: list[str] = []
    asked: list[tuple[str, Any]] = []  # options of methods, each value
    strange = False  # whether a name is added that Hydra would take, right or wrong
    words = parse(overrides, sweep)
    searching = any(p.key_or_group == "hydra/sweeper" for p in words)
    for p in words:
        values = _values(p, own, searching)
        if sweep and p.key_or_group.startswith("options."):
            asked += [(p.key_or_group.removeprefix("options."), value) for value in values]
        _check_values(p, values, own)
        if p.key_or_group in catalog.GROUPS and p.package is None:
            groups.append(f"{p.key_or_group}={values[0]}")
            methods += map(str, values if p.key_or_group == "method" else ())
        elif not p.key_or_group.startswith("hydra"):
            added = p.is_add() or p.is_force_add()
            if not (added and p.key_or_group.startswith(OPEN)):
                plain.append(p.key_or_group)
                strange |= added
        line = str(p.input_line)
        first.append(f"{line.partition('=')[0]}={_first(p, values)}" if p.is_sweep_override() else line)
    for name, value in asked:
        for method in methods or ["pact"]:
            check_method(method, {name: value})
    if sweep or strange:  # `forced` lets any option pass
        _check_names(plain, groups, methods, own)
    try:
        resolve(compose(forced(first) if sweep else first, own))
    except NotApplicable:
        if not sweep:
            raise
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(own, error) from error
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        raise unknown(group, name, error.options or ()) from error
    except (HydraException, OmegaConfBaseException) as error:
        _check_names(plain, groups, methods, own)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot put the configuration together: {reason}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if own is None:
            raise
        raise UserError(
            f"the configuration in {own} does not fit together ({type(error).__name__}: {error}); CONTRIBUTING.md "
            "shows a whole file"
        ) from error


def _unreadable(own: Path | None, error: Exception) -> UserError:
    """Which file of the user's own configuration cannot be read, and why."""
    for path in sorted(own.rglob("*.yaml")) if own else ():
        mend = "mend it, or take it out of --config-dir"
        with named(path, mend):
            parsed_yaml(text_of(path, mend), aliases=True)
    return UserError(f"cannot read the configuration: {' '.join(str(error).split())[:300]}")


def _check_values(p: "Override", values: Sequence[Any], own: Path | None) -> None:
    """Check what is wrong whatever the other words are."""
    key = p.key_or_group
    if p.is_delete():
        raise UserError(f"{p.input_line}: no option can be taken away; {key}=null leaves it open where it may be null")
    if key == "method.rules":
        raise UserError(_RULES.format(p.input_line))
    if key in catalog.GROUPS and p.package is None:
        known = _names(key, own)
        for value in values:
            if value not in known:
                raise unknown(key, str(value), known)
    if key.startswith("hydra.") and (name := key.split(".")[1]) not in (known := _hydras()):
        raise unknown("option of Hydra", f"hydra.{name}", [f"hydra.{n}" for n in known])
    kind = {**OPTIONS, **KINDS, **HYDRA, **({} if own else {f"model.{k}": v for k, v in MODEL.items()})}.get(key)
    if kind and (p.is_sweep_override() or key in HYDRA):  # all others are checked as they are composed
        for value in values:
            kind.check(key, value)


def _hydras() -> list[str]:
    """What stands directly under `hydra` in Hydra's own configuration."""
    from hydra.conf import HydraConf

    return [*HydraConf.__dataclass_fields__]


def _names(group: str, own: Path | None) -> list[str]:
    """What a group holds, in our configuration and in the user's own."""
    return sorted(
        {*catalog.names(group), *(p.stem for p in (own / group).glob("*.yaml"))} if own else catalog.names(group)
    )


def _values(p: "Override", own: Path | None, searching: bool) -> list[Any]:
    """What `p` says, one by one; of an interval, in which an optimizer searches, the lower end.

    searching: whether such an optimizer was asked for.

    Errors: UserError where it says nothing, or an interval where a width is asked for, or where none searches.
    """
    from hydra.core.override_parser.types import Glob, IntervalSweep, QuotedString

    value = p.value()
    if isinstance(value, IntervalSweep):
        if p.key_or_group in ("bits", "w_bits", "a_bits"):
            raise UserError(f"{p.input_line} would draw any number between; name the widths: {p.key_or_group}=2,3,4")
        if not searching:
            raise UserError(
                f"{p.input_line} is for a sweeper that searches (hydra/sweeper=...); "
                f"name the values: {p.key_or_group}=1,2"
            )
        return [value.start]
    if isinstance(value, Glob):
        found: list[Any] = list(value.filter(_names(p.key_or_group, own)))
    else:
        found = list(p.sweep_iterator()) if p.is_sweep_override() else [value]
    if not found:
        raise UserError(f"{p.input_line} fits nothing")
    return [v.text if isinstance(v, QuotedString) else v for v in found]


def _first(p: "Override", values: Sequence[Any]) -> str:
    """The first value of a sweep, as the command line would have it."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    plain = isinstance(p.value(), (Glob, IntervalSweep))
    return str(values[0]) if plain else next(iter(p.sweep_string_iterator()))


def _check_names(keys: Sequence[str], groups: Sequence[str], methods: Sequence[str], own: Path | None = None) -> None:
    """Every key must exist in the configuration of these groups, an option in one at least of `methods`."""
    from omegaconf import OmegaConf

    known: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            known.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(compose(groups, own)), "")
    known += [f"options.{o}" for m in methods[1:] if m in catalog.names("method") for o in catalog.options(m)]
    for key in keys:
        if key in known or key in catalog.GROUPS or re.sub(r"[.\[]\d+\]?", "", key) in known:
            continue
        last = SYNONYMS.get(key.rpartition(".")[2], key.rpartition(".")[2])
        inner = [k for k in known if k.rpartition(".")[2] == last]
        hint = inner[0] if inner else _nearest(key, known)
        inside = {k.rpartition(".")[0] for k in known}
        options = [k for k in dict.fromkeys(known) if re.fullmatch(r"options\.\w+", k) and k not in inside]
        theirs = ", ".join(options) or "none"
        more = f" Options of method={','.join(methods) or 'pact'}: {theirs}." if "options" in key or not hint else ""
        raise UserError(
            f"unknown option '{key}'."
            + (f" Did you mean '{hint}'?" if hint else "")
            + more
            + " All options: conf/config.yaml and qbench --help."
        )


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known name most like `key`: among its siblings where its parent exists, else among all."""
    parent, _, last = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if parent and siblings:
        found = nearest(last, siblings)
        return f"{parent}.{found}" if found else None
    return nearest(key, [*known, *catalog.GROUPS])
