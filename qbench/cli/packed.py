"""`qbench export RUN` and `qbench inspect FILE`."""

from collections.abc import Sequence
from pathlib import Path

from qbench.cli.overrides import parse
from qbench.config import allowed
from qbench.errors import UserError, unknown

FORMATS = ("packed",)
OPTIONS = ("format", "out", "allow")


def export(args: Sequence[str]) -> int:
    """Write the packed file of a finished run."""
    places = [a for a in args if "=" not in a or Path(a).is_dir()]
    if len(places) != 1:
        raise UserError(f"qbench export takes one run's folder, got {len(places)}")
    given = {o.key_or_group: o.value() for o in parse([a for a in args if a not in places])}
    if strange := [key for key in given if key not in OPTIONS]:
        raise unknown("option of qbench export", strange[0], OPTIONS)
    if (form := str(given.get("format", "packed"))) not in FORMATS:
        raise unknown("format", form, FORMATS)
    from qbench.training.finished import export as write

    out = Path(str(given["out"])).expanduser() if given.get("out") else None
    path = write(Path(places[0]), out, allowed.packages(_text(given.get("allow", ""))))
    print(f"{path}: {path.stat().st_size:,} bytes. qbench inspect shows it, qbench.load and qbench eval read it.")
    return 0


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def inspect(args: Sequence[str]) -> int:
    """Print what a packed file holds."""
    if len(args) != 1:
        raise UserError(f"qbench inspect takes one file, got {len(args)}")
    from qbench.lowbit import container, show

    print(show.text(container.read(Path(args[0]))))
    return 0
