"""Overrides (name=value) to a configuration, with the nearest right name in place of a wrong one. No torch here."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qbench import catalog
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


def resolve_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The resolved configuration of one run, checked name by name; see qbench.resolve.resolve."""
    from qbench.resolve import resolve

    check(overrides)
    return resolve(compose(overrides))


def resolve_row(overrides: Sequence[str]) -> dict[str, Any]:
    """`resolve_overrides` for many rows: three times as fast, as names are only looked up where one is wrong."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qbench.resolve import resolve

    try:
        return resolve(compose(overrides))
    except (HydraException, OmegaConfBaseException):
        return resolve_overrides(overrides)


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


def check(overrides: Sequence[str], sweep: bool = False) -> None:
    """Check the names in `overrides` and, of a sweep, its first cell; errors offer the nearest right name."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from qbench.resolve import NotApplicable, resolve

    plain, groups, first = [], [], []
    for p in parse(overrides, sweep):
        values = list(p.sweep_string_iterator()) if p.is_sweep_override() else [p.get_value_element_as_str()]
        if p.key_or_group in catalog.GROUPS and not p.is_delete() and p.package is None:
            for value in values:
                if value not in catalog.names(p.key_or_group):
                    raise unknown(p.key_or_group, value, catalog.names(p.key_or_group))
            groups.append(f"{p.key_or_group}={values[0]}")
        elif not (p.is_add() or p.is_force_add() or p.is_delete() or p.key_or_group.startswith("hydra")):
            plain.append(p.key_or_group)
        first.append(f"{p.input_line.partition('=')[0]}={values[0]}" if p.is_sweep_override() else p.input_line)  # type: ignore[union-attr]
    _check_names(plain, groups)
    try:
        config = compose([f for f in first if not f.startswith("hydra")])  # type: ignore[misc, union-attr]
        resolve(config)
    except NotApplicable:
        if not sweep:
            raise
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot put the configuration together: {reason}") from error


def _check_names(keys: Sequence[str], groups: Sequence[str]) -> None:
    """Every key must exist in the configuration of these groups."""
    from omegaconf import OmegaConf

    known: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            known.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(compose(groups)), "")
    for key in keys:
        if key in known or key in catalog.GROUPS or re.sub(r"[.\[]\d+\]?", "", key) in known:
            continue
        last = SYNONYMS.get(key.rpartition(".")[2], key.rpartition(".")[2])
        inner = [k for k in known if k.rpartition(".")[2] == last]
        hint = inner[0] if inner else _nearest(key, known)
        method = next((g for g in groups if g.startswith("method=")), "method=pact")
        inside = {k.rpartition(".")[0] for k in known}
        own = ", ".join(k for k in known if re.fullmatch(r"options\.\w+", k) and k not in inside) or "none"
        more = f" Options of {method}: {own}." if "options" in key or not hint else ""
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
