"""FleXOR's XOR-gate networks: which shapes are possible, and how the gates are wired. No torch here."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

MATRICES = ("random", "distinct", "covering")
LAYERS = ("middle", "all")


def _whole(name: str, value: Any, lo: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lo:
        raise ValueError(f"{name} must be a whole number of at least {lo}, got {value!r}")


@dataclass(frozen=True)
class XorSpec:
    """`q` networks, each with `n_in` stored bits in and `n_out` weight bits out: q * n_in / n_out bits per weight.

    n_tap: inputs per gate; None draws each connection with probability 1/2.
    matrix: how the rows are drawn. `random`: each by itself, rows may repeat (the paper says no more than "N_tap
    ones per row"); `distinct`: no row twice; `covering`: every input reaches a gate, and no row comes twice before all
    that are possible have come once. What a wiring can do is its `rank`; of `random` with two inputs per gate, 16 in
    and 20 out, that is 12 or less for one seed in ten, 13.7 on average, of `covering` 14.8, and of both at most 15.
    seed: of the wiring, which differs from plane to plane; all layers of an equal spec share it.

    Errors: ValueError on a range, and where `distinct` cannot be had.
    Reference: arXiv 2009.04126, Sec. 2-3
    """

    n_in: int
    n_out: int = 20
    n_tap: int | None = 2
    q: int = 1
    matrix: str = "covering"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lo in (("n_in", 1), ("n_out", 1), ("q", 1), ("seed", 0)):
            _whole(name, getattr(self, name), lo)
        if self.n_in > self.n_out:
            raise ValueError(
                f"n_in must be at most n_out={self.n_out}, got {self.n_in}; more bits per weight need more planes (q)"
            )
        if self.n_tap is not None:
            _whole("n_tap", self.n_tap, 1)
            if self.n_tap > self.n_in:
                raise ValueError(f"n_tap must be at most n_in={self.n_in}, got {self.n_tap}")
        if self.matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {', '.join(MATRICES)}, got {self.matrix!r}")
        if self.matrix == "distinct" and self.possible < self.n_out:
            raise ValueError(
                f"matrix=distinct needs {self.n_out} different rows, but n_in={self.n_in} n_tap={self.n_tap} "
                f"has only {self.possible}; use matrix=covering"
            )

    @property
    def possible(self) -> int:
        """How many different rows there are."""
        return 2**self.n_in - 1 if self.n_tap is None else math.comb(self.n_in, self.n_tap)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.q * self.n_in / self.n_out


def _row(spec: XorSpec, rng: random.Random) -> tuple[int, ...]:
    """The inputs of one gate. Only `Random.random` is used: it alone is promised to stay the same."""
    draws = [rng.random() for _ in range(spec.n_in)]
    if spec.n_tap is not None:
        return tuple(sorted(sorted(range(spec.n_in), key=draws.__getitem__)[: spec.n_tap]))
    row = tuple(i for i, draw in enumerate(draws) if draw < 0.5)
    return row or _row(spec, rng)  # a gate without inputs would be a constant


def _covering(spec: XorSpec, rng: random.Random) -> list[tuple[int, ...]]:
    """Rows that reach every input once: the inputs in random order, dealt out `n_tap` (None: 2) at a time."""
    order = sorted(range(spec.n_in), key=[rng.random() for _ in range(spec.n_in)].__getitem__)
    size = spec.n_tap or min(2, spec.n_in)
    rows = [order[i : i + size] for i in range(0, spec.n_in, size)]
    rows[-1] += order[: size - len(rows[-1])]
    return [tuple(sorted(row)) for row in rows]


@cache
def wiring(spec: XorSpec, plane: int) -> tuple[tuple[int, ...], ...]:
    """The inputs of each of the `n_out` gates of a plane: the ones in each row of M."""
    rng = random.Random(spec.seed * 65536 + plane)
    rows = _covering(spec, rng) if spec.matrix == "covering" else []
    while len(rows) < spec.n_out:
        row = _row(spec, rng)
        if spec.matrix == "random" or rows.count(row) <= len(rows) // spec.possible:
            rows.append(row)
    return tuple(rows)


def rank(rows: Sequence[Sequence[int]]) -> int:
    """Rank over GF(2) of the matrix whose rows have ones at the given places."""
    basis: list[int] = []
    for row in rows:
        value = sum(1 << i for i in row)
        for b in basis:
            value = min(value, value ^ b)
        if value:
            basis.append(value)
    return len(basis)


def facts(spec: XorSpec) -> dict[str, Any]:
    """What the wiring is and can do, per plane.

    rank: over GF(2); duplicate_rows: gates that repeat another one (their weights are tied for ever); unused_inputs:
    stored bits that reach no gate; wiring: the inputs of each gate, as text.
    """
    planes = [wiring(spec, plane) for plane in range(spec.q)]
    return {
        "n_in": spec.n_in,
        "n_out": spec.n_out,
        "n_tap": spec.n_tap,
        "q": spec.q,
        "matrix": spec.matrix,
        "matrix_seed": spec.seed,
        "rank": [rank(rows) for rows in planes],
        "duplicate_rows": [len(rows) - len(set(rows)) for rows in planes],
        "unused_inputs": [spec.n_in - len({i for row in rows for i in row}) for rows in planes],
        "wiring": [" ".join("+".join(map(str, row)) for row in rows) for rows in planes],
    }


def _many(n_in: Any) -> bool:
    return isinstance(n_in, Sequence) and not isinstance(n_in, str)


def _derived(bits: float, n_out: int, q: int) -> int:
    """n_in = bits * n_out / q, or ValueError that names the nearest possible widths."""
    exact = bits * n_out / q
    if abs(exact - round(exact)) > 1e-6 or round(exact) < 1:
        near = sorted({min(n_out, max(1, n)) for n in (math.floor(exact), math.ceil(exact))})
        widths = " and ".join(f"{q * n / n_out:g} (n_in={n})" for n in near)
        raise ValueError(
            f"w_bits={bits:g} needs n_in = w_bits * n_out / q = {exact:.4g}, which must be a whole number; with "
            f"n_out={n_out} q={q} the nearest widths are {widths}"
        )
    return round(exact)


def make(
    bits: float,
    *,
    n_in: int | Sequence[int] | None = None,
    n_out: int = 20,
    n_tap: int | None = 2,
    q: int | None = None,
    matrix: str = "covering",
    seed: int = 0,
    stage: int | None = None,
) -> XorSpec:
    """The spec of one layer.

    q: None is the fewest planes that hold `bits`. n_in: None derives it from `bits`; a number must agree with `bits` to
    two decimals; a list holds one per stage of a ResNet, and `bits`, then their average, must lie among them.
    stage: which of the list (0, 1, 2).

    Errors: ValueError on a range, on `bits` that no whole n_in gives, and where `bits` and n_in disagree.
    """
    if not bits > 0:
        raise ValueError(f"w_bits must be above 0, got {bits!r}")
    _whole("n_out", n_out, 1)
    q = math.ceil(bits) if q is None else q
    _whole("q", q, 1)
    if n_in is None:
        return XorSpec(_derived(bits, n_out, q), n_out, n_tap, q, matrix, seed)
    listed: list[Any] = list(n_in) if _many(n_in) else [n_in]  # type: ignore[arg-type]
    if len(listed) != 1 and len(listed) != 3:
        raise ValueError(f"n_in must be a number or a list of three (layer1, layer2, layer3), got {listed}")
    specs = [XorSpec(n, n_out, n_tap, q, matrix, seed) for n in listed]
    lo, hi = min(s.bits for s in specs), max(s.bits for s in specs)
    if not lo - 0.005 <= bits <= hi + 0.005:
        found = f"{lo:g}" if lo == hi else f"{lo:g}..{hi:g}"
        raise ValueError(
            f"n_in={n_in} of n_out={n_out} with q={q} is {found} bits per weight, but w_bits={bits:g}; "
            f"say w_bits={hi:g}, or leave n_in out"
        )
    if len(specs) == 1:
        return specs[0]
    if stage is None:
        raise ValueError(
            f"n_in={listed} is one per stage, but a layer outside layer1, layer2 and layer3 is to be quantized"
        )
    return specs[stage]


def check(options: Mapping[str, Any], w_bits: float) -> list[XorSpec]:
    """The specs that a run with these `options` would use, for use before torch loads.

    Errors: ValueError saying what to change.
    """
    if options.get("layers", "all") not in LAYERS:
        raise ValueError(f"options.layers must be one of {', '.join(LAYERS)}, got {options['layers']!r}")
    known = {name: options[name] for name in ("n_in", "n_out", "n_tap", "q", "matrix") if name in options}
    try:
        stages = 3 if _many(known.get("n_in")) else 1
        specs = [make(w_bits, **known, seed=options.get("matrix_seed", 0), stage=i) for i in range(stages)]
    except ValueError as error:
        raise ValueError(f"{error}. (n_in, n_out, n_tap, q, matrix: options.n_in=... and so on.)") from error
    return specs
