"""A method's stages in words: repeated ones listed one by one, lengths from shares. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

from qbench.errors import UserError

LENGTHS = ("share", "epochs", "steps")


def listed(stages: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """Each stage by itself: one with `each: [a, b]` is two, which know their `value`; `{value}` stands in their names.

    Errors: UserError where names are not unique, `each` is no list, or a length is given twice.
    """
    out: list[dict[str, Any]] = []
    for stage in stages:
        rest = {k: v for k, v in stage.items() if k != "each"}
        if "each" not in stage:
            out.append(rest)
            continue
        if not isinstance(stage["each"], list):
            raise UserError(f"method={method}: the values of stage '{stage['name']}' must be a list: {stage['each']!r}")
        out += [{**rest, "name": str(stage["name"]).format(value=value), "value": value} for value in stage["each"]]
    names = [s["name"] for s in out]
    for stage in out:
        if names.count(stage["name"]) > 1:
            raise UserError(f"method={method}: two stages are called '{stage['name']}'")
        given = [k for k in LENGTHS if stage.get(k) is not None]
        if len(given) > 1:
            raise UserError(f"method={method}: stage '{stage['name']}' has {' and '.join(given)}; give one of them")
    return out


def lengths(stages: Sequence[Mapping[str, Any]], train: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{epochs} or {steps} of each stage: its own, none for one that acts, or its share of the run's recipe `train`.

    Those without a share divide evenly what the others leave. Steps are whole, and those of all stages add up.

    Errors: UserError on a share outside 0..1, or shares that add up to more than 1.
    """
    own = [k for s in stages for k in ("epochs", "steps") if s.get(k) is not None]
    open_ones = [s for s in stages if _shared(s) and s.get("share") is None]
    given = [s["share"] for s in stages if _shared(s) and s.get("share") is not None]
    for share in given:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"the share of a stage must be in 0..1, got {share!r}")
    left = 1 - sum(given)
    if left < -1e-9:
        raise UserError(f"the shares of the stages add up to {sum(given):g}, which is more than 1")
    if not own and not open_ones and given and left > 1e-9:
        raise UserError(f"the shares of the stages add up to {sum(given):g}, not to 1")
    done, out = 0.0, []
    for stage in stages:
        if not _shared(stage):
            epochs = stage.get("epochs")
            out.append({"steps": stage.get("steps") or 0} if epochs is None else {"epochs": epochs})
            continue
        share = stage["share"] if stage.get("share") is not None else max(0.0, left) / len(open_ones)
        if train.get("steps") is not None:
            out.append({"steps": round((done + share) * train["steps"]) - round(done * train["steps"])})
        else:
            out.append({"epochs": share * train["epochs"]})
        done += share
    return out


def _shared(stage: Mapping[str, Any]) -> bool:
    """Whether it trains for a part of the run's length."""
    return stage.get("act") is None and stage.get("epochs") is None and stage.get("steps") is None
