"""Times of things that are compared: alternating, so that a slower minute of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

Act = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """One measured thing. ratio: `seconds` over `base_seconds` round by round, so that below 1 is faster than `of`; of
    memory below 1 is less, of accuracies above 1 is better.

    name: what, as in step/pact. mode: in which variant, as in fp32/compiler. of: what the ratio is relative to.
    seconds, base_seconds: medians, where the ratio is one of times. images_per_s: where images are what counts.
    values: further numbers by name.
    """

    name: str
    mode: str
    ratio: float
    of: str
    seconds: float | None = None
    base_seconds: float | None = None
    images_per_s: float | None = None
    model: str | None = None
    batch: int | None = None
    rounds: int = 1
    values: dict[str, Any] | None = None
    note: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON, four significant digits, without what is not known."""
        short = {k: _short(v) for k, v in asdict(self).items() if v is not None}
        return {**short, "values": {k: _short(v) for k, v in self.values.items()}} if self.values else short


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def alternate(acts: Mapping[str, Act], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each act in each of `rounds` rounds, in which every act has its turn; `warm` rounds go before."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(warm + rounds):
        for name, act in acts.items():
            start = time.perf_counter()
            took = act()
            if turn >= warm:  # an act that works elsewhere returns its own seconds
                seconds[name].append(took if isinstance(took, float) else time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(seconds, base, strict=True))


def compared(
    name: str,
    mode: str,
    times: Mapping[str, list[float]],
    own: str,
    base: str,
    of: str,
    *,
    model: str,
    batch: int,
    values: dict[str, Any] | None = None,
) -> Entry:
    """The Entry of a step of `batch` images: times[own] beside times[base], as `alternate` measured them."""
    took = median(times[own])
    share, of_base = ratio(times[own], times[base]), median(times[base])
    return Entry(name, mode, share, of, took, of_base, batch / took, model, batch, len(times[own]), values)
