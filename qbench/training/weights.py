"""Which tensor of a checkpoint goes where: by names, and by order only where no name says otherwise."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from qbench.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning and others
COUNTER = "num_batches_tracked"  # older files and converted ones lack it, and nothing reads it
EXTRA = "_extra_state"  # what a quantizer saves beside tensors


def tensors_of(content: Any, path: Path) -> dict[str, Any]:
    """The state_dict in `content`, which may be wrapped ({'state_dict': ...}).

    Errors: UserError naming what is no tensor; the extra state of quantizers is none of that.
    """
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state_dict (a mapping from names to tensors)")
    strange = [k for k, v in content.items() if not isinstance(v, Tensor) and not str(k).endswith(EXTRA)]
    if strange:
        raise UserError(
            f"{path} holds no state_dict (a mapping from names to tensors): '{strange[0]}' is no tensor, nor is there "
            f"a state_dict under {', '.join(WRAPPERS)}"
        )
    return dict(content)


def fit(
    own: Mapping[str, Any], given: Mapping[str, Any], path: Path, new_head: bool = False, ordered: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors of `given` under the names of `own`, what there is to say about it).

    A name is taken as it is, else without the PREFIXES. Tensors without a name in common are matched by the order of
    their modules, tensor by tensor under equal last names, so that no two tensors of a module can change places; by
    their own order where last names say nothing either. The order of modules must agree with what the names say.
    The quantizers of a quantized net are left behind. `new_head`: so is the last layer, which keeps its initial values.
    `ordered`: whether the order in the file means anything (safetensors sorts).

    Errors: UserError naming the tensors that are missing, too many, or of another shape.
    """
    given = _named(own, given, path)
    quantizers = tuple(k.removesuffix(EXTRA) for k, v in given.items() if not isinstance(v, Tensor) and k != EXTRA)
    left = [k for k, v in given.items() if isinstance(v, Tensor) and k not in own and k.startswith(quantizers)]
    mine = [k for k, v in own.items() if isinstance(v, Tensor) and not k.endswith(COUNTER)]
    theirs = [k for k, v in given.items() if isinstance(v, Tensor) and not k.endswith(COUNTER) and k not in left]
    lines = [f"{len(left)} tensors of quantizers are left behind, they start anew"] if left else []
    if new_head:
        head = _module(mine[-1])
        mine = [k for k in mine if _module(k) != head]
        old = head if any(_module(k) == head for k in theirs) else _module(theirs[-1])
        theirs = [k for k in theirs if _module(k) != old]
        lines.append(f"init_head=new: {head} keeps its initial values")
    pairs = {k: k for k in mine if k in given}
    rest, others = [k for k in mine if k not in given], [k for k in theirs if k not in own]
    _check_shapes(own, given, pairs, path, hint=not new_head)
    if rest or others:
        found = _by_order(rest, others) if ordered and not quantizers else None
        if found is None or not _in_step(mine, theirs, pairs | found):
            raise UserError(
                f"{path} is of another architecture: it holds {len(theirs)} tensors, the model has {len(mine)}"
                f"{_listed('it lacks', rest)}{_listed('the model has no', others)}"
            )
        lines += [f"{theirs_} -> {mine_}" for mine_, theirs_ in found.items()]
        _check_shapes(own, given, found, path, hint=not new_head)
        pairs |= found
    counters = {k: v for k, v in given.items() if k.endswith(COUNTER) and k in own}
    return {k: given[g] for k, g in pairs.items()} | counters, lines


def _named(own: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`given` under names without prefixes, but for those that `own` has with them."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        short = str(name)
        while short not in own and short.startswith(PREFIXES):
            short = short.partition(".")[2]
        if short in found:
            raise UserError(f"{path} holds '{short}' twice, under '{name}' and without or with another prefix")
        found[short] = value
    return found


def _check_shapes(
    own: Mapping[str, Any], given: Mapping[str, Any], pairs: Mapping[str, str], path: Path, hint: bool
) -> None:
    head = _module(next((k for k in reversed([*own]) if not k.endswith(COUNTER)), ""))
    for k, g in pairs.items():
        if own[k].shape != given[g].shape:
            more = "; init_head=new starts the last layer anew" if hint and _module(k) == head else ""
            raise UserError(
                f"{path} is of another architecture: {g} has shape {list(given[g].shape)} "
                f"where the model's {k} has {list(own[k].shape)}{more}"
            )


def _by_order(mine: Sequence[str], theirs: Sequence[str]) -> dict[str, str] | None:
    """{name: theirs} of equally many tensors, module by module; None where they do not fit so."""
    if len(mine) != len(theirs):
        return None
    if not {_last(k) for k in mine} & {_last(k) for k in theirs}:
        return dict(zip(mine, theirs, strict=True))
    pairs: dict[str, str] = {}
    for a, b in zip(dict.fromkeys(map(_module, mine)), dict.fromkeys(map(_module, theirs)), strict=False):
        names = [{_last(k): k for k in side if _module(k) == m} for side, m in ((mine, a), (theirs, b))]
        if names[0].keys() != names[1].keys():
            return None
        pairs |= {k: names[1][last] for last, k in names[0].items()}
    return pairs if len(pairs) == len(mine) else None


def _in_step(mine: Sequence[str], theirs: Sequence[str], pairs: Mapping[str, str]) -> bool:
    """Whether modules that are paired stand in the same order on both sides."""
    places = {m: i for i, m in enumerate(dict.fromkeys(map(_module, theirs)))}
    return all(a <= b for a, b in pairwise(places[_module(pairs[k])] for k in mine))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"; {what} {', '.join(names[:5])}{more}" if names else ""
