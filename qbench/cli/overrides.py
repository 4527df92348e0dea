"""Overrides (name=value) to a configuration, with the nearest right name in place of a wrong one. No torch here."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench.config import catalog
from qbench.errors import UserError, nearest, unknown

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


def compose(overrides: Sequence[str]) -> "DictConfig":
    """The configuration as Hydra composes it."""
    import hydra

    with hydra.initialize_config_dir(str(catalog.conf_folder()), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


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
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"cannot read the command line: {str(error).splitlines()[0]}") from error
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


def check(overrides: Sequence[str], sweep: bool = False) -> None:
    """Check the names in `overrides` and, of a sweep, its first cell; errors offer the nearest right name."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qbench.config.resolve import NotApplicable, resolve

    plain, groups, first = [], [], []
    methods: list[str] = []
    for p in parse(overrides, sweep):
        values = _values(p)
        if p.key_or_group in catalog.GROUPS and not p.is_delete() and p.package is None:
            for value in values:
                if value not in catalog.names(p.key_or_group):
                    raise unknown(p.key_or_group, value, catalog.names(p.key_or_group))
            groups.append(f"{p.key_or_group}={values[0]}")
            methods += values if p.key_or_group == "method" else ()
        elif not (p.is_add() or p.is_force_add() or p.is_delete() or p.key_or_group.startswith("hydra")):
            plain.append(p.key_or_group)
        line = str(p.input_line)
        first.append(f"{line.partition('=')[0]}={values[0]}" if p.is_sweep_override() else line)
    words = [f for f in first if not f.startswith("hydra")]
    if sweep:  # `forced` lets any option pass
        _check_names(plain, groups, methods)
    try:
        resolve(compose(forced(words) if sweep else words))
    except NotApplicable:
        if not sweep:
            raise
    except (HydraException, OmegaConfBaseException) as error:
        _check_names(plain, groups, methods)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot put the configuration together: {reason}") from error


def _values(p: "Override") -> list[str]:
    """What `p` says, one by one; of an interval, in which an optimizer searches, the lower end."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    value = p.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start)]
    if isinstance(value, Glob):
        fitting = value.filter(catalog.names(p.key_or_group))
        if not fitting:
            raise UserError(f"{p.input_line} fits nothing")
        return fitting
    return list(p.sweep_string_iterator()) if p.is_sweep_override() else [p.get_value_element_as_str()]


def _check_names(keys: Sequence[str], groups: Sequence[str], methods: Sequence[str]) -> None:
    """Every key must exist in the configuration of these groups, an option in one at least of `methods`."""
    from omegaconf import OmegaConf

    known: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            known.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(compose(groups)), "")
    known += [f"options.{o}" for method in methods[1:] for o in catalog.options(method)]
    for key in keys:
        if key in known or key in catalog.GROUPS or re.sub(r"[.\[]\d+\]?", "", key) in known:
            continue
        last = SYNONYMS.get(key.rpartition(".")[2], key.rpartition(".")[2])
        inner = [k for k in known if k.rpartition(".")[2] == last]
        hint = inner[0] if inner else _nearest(key, known)
        inside = {k.rpartition(".")[0] for k in known}
        options = [k for k in dict.fromkeys(known) if re.fullmatch(r"options\.\w+", k) and k not in inside]
        own = ", ".join(options) or "none"
        more = f" Options of method={','.join(methods) or 'pact'}: {own}." if "options" in key or not hint else ""
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
