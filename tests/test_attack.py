"""scripts/attack.py: what it damages, and that faults which are planted into qbench are counted."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import attack  # noqa: E402
from attacks import damage, files, judging, kills, options  # noqa: E402

from qbench import records  # noqa: E402
from qbench.config.kinds import Kind  # noqa: E402
from qbench.config.options import OPTIONS  # noqa: E402
from qbench.errors import UserError  # noqa: E402
from qbench.figures import report  # noqa: E402
from qbench.files import atomic_write  # noqa: E402
from qbench.records import read_json, read_result, sealed  # noqa: E402

WHOLE = sealed({"accuracy": 91.25, "name": "pact"})


class Counted(judging.Table):
    """The table, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Counter[str]] = {}

    def row(self, what: str, by: str, counts: Counter[str]) -> None:
        super().row(what, by, counts)
        self.rows[by] = counts


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "x.json").write_text(json.dumps(WHOLE))
    return tmp_path


def attacked(home: Path, monkeypatch: pytest.MonkeyPatch, reader: judging.Work, *ways: damage.Way) -> Counter[str]:
    monkeypatch.setattr(files, "targets", lambda _: {"x": files.Target("x.json", "it", [reader], ways or damage.JSON)})
    table = Counted()
    files.attack(home, home / "whole", 40, 5, set(), table)
    return table.rows["it"]


def checked() -> int:
    print(read_json(Path("x.json"), {"accuracy": float, "name": str}))
    return 0


def test_damage_that_is_refused_is_counted_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = attacked(home, monkeypatch, checked)
    assert counts["refused"] > 25
    assert counts["refused"] + counts["harmless"] == 40


def test_a_reader_that_compares_nothing_is_found_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "_checksum", lambda content: WHOLE["checksum"])
    counts = attacked(home, monkeypatch, checked, damage.flip, damage.json_field)
    assert counts["SILENT"] > 1
    assert "SILENT: x, seed 5, attack " in capsys.readouterr().err


def test_an_error_that_names_no_file_is_none_that_was_foreseen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless() -> int:
        try:
            return checked()
        except UserError:
            print("qbench: something is wrong", file=sys.stderr)
            return 2

    assert attacked(home, monkeypatch, careless)["SILENT"] > 25

    def raw() -> int:
        return int(json.loads(Path("x.json").read_text())["accuracy"] == 0)

    assert attacked(home, monkeypatch, raw, damage.cut)["TRACEBACK"] > 25


@pytest.mark.parametrize(
    ("status", "out", "err", "outcome"),
    [
        (0, "91 %, 3 s", "", "harmless"),
        (0, "92 %, 2 s", "", "SILENT"),
        (0, "92 %, 2 s", "reading x.json", "SILENT"),
        (0, "", "left out: x.json is corrupt", "refused"),
        (2, "", "qbench: x.json is corrupt", "refused"),
        (2, "", "qbench: it is corrupt", "SILENT"),
        (1, "", "qbench: unexpected KeyError: 'a'", "UNEXPECTED"),
        (2, "", "qbench: x.json: got an unexpected keyword", "refused"),
        (-14, "", "", "HANG"),
        (-11, "", "", "CRASH"),
    ],
)
def test_what_an_answer_comes_to(status: int, out: str, err: str, outcome: str) -> None:
    clean = judging.Said(0, "91 %, 2 s", "")
    assert judging.judged(Path("x.json"), clean, judging.Said(status, out, err)) == outcome


def test_a_command_that_never_ends_is_killed(tmp_path: Path) -> None:
    import time

    def endless() -> int:
        time.sleep(60)
        return 0

    said = judging.forked(endless, tmp_path / "copy", seconds=1)
    assert judging.broken(said) == "HANG"


def test_yaml_by_hand_must_show_in_what_comes_of_it() -> None:
    def said(text: str) -> judging.Said:
        return judging.Said(0, text, "")

    old, new = b"a: 1\nb: x\n", b"a: 2.5\nb: x\n"
    assert files.by_hand(old, new, said("a=1"), said("a=2.5")) == "as asked"
    assert files.by_hand(old, new, said("a=1"), said("a=2")) == "SILENT"
    assert files.by_hand(old, b"a: 1\nb: x # c\n", said("a=1"), said("a=1")) == "harmless"
    assert files.other_data(b"", b"", said("key1 pixels1"), said("key1 pixels2")) == "SILENT"
    assert files.other_data(b"", b"", said("key1 pixels1"), said("key2 pixels2")) == "as asked"


