"""What a configuration that came with a file may build. No torch unless a name asks for it.

Building a net from a configuration calls whatever its `_target_`s name. On the user's own command line that may be
anything that can be imported; the config.yaml of a run's folder and the words of a card may come from elsewhere.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from qbench.config import catalog
from qbench.config.moved import today
from qbench.errors import UserError

TARGET = "_target_"
# Where else a dotted path is imported.
DOTTED = ("method.check", "train.optimizer", "train.loss", "parent.optimizer", "parent.loss")
OWN = ("qbench.methods.", "qbench.models.", "qbench.quant.")
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")  # no part begins with an underscore
_WORD = re.compile(rf"(?:^|[.+~{{,\s'\"])({TARGET}|check|optimizer|loss)['\"]?\s*[:=]\s*['\"]?([^\s,}}'\"]*)")


def check(config: Mapping[str, Any], source: str, allow: Sequence[str] = ()) -> None:
    """Refuse a configuration that names anything but what may be built; nothing foreign is imported for that.

    May be built: what qbench's own conf/ names, the classes of its methods, models and quantizers, torch.nn.X,
    torch.optim.X, torchvision.models.X, and all of the packages in `allow`. An interpolation (`${...}`) could become
    any of the rest and is refused too; the config.yaml of a run holds none.

    Errors: UserError naming `source`, the place in the configuration, and what stands there.
    """
    for place, value in _leaves(config):
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{source}: {place} is '{value[:60]}'; a finished configuration holds no interpolation")
        dotted = place in DOTTED and "." in str(value)
        if place.rpartition(".")[2] == TARGET or dotted:
            _check_name(source, place, value, allow)


def check_words(words: Sequence[str], source: str, allow: Sequence[str] = ()) -> None:
    """The same for words of a command line that a card holds, before Hydra reads them.

    Errors: UserError naming `source` and the word.
    """
    for word in words:
        if "${" in word or word.lstrip("+~").startswith("hydra"):
            raise UserError(f"{source}: '{word}': a card may neither interpolate nor set Hydra's own options")
        for key, name in _WORD.findall(word):
            if key == TARGET or "." in name:
                _check_name(source, word.partition("=")[0], name, allow)


def packages(text: str) -> tuple[str, ...]:
    """The names in `allow=A,B` or `allow=[A,B]`. Errors: UserError where one is no name of a package."""
    found = tuple(name.strip() for name in text.removeprefix("[").removesuffix("]").split(",") if name.strip())
    for name in found:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"allow must be the name of a package, or several as [A,B], got '{name}'")
    return found


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        here = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping | list | tuple):
            if str(key) == TARGET:
                yield here, value
            yield from _leaves(value, here)
        else:
            yield here, value


def _check_name(source: str, place: str, name: Any, allow: Sequence[str]) -> None:
    if isinstance(name, str) and NAME.fullmatch(name) and _may_be_built(today(name), allow):
        return
    package = str(name).partition(".")[0]
    if package == "qbench":
        raise UserError(f"{source}: {place} names {name!r}, which is no class of qbench's nets and methods")
    raise UserError(
        f"{source}: {place} names {name!r}, and calling that could run any code. From a file only qbench's own "
        f"classes, torch.nn, torch.optim and torchvision.models are built. If you trust it: allow={package} behind "
        f"qbench eval or qbench paper, or qbench.load(folder, allow=('{package}',))"
    )


def _may_be_built(name: str, allow: Sequence[str]) -> bool:
    module, _, last = name.rpartition(".")
    if any(name.startswith(f"{package}.") for package in allow) or name in _shipped():
        return True
    if module == "torchvision.models":  # its top level holds builders of nets, their classes and their weights' names
        return True
    if module in ("torch.nn", "torch.optim"):
        base = "Module" if module == "torch.nn" else "Optimizer"
        home = importlib.import_module(module)
        found = vars(home).get(last)
        return isinstance(found, type) and issubclass(found, vars(home)[base])
    return module.startswith(OWN) and _is_part(module, last)


def _is_part(module: str, name: str) -> bool:
    """Whether `module` of qbench defines the class `name`, and it is a part of a net or of a method."""
    from torch import nn, optim

    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError:
        return False
    if not isinstance(found, type) or found.__module__ != module:
        return False
    return issubclass(found, nn.Module | optim.Optimizer) or module == "qbench.quant.method"


@cache
def _shipped() -> frozenset[str]:
    """Every dotted name that qbench's own conf/ builds or calls."""
    files = (path for group in ("method", "model") for path in (catalog.conf_folder() / group).glob("*.yaml"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    return frozenset(name for text in texts for name in re.findall(rf"\b(?:{TARGET}|check): *([\w.]+)", text))