# Kills.


def in_pieces() -> int:
    """A result that is not written whole: a kill in between leaves half of it, and it counts as done."""
    path = Path("done.txt")
    if not path.exists():
        with path.open("w") as file:
            file.write("half ")
            file.flush()
            Path("log.txt").write_text("on the way")
            file.write("and half")
    return 0


def whole() -> int:
    if not Path("done.txt").exists():
        atomic_write("done.txt", "half and half")
    return 0


@pytest.mark.parametrize(("work", "fault"), [(in_pieces, True), (whole, False)], ids=["in pieces", "whole"])
def test_a_half_result_is_counted(work: judging.Work, fault: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = kills.Scene(work, lambda: Path("done.txt").read_text())
    monkeypatch.setattr(kills, "scenes", lambda: {"x": scene})
    table = Counted()
    kills.attack(home, home / "whole", 12, 1, set(), table)
    kinds = table.rows["killed before an operation on a file"]
    assert (kinds["SILENT"] > 0) is fault
    assert kinds["harmless"] > 0
    if not fault:
        assert not any(counts[bad] for counts in table.rows.values() for bad in judging.BAD)
        assert table.rows["disk full at an operation on a file"]["refused"] > 0


# Options.


def test_an_option_that_is_not_checked_is_found_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(chance: random.Random, copy: Path) -> options.Wrong:
        return options.Wrong((*options.RUNS, "checkpoint_seconds=-1"), "checkpoint_seconds", "-1", True)

    def outcome() -> str:
        wrong = drawn(random.Random(0), home)
        return options.judged(wrong, judging.forked(lambda: options.command.main(list(wrong.words)), home / "copy"))

    assert outcome() == "refused"
    unchecked = Kind("a number of at least 0", lambda x: True)
    monkeypatch.setitem(OPTIONS, "checkpoint_seconds", unchecked)
    assert outcome() == "SILENT"


def test_a_value_that_is_taken_must_stand_in_the_plan() -> None:
    plan = "name: null\nw_bits: 4\na_bits: 4\nseed: 3\ntrain:\n  lr: 0.5\n\nweights  x\n"
    for name, value, right in (
        ("seed", "3", True),
        ("seed", "4", False),
        ("train.lr", "5e-1", True),
        ("bits", "8", False),
    ):
        assert options.followed(options.Wrong((), name, value, False), plan) is right


def test_what_is_drawn_is_wrong_by_the_words_of_its_option() -> None:
    drawn = [options.number_of(random.Random(i), "a number in 0..1, 1 excluded") for i in range(50)]
    assert all(sure and not 0 <= float(value) < 1 for value, sure in drawn)
    assert options.number_of(random.Random(0), "a whole number of at least 1")[0] in ("0", "-1e+09")
    seen = [options.run(random.Random(i), Path()) for i in range(60)]
    assert len({w.name for w in seen}) > 30
    assert 20 < sum(w.sure for w in seen) < 60
    assert options.run(random.Random(3), Path()) == options.run(random.Random(3), Path()), "seeded"


def test_a_damaged_result_of_old_is_refused_by_name_or_shown(tmp_path: Path) -> None:
    """1,000 mutations of a result.json that vouches for nothing: never another error."""
    source, *_ = sorted((ROOT / "docs" / "results").rglob("result.json"))
    content, path = source.read_bytes(), tmp_path / "result.json"
    assert "checksum" not in json.loads(content)
    refused = shown = 0
    for seed in range(1000):
        way = (damage.json_field, damage.flip, damage.cut, damage.take_out)[seed % 4]
        new, _ = way(content, random.Random(seed))
        assert new is not None
        path.write_bytes(new)
        try:
            result = read_result(path)
        except UserError as error:
            refused += str(path) in str(error)
            continue
        shown += 1
        report.table([{**result, "folder": "x"}])
        report.tell(tmp_path, result, str)
    assert refused + shown == 1000
    assert shown > 100
    assert refused > 300


@pytest.mark.slow
def test_attacks_come_to_nothing() -> None:
    assert attack.attack_all(attacks=4, seed=1, only=set()) == 0
