"""Cards compose; a study reuses what is done, notes failures and loses nothing; pages come from the JSON alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure

from qbench.cli.overrides import resolve_row
from qbench.config import catalog, source
from qbench.config.source import code_hash
from qbench.errors import UserError
from qbench.files import locked
from qbench.papers import cards, pages, plots, study
from qbench.papers.cards import Card, Claim, Row
from qbench.papers.cells import cells as cells_of
from qbench.papers.cells import noise, title, verdict
from qbench.papers.results import RESULTS, Kept, key_of, progress, read, split_of
from qbench.papers.setups import setup
from qbench.records import opened, sealed
from qbench.training import interrupt

ROOT = Path(__file__).resolve().parents[2]
CARDS = cards.names()
DOCS = ROOT / "docs" / "results"
TOY: dict[str, Any] = {
    "title": "Toy Table 1",
    "paper": "Toy",
    "arxiv": "0000.00000",
    "where": "Table 1",
    "metric": "accuracy",
    "report": "last",
    "tolerance": 0.5,
    "protocol": ["two rows"],
    "cost": {"cpu": "seconds", "gpu": "none"},
    "source": "Table 1",
    "run": "model=tiny dataset=synthetic",
    "rows": [
        {"id": "float", "run": "method=float", "published": 92.0},
        {"id": "pact", "run": "method=pact bits=4", "published": 91.0, "baseline": "float"},
        {"id": "dorefa", "run": "method=dorefa bits=4", "published": 90.0, "baseline": "float"},
    ],
}


def toy(tmp_path: Path, **changes: Any) -> Card:
    """The toy card with fields changed; None takes one away."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**TOY, **changes}.items() if v is not None}, sort_keys=False))
    return cards.read(path)


def entry(row: str, last: float, budget: str = "paper", seed: int = 0, **more: Any) -> dict[str, Any]:
    base = {"row": row, "seed": seed, "budget": budget, "key": f"{row}{seed}", "earlier": False, "epochs": 3}
    base |= {"data": {"name": "cifar10", "checksum": "0", "augment": "none"}, "split": {}, "bytes": 1, "seconds": 1.0}
    base |= {"w_bits": 4, "a_bits": 4, "bits_per_weight": 4.0}
    return {**base, "accuracy_last": last, "accuracy_best": last + 1, **more}


def alike(row: Row, budget: str) -> dict[str, dict[str, Any]]:
    """The setup of every row where the rows differ in nothing."""
    return {part: {"": "the same"} for part in cards.PARTS}


# The cards in conf/paper.


@pytest.mark.parametrize("name", CARDS)
def test_every_row_of_every_card_composes(name: str) -> None:
    card = cards.load(name)
    for row in card.runs:
        for budget in ("paper", "short"):
            try:
                config = resolve_row(study.words_of(row, budget))
            except UserError as error:
                pytest.fail(f"{name}, row {row.id}, budget {budget}: {error}")
            assert config["init"] in ("float", "scratch")


def test_the_cards_are_there_and_say_where_their_numbers_are_from() -> None:
    assert {"flexor_table1", "flexor_fig5", "pact_table1", "onebit_resnet20", "twn_table2_cifar10"} <= set(CARDS)
    for card in map(cards.load, CARDS):
        assert card.protocol, card.name
        assert re.search("estimate|measured", card.cost["cpu"]), card.name
        assert re.search("estimate|measured", card.cost["gpu"]), card.name
        for row in card.rows:
            low, high = (0, 50) if card.metric == "error" else (10, 100)
            assert row.published is None or low < row.published < high, row.id
            if "memory" in row.source:
                assert row.level == "memory" or "that it is" in row.source, f"{card.name}: {row.id}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": None}, "'float' has a published number and no source"),
        ({"rows": [TOY["rows"][0], TOY["rows"][0]]}, "'float' stands twice"),
        ({"rows": [{**TOY["rows"][0], "level": "seen"}]}, "unknown level of row 'float' 'seen'"),
        ({"rows": [{**TOY["rows"][0], "lable": "x"}]}, "Did you mean 'label'"),
        ({"rows": [TOY["rows"][1]]}, "unknown baseline of row 'pact' 'float'"),
        ({"rows": [{"id": "a"}]}, "'a' has neither a run nor a published number"),
        ({"rows": [{"run": "method=pact"}]}, "needs an id"),
        ({"rows": []}, "needs rows"),
        ({"tolerance": None}, "'tolerance' is missing"),
        ({"metric": "loss"}, "unknown metric 'loss'"),
        ({"report": "first"}, "unknown report 'first'"),
        ({"cost": {"cpu": "x"}}, "'gpu'"),
        ({"claims": [{"text": "t", "order": ["pact", "lsq"]}]}, "unknown row in a claim 'lsq'"),
        ({"published": "none"}, "published: none"),
        ({"rows": [{"id": "a", "run": "method=pact"}]}, "published: none"),
        ({"rows": [{"id": "a", "run": "method=pact"}], "published": "none"}, "needs claims"),
        ({"figure": {"kind": "pie"}}, "unknown figure kind 'pie'"),
        ({"figure": {"kind": "points"}}, "xlabel"),
        ({"figure": {"kind": "points", "xlabel": "bits"}}, "'pact' has no x"),
        ({"figures": {}}, "Did you mean 'figure'"),
        (
            {"protocol": [{"The rate is ours": 0.1}]},
            "protocol, entry 1 must be text, got {'The rate is ours': 0.1}; in YAML",
        ),
        ({"protocol": "one text"}, "protocol must be a list of texts, got 'one text'"),
        ({"title": {"Toy": "Table 1"}}, "title must be text"),
        ({"figure": {"xlabel": {"bits": "w"}}}, "figure.xlabel must be text"),
        ({"cost": {"cpu": {"short": "1 h"}, "gpu": "x"}}, "cost.cpu must be text"),
        ({"source": ["Table 1"]}, "source must be text"),
        ({"rows": [{**TOY["rows"][0], "note": {"not of the paper": "ours"}}]}, "note of row 'float' must be text"),
        ({"rows": [{**TOY["rows"][0], "label": True}]}, "label of row 'float' must be text, got True"),
        ({"rows": [{**TOY["rows"][0], "run": ["method=float"]}]}, "run of row 'float' must be text"),
        ({"rows": [{**TOY["rows"][0], "id": {"a": "b"}}]}, "id of a row must be text"),
        ({"claims": [{"text": {"a": "b"}, "order": ["float"]}]}, "text of a claim must be text"),
        ({"claims": [{"text": "t", "order": "float"}]}, "order of the claim 't' must be a list"),
        ({"claims": [{"text": "t", "order": ["float"], "abuot": ["net"]}]}, "Did you mean 'about'"),
        ({"claims": [{"text": "t", "order": ["float"], "about": ["nets"]}]}, "Did you mean 'net'"),
    ],
)
def test_what_is_wrong_with_a_card_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^toy\.yaml: ") as caught:
        toy(tmp_path, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["method=pcat", "model=resnet21", "dataset=cifra10", "options.alpah=1"])
def test_a_name_that_does_not_exist_is_named_with_card_and_row(word: str, tmp_path: Path) -> None:
    card = toy(tmp_path, rows=[{"id": "a", "run": f"method=pact {word}", "published": 1.0}])
    with pytest.raises(UserError, match=r"^toy, row 'a': .*Did you mean"):
        study.Study(card, study.Ask(results=tmp_path), resolve_row).config(card.rows[0], "paper")


def test_rows_are_products_and_words_of_the_row_win(tmp_path: Path) -> None:
    rows = [
        {"id": "f", "run": "method=float"},
        {
            "over": {"depth": [20, 32], "bits": [1.0, 0.4]},
            "id": "{depth}-{bits}",
            "run": "method=flexor model=resnet{depth} bits={bits}",
            "paper": "train.epochs=5 train.milestones=[1,2]",
            "x": "{bits}",
            "published": {"20-1.0": 90.0, "32-0.4": 89.0},
        },
    ]
    card = toy(tmp_path, rows=rows, paper_run="train.epochs=9 train.lr=0.1")
    assert [r.id for r in card.rows] == ["f", "20-1.0", "20-0.4", "32-1.0", "32-0.4"]
    row = card.row("32-0.4")
    assert (row.published, row.x) == (89.0, 0.4)
    assert card.row("20-0.4").published is None
    short = ["model=resnet32", "dataset=synthetic", "method=flexor", "bits=0.4"]
    assert study.words_of(row, "short") == [*short, "budget=short"]
    paper = ["train.epochs=5", "train.lr=0.1", "train.milestones=[1,2]"]
    assert study.words_of(row, "paper") == [*short, *paper, "budget=paper"]
    trial = study.trial_words(row)
    assert {"model.depth=8", "dataset=synthetic", "budget=smoke"} <= set(trial)


# Runs are known by their key.


@pytest.mark.parametrize(
    "words",
    [
        ("method=pact", "bits=4"),
        ("method=flexor", "bits=0.8", "seed=1"),
        ("method=float",),
        ("method=xnor", "distill.weight=1"),
        ("method=pact", "distill.weight=1"),
        ("method=pact", "dataset.val=16"),
        ("method=pact", "dataset.preprocess=gcn_zca"),
        ("method=pact", "dataset.val=16", "dataset.val_seed=3", "dataset.noise=0.5", "dataset.mean=[0.1,0.2,0.3]"),
    ],
)
def test_the_key_is_that_of_the_run(words: tuple[str, ...]) -> None:
    from qbench.training.run import prepare

    config = resolve_row(["model=tiny", "dataset=synthetic", "budget=smoke", *words])
    run = prepare(config)
    split = split_of(config["dataset"])
    assert key_of(config, run.identity["data"], split) == run.key
    assert key_of(config, {**run.identity["data"], "name": "mnist"}, split) is None
    other = "standard" if config["dataset"]["preprocess"] == "gcn_zca" else "gcn_zca"
    assert key_of(config, {**run.identity["data"], "preprocess": other}, split) is None
    assert key_of(config, run.identity["data"], {**split, "val": 7}) is None
    assert key_of(config, run.identity["data"], {**split, "val_seed": 7}) is None
    assert key_of({**config, "dataset": {**config["dataset"], "mean": [9.0]}}, run.identity["data"], split) is None
    assert key_of({**config, "seed": 9}, run.identity["data"], split) != run.key


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Kept]]:
    """go(card, **ask): a study of the card with budget=smoke; returns its status and results.json."""
    monkeypatch.chdir(tmp_path)

    def call(card: Card, only: tuple[str, ...] = (), **more: Any) -> tuple[int, Kept]:
        places = ("tensorboard=false", "device=cpu")
        ask = study.Ask(budget="smoke", only="given", out="o", results=Path("r"), places=places, **more)
        rows = [r for r in card.runs if r.id in only or not only]
        return study.Study(card, ask, resolve_row).do(rows), read(Path("r") / card.name)

    return call


def test_a_study_runs_once_and_outlives_its_outputs(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = toy(tmp_path)
    status, kept = go(card, only=("pact",))
    assert (status, [e["row"] for e in kept.entries]) == (0, ["pact"])
    status, kept = go(card)  # continued; the float net was trained as a parent before
    assert (status, sorted(e["row"] for e in kept.entries)) == (0, ["dorefa", "float", "pact"])
    assert len(list(Path("o").glob("*/result.json"))) == 3
    assert "float seed 0: done before" in capsys.readouterr().out
    shutil.rmtree("o")
    before = (Path("r") / "toy" / RESULTS).read_text()
    status, _ = go(card)
    assert status == 0
    assert not Path("o").exists()
    assert (Path("r") / "toy" / RESULTS).read_text() == before
    assert capsys.readouterr().out.count("done before") == 3
    text = before + (Path("r") / "toy" / "table.md").read_text()
    assert str(tmp_path) not in text
    assert "# Trial on narrow nets and synthetic data for Toy Table 1" in text
    assert "holds" not in text
    for name in ("table.md", "table.csv", "figure.png", "figure.pdf"):
        assert (Path("r") / "toy" / name).stat().st_size > 100


def test_what_other_code_computed_is_told(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = toy(tmp_path)
    _, kept = go(card, only=("pact",))
    path = Path("r") / "toy" / RESULTS
    path.write_text(Kept([{**kept.entries[0], "code": "0123456789"}]).text())
    shutil.rmtree("o")
    go(card, only=("pact",), seeds=(0, 1))
    assert "pact seed 0: done before, by other code" in capsys.readouterr().out
    page = (Path("r") / "toy" / "table.md").read_text()
    assert "`method=pact`, computed by 2 versions of the code: `0123456789` pact, seed 0; `" in page


def test_code_is_known_without_comments_and_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    texts = (
        "def f(x):\n    return x",
        '"""Of f."""\n\ndef f(x):  # f\n    "f"\n    return (x)',
        "def f(x):\n    return -x",
    )
    hashes = []
    for i, text in enumerate(texts):
        (tmp_path / f"part{i}.py").write_text(text)
        hashes.append(code_hash({"method": {"_target_": f"part{i}.f"}, "model": {}}))
    assert hashes[0] == hashes[1] != hashes[2]


def test_code_of_ones_own_counts_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_pack").mkdir()
    files = {
        "own_pack/__init__.py": "",
        "own_pack/method.py": "import torch\nfrom . import near\nfrom .f import g\nimport own_flat",
        "own_pack/near.py": "x = 1",
        "own_pack/f.py": "def g():\n    import own_deep\n    return own_deep",
        "own_flat.py": "x = 1",
        "own_deep.py": "x = 1",
        "own_rule.py": "x = 1",
        "own_other.py": "x = 1",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = {"method": {"_target_": "own_pack.method.Q"}, "model": {}, "train": {"optimizer": "own_rule.Rule"}}
    before = code_hash(config)
    changed = []
    for name in files:
        (tmp_path / name).write_text(f"{files[name]}\ny = 2\n")
        source._code.cache_clear()
        changed += [name] if code_hash(config) != before else []
        (tmp_path / name).write_text(files[name])
    source._code.cache_clear()
    assert code_hash(config) == before
    assert changed == [n for n in files if n != "own_other.py"]


def test_a_card_that_is_not_whole_stands_in_the_way_of_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(catalog.conf_folder() / "paper", conf / "paper")
    (conf / "paper" / "half.yaml").write_text("title: half\nrows: [{id: a, run: 3}]\nclaims: [x]\n")
    monkeypatch.setattr(catalog, "conf_folder", lambda: conf)
    assert "pact_table1" in pages.index(tmp_path, alike)
    assert "pact_table1" in pages.listing()
    assert "left out: half.yaml: the field" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"claims": [3]}, {"claims": [{"text": "x"}]}, {"tolerance": "half"}])
def test_a_wrong_field_names_the_card(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"toy\.yaml: .*CONTRIBUTING"):
        toy(tmp_path, **change)


def test_a_run_of_another_study_counts_and_draw_runs_nothing(go: Callable[..., Any], tmp_path: Path) -> None:
    go(toy(tmp_path), only=("dorefa",))
    other = {"id": "same", "run": "method=dorefa bits=4", "published": 1.0}
    (tmp_path / "again").mkdir()
    card = toy(tmp_path / "again", rows=[other, {"id": "new", "run": "method=lsq bits=4", "published": 1.0}])
    _, kept = go(card, draw=True)
    assert [e["row"] for e in kept.entries if e["row"] != "dorefa"] == ["same"]


def test_what_was_run_here_again_counts_before_what_is_committed(go: Callable[..., Any], tmp_path: Path) -> None:
    card = toy(tmp_path)
    _, kept = go(card, only=("pact",))
    (run,) = Path("o").glob("pact-*")
    committed = shutil.copytree(run, Path("r") / "first" / run.name) / "result.json"
    committed.write_text(json.dumps(sealed({**json.loads(committed.read_text()), "accuracy_last": 1.0})))
    for _ in range(2):
        _, again = go(card, only=("pact",), draw=True)
        assert again.entries == kept.entries


def test_what_fails_is_noted_and_the_rest_is_drawn(go: Callable[..., Any], tmp_path: Path) -> None:
    bad = {"id": "bad", "run": "method=flexor bits=0.47 options.n_in=[19,16,7]", "published": 80.0}
    card = toy(tmp_path, rows=[bad, *TOY["rows"]])
    status, kept = go(card, only=("bad", "float"))
    assert status == 1
    assert [e["row"] for e in kept.entries] == ["float"]
    assert list(kept.failed) == ["bad, seed 0, budget smoke"]
    page = (Path("r") / "toy" / "table.md").read_text()
    assert "one per stage" in page
    states = {c.row.id: c.status for c in cells_of(card, kept, "smoke")}
    assert states == {"bad": "failed", "float": "trial", "pact": "not run", "dorefa": "not run"}


@pytest.mark.parametrize("value", [float("nan"), 10**400, "9" * 400, True, "high"])
@pytest.mark.parametrize("field", ["tolerance", "published"])
def test_a_number_of_a_card_is_one(tmp_path: Path, field: str, value: Any) -> None:
    rows = [{"id": "a", "run": "method=float", "published": 92.0 if field == "tolerance" else value}]
    changes = {"rows": rows, "claims": None} | ({"tolerance": value} if field == "tolerance" else {})
    with pytest.raises(UserError, match=f"{field} must be a number"):
        toy(tmp_path, **changes)


def test_a_time_limit_is_that_of_all_cards_and_the_command_goes_on(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = toy(tmp_path)
    monkeypatch.setattr(cards, "load", lambda name: card)
    words = ("paper", "toy", "budget=smoke", "out=o", "results=r", "tensorboard=false", "device=cpu")
    said = cli(*words, "time_limit=0.1s")
    assert said.status == 124, said.err
    assert "qbench: out of time; what is done is kept, see r/toy" in said.err
    assert "QBENCH_DEADLINE" not in os.environ
    late = iter([False])  # over while the first run is at work
    with monkeypatch.context() as patched:
        patched.setattr(interrupt, "out_of_time", lambda: next(late, True))
        assert cli(*words).status == 124
    assert len(list(tmp_path.glob("o/*/checkpoint.pt"))) == 1
    said = cli(*words)
    assert said.status == 0, said.err
    assert "resumed at step 1" in said.out
    said = cli(*words, "time_limit=8x")
    assert (said.status, "time_limit must be a time such as 90s" in said.err) == (2, True)


def test_a_card_may_name_a_package_that_is_allowed(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text("from torch.optim import SGD\nclass Own(SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"id": "a", "run": "method=float parent.optimizer=theirs.Own", "published": 92.0}]
    card = toy(tmp_path, rows=rows, claims=None)
    monkeypatch.setattr(cards, "load", lambda name: card)
    words = ("paper", "toy", "budget=smoke", "out=o", "plan=true")
    said = cli(*words)
    assert (said.status, "allow=theirs behind qbench eval or qbench paper" in said.err) == (2, True)
    said = cli(*words, "allow=theirs")
    assert said.status == 0, said.err
    said = cli(*words, "allow=other,a-b")
    assert (said.status, "allow must be the name of a package" in said.err) == (2, True)


def test_stopped_by_the_user(go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qbench.training.execute
    from qbench.training.interrupt import Interrupted

    def stop(*_: Any) -> dict[str, Any]:
        raise Interrupted("stopped")

    card = toy(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(qbench.training.execute, "execute", stop)
        assert go(card)[0] == 130
    assert not (Path("r") / "toy").exists()  # nothing is done, and nothing is left
    go(card, only=("float",))
    monkeypatch.setattr(qbench.training.execute, "execute", stop)
    status, kept = go(card)
    assert status == 130
    assert [e["row"] for e in kept.entries] == ["float"]
    assert not kept.failed


def test_no_entry_is_ever_lost(go: Callable[..., Any], tmp_path: Path) -> None:
    card = toy(tmp_path)
    _, kept = go(card, only=("pact",))
    path = Path("r") / "toy" / RESULTS
    old = {**kept.entries[0], "key": "0123456789", "accuracy_last": 1.0}
    gone = {**old, "row": "a row that was renamed"}
    path.write_text(Kept([*kept.entries, old, gone]).text())
    _, kept = go(card, only=("pact",), draw=True)
    assert {(e["row"], e["key"], e["earlier"]) for e in kept.entries} == {
        ("pact", old["key"], True),
        (gone["row"], old["key"], False),
        ("pact", next(e["key"] for e in kept.entries if not e["earlier"] and e["row"] == "pact"), False),
    }
    (shown,) = kept.of(card.row("pact"), "smoke")
    assert shown["accuracy_last"] != 1.0
    path.write_text(Kept([old]).text())
    shutil.rmtree("o")
    _, kept = go(card, only=("pact",), draw=True)
    assert "†" in (Path("r") / "toy" / "table.md").read_text()
    path.write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        go(card, draw=True)


def test_two_studies_that_write_the_same_file_keep_both(tmp_path: Path) -> None:
    one, other = Kept([entry("a", 1.0)]), Kept([entry("b", 2.0), entry("a", 3.0)])
    one.merge(other)
    assert sorted((e["row"], e["accuracy_last"]) for e in one.entries) == [("a", 1.0), ("b", 2.0)]
    text = one.text()
    assert opened(json.loads(text)) == {"runs": one.entries[::-1], "failed": {}}
    assert Kept(one.entries[::-1]).text() == text


def test_a_failure_counts_until_the_run_is_done() -> None:
    one, other = Kept([entry("a", 1.0)]), Kept()
    other.note("a", 0, "paper", "was mended since")
    other.note("b", 0, "paper", "is not")
    one.merge(other)
    assert one.failed == {"b, seed 0, budget paper": "is not"}
    one.add(entry("b", 2.0))
    assert not one.failed


def test_a_study_waits_for_another_that_writes(tmp_path: Path) -> None:
    mine = study.Study(toy(tmp_path), study.Ask(out=str(tmp_path / "o"), results=tmp_path / "r"), resolve_row)
    mine.kept.add(entry("float", 1.0))
    mine.folder.mkdir(parents=True)
    with locked(mine.folder / ".lock"):
        writer = threading.Thread(target=mine.save)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        (mine.folder / RESULTS).write_text(Kept([entry("pact", 2.0)]).text())
    writer.join()
    assert {e["row"] for e in read(mine.folder).entries} == {"float", "pact"}


# What comes out.


def test_status_gap_and_drop(tmp_path: Path) -> None:
    rows = [
        *TOY["rows"],
        {"id": "told", "run": "method=lsq", "published": 91.0, "level": "memory", "source": "memory"},
        {"id": "other", "run": "method=lsq bits=2", "published": 91.0, "differs": "another net"},
        {"id": "silent", "run": "method=lsq bits=3"},
        {"id": "theirs", "published": 91.5},
        {"id": "open", "run": "method=lsq bits=5", "published": 91.0},
    ]
    card = toy(tmp_path, rows=rows)
    values = {"float": 91.8, "pact": 90.5, "dorefa": 89.4, "told": 91.0, "other": 91.0, "silent": 91.0}
    kept = Kept([entry(k, v) for k, v in values.items()])
    kept.note("open", 0, "paper", "no memory")
    found = {c.row.id: c for c in cells_of(card, kept, "paper")}
    assert {k: c.status for k, c in found.items()} == {
        "float": "match", "pact": "match", "dorefa": "gap", "told": "unconfirmed", "other": "protocol differs",
        "silent": "no number", "theirs": "comparison", "open": "failed",
    }  # fmt: skip
    pact = found["pact"]
    assert pact.gap == pytest.approx(-0.5)
    assert pact.drop == pytest.approx(1.0)
    assert pact.own == pytest.approx(91.8 - 90.5)
    short = Kept([entry("pact", 91.0, "short", float_accuracy=91.3)])
    (cell,) = [c for c in cells_of(card, short, "short") if c.row.id == "pact"]
    assert (cell.status, cell.gap) == ("protocol differs", 0.0)  # a short budget is never a match
    assert cell.own == pytest.approx(0.3)


def test_a_trial_is_compared_with_nothing(tmp_path: Path) -> None:
    card = toy(tmp_path, claims=[{"text": "in this order", "order": ["float", "pact"]}])
    kept = Kept([entry("float", 12.0, "smoke"), entry("pact", 11.0, "smoke")])
    found = {c.row.id: c for c in cells_of(card, kept, "smoke")}
    assert {k: (c.status, c.gap) for k, c in found.items()} == {
        "float": ("trial", None), "pact": ("trial", None), "dorefa": ("not run", None),
    }  # fmt: skip
    assert verdict(card, card.claims[0], list(found.values()), alike) == "a trial decides nothing"
    assert "## budget=smoke: trial on narrow nets and synthetic data" in pages.page(card, kept, alike)
    assert title(card, ["short", "smoke"]) == "Toy Table 1"
    assert plots._heading("smoke", [found["pact"]]).startswith("budget smoke (trial on narrow nets")


def test_one_evaluation_alone_is_a_mark_above_its_epoch(tmp_path: Path) -> None:
    card = toy(tmp_path, figure={"kind": "curves"})
    early, late = ({"epoch": e, "test_accuracy": a} for e, a in (([0.75], [12.0]), ([1.0, 2.0], [9.0, 11.0])))
    kept = Kept([entry("float", 12.0, course=early), entry("pact", 11.0, course=late)])
    one, two = cells_of(card, kept, "paper")[:2]
    axes = Figure().subplots()
    plots._curves(axes, card, [replace(one, row=replace(one.row, published=None))])
    assert axes.lines[0].get_marker() == "o"
    assert axes.get_xticks().tolist() == [0.75]
    axes = Figure().subplots()
    plots._curves(axes, card, [two])
    assert axes.lines[0].get_marker() == "None"
    assert two.row.published
    lo, hi = axes.get_ylim()
    assert lo < 11.0 < two.row.published < hi, "the curve and the published mark are both in view"
    assert axes.get_xlabel() == "epoch"


def test_a_legend_names_each_group_once(tmp_path: Path) -> None:
    rows = [
        {"id": f"{group}{x}", "run": f"method={group} bits={x}", "published": 90.0, "x": x, "group": group}
        for group in ("pact", "dorefa")
        for x in (2, 3)
    ]
    card = toy(tmp_path, rows=rows, figure={"kind": "points", "xlabel": "bits"})
    axes = Figure().subplots()
    plots._points(axes, card, cells_of(card, Kept([entry("pact2", 89.0), entry("dorefa2", 88.0)]), "paper"))
    handles = {str(t): h for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    assert len(handles) == 4
    keys = plots._keys(handles)
    assert list(keys) == ["pact", "dorefa", "published", "ours"]
    assert keys["pact"].get_color() != keys["dorefa"].get_color()
    one = {k: h for k, h in handles.items() if k.startswith("pact")}
    assert list(plots._keys(one)) == ["pact, published", "pact, ours"]


def test_the_heading_tells_of_the_runs_that_are_shown(tmp_path: Path) -> None:
    card = toy(tmp_path, figure={"kind": "drops"})
    kept = Kept([entry("float", 90.0, "short")])
    assert not plots._ran(card, cells_of(card, kept, "short"))
    assert plots._heading("short", []) == "published; not run yet"
    kept.add(entry("pact", 89.0, "short"))
    shown = plots._ran(card, cells_of(card, kept, "short"))
    assert [c.row.id for c in shown] == ["pact"]
    assert plots._heading("short", shown) == "budget short, 3 epochs, 1 seed"


def test_errors_seeds_and_epochs(tmp_path: Path) -> None:
    rows = [{"id": "a", "run": "method=pact", "published": 8.5}]
    card = toy(tmp_path, metric="error", report="best", rows=rows)
    kept = Kept([entry("a", v, seed=s) for s, v in enumerate((90.0, 90.5, 91.0))])
    (cell,) = cells_of(card, kept, "paper")
    assert (cell.ours, cell.spread, cell.status) == (91.5, 0.5, "match")
    page = pages.page(card, kept, alike)
    assert "8.50 ± 0.50 (3 seeds)" in page
    assert "ours, best test epoch (error %)" in page
    card = toy(tmp_path, metric="error", report="val", rows=rows)
    split, whole = entry("a", 90.0, accuracy_at_best_val=91.4), entry("a", 90.0, seed=1)
    for runs, gap, epoch in (
        ([split], -0.1, "best validation epoch"),
        ([whole], -1.5, "last epoch"),
        ([split, whole], -0.8, "best validation epoch or last"),
    ):
        found = cells_of(card, Kept(runs), "paper")
        assert found[0].gap == pytest.approx(gap)
        assert pages.grid(card, found)[0][2] == f"ours, {epoch} (error %)"


def test_a_row_of_another_source_is_set_against_that_sources_float_net(tmp_path: Path) -> None:
    rows = [
        {"id": "float", "run": "method=float", "published": 92.0},
        {"id": "a", "run": "method=pact", "published": 90.0, "baseline": "float"},
        {"id": "b", "published": 90.0, "baseline": "float", "published_float": 91.0, "source": "B", "level": "memory"},
    ]
    card = toy(tmp_path, rows=rows)
    assert [c.drop for c in cells_of(card, Kept(), "paper")] == [None, 2.0, 1.0]
    assert pages.page(card, Kept(), alike).endswith("## Sources\n\n- Table 1 (primary)\n- B (memory)\n")


def test_the_course_of_a_run_is_kept_by_evaluation(tmp_path: Path) -> None:
    """The training since the evaluation before, on average; telemetry as the mean over the layers that have it."""
    records = [
        {"step": 0, "epoch": 0.0, "telemetry": {"a": {"entropy": 1.0}}},
        {"step": 1, "epoch": 0.5, "phase": "train", "loss": 3.0, "accuracy": 10.0, "lr": 0.1},
        {"step": 2, "epoch": 1.0, "phase": "train", "loss": 2.0, "accuracy": 20.0, "lr": 0.05},
        {"step": 2, "epoch": 1.0, "phase": "test", "loss": 1.23456, "accuracy": 33.3333},
        {"step": 2, "epoch": 1.0, "telemetry": {"a": {"flips": 0.2, "entropy": 1.0}, "b": {"entropy": 0.5}}},
        {"step": 4, "epoch": 2.0, "phase": "test", "loss": 1.0, "accuracy": 40.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 5, "ep')
    assert progress(toy(tmp_path), tmp_path) == {
        "course": {
            "epoch": [1.0, 2.0], "test_accuracy": [33.33, 40.0], "test_loss": [1.235, 1.0],
            "train_accuracy": [15.0, None], "train_loss": [2.5, None], "lr": [0.05, None],
            "flips": [0.2, None], "entropy": [0.75, None],
        }
    }  # fmt: skip
    assert progress(toy(tmp_path), tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"float": 92.0, "pact": 91.0, "dorefa": 90.0}, "holds"),
        ({"float": 92.0, "pact": 91.0}, "not run yet"),
        # two standard errors: 2 * sqrt(92 * 8 / 10000 + 91.8 * 8.2 / 10000) = 0.772
        (
            {"float": 92.0, "pact": 91.8, "dorefa": 90.0},
            "undecided: float and pact are 0.20 points apart, noise is taken as 0.77",
        ),
        ({"float": 92.0, "pact": 90.0, "dorefa": 91.0}, "does not hold: dorefa is 1.00 points above pact"),
    ],
)
def test_claims(values: dict[str, float], said: str, tmp_path: Path) -> None:
    claim = {"text": "in this order", "order": ["float", "pact", "dorefa"]}
    card = toy(tmp_path, claims=[claim])
    kept = Kept([entry(k, v) for k, v in values.items()])
    found = cells_of(card, kept, "paper")
    assert verdict(card, Claim(claim["text"], tuple(claim["order"])), found, alike).startswith(said)
    assert f"in this order: **{said}" in pages.page(card, kept, alike)


def test_noise_is_that_of_the_test_images_or_the_cards(tmp_path: Path) -> None:
    """0.37 points between two runs of 85 % on 10,000 images decide nothing."""
    card = toy(tmp_path)
    for images, expected in (("cifar10", 1.00), ("imagenet", 0.45)):
        kept = Kept([entry(k, v, data={"name": images}) for k, v in (("float", 85.55), ("pact", 85.18))])
        a, b = cells_of(card, kept, "paper")[:2]
        assert noise(card, a, b) == pytest.approx(expected, abs=0.005)
        assert noise(replace(card, noise=1.5), a, b) == 1.5


def setups_of(**words: tuple[str, ...]) -> Callable[[Row, str], Any]:
    """The setups of the toy's rows with `words` added to the row of that name."""
    return lambda row, budget: setup(resolve_row([*study.words_of(row, budget), *words.get(row.id, ())]))


@pytest.mark.parametrize(
    ("words", "about", "said"),
    [
        ((), (), "holds"),
        (("train.optimizer=adam",), (), "confounded: optimizer (sgd, adam); as run: holds"),
        (("init=scratch",), (), "confounded: start (float, scratch); "),
        (("train.schedule=cosine", "train.epochs=9"), (), "confounded: schedule (onecycle, cosine); epochs (8, 9); "),
        (("train.lr=0.5", "train.batch_size=64"), (), "confounded: learning rate (0.05, 0.5); batch size (128, 64); "),
        (("train.decay=weights",), (), "confounded: weight decay of (all, weights); "),
        (("model=resnet20",), (), "confounded: net (tiny, resnet20); "),
        (("model=resnet20",), ("net",), "holds"),
        (("model.width=2",), (), "confounded: net width (1, 2); "),
        (
            ("dataset.val=9", "train.loss=squared_hinge"),
            ("data",),
            "confounded: loss (cross_entropy, squared_hinge); ",
        ),
        (("bits=2", "options.last_input=32", "seed=3", "dataset.root=elsewhere"), (), "holds"),
    ],
)
def test_a_claim_between_runs_that_differ_in_more_than_their_methods_is_confounded(
    words: tuple[str, ...], about: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    claim = {"text": "in this order", "order": ["pact", "dorefa"], "about": [*about]}
    card = toy(tmp_path, claims=[claim])
    kept = Kept([entry("pact", 91.0, "short"), entry("dorefa", 89.0, "short")])
    found = verdict(card, card.claims[0], cells_of(card, kept, "short"), setups_of(dorefa=words))
    assert found.startswith(said)
    assert found == "holds" or not said.startswith("holds")
    assert tuple(setups_of()(card.row("pact"), "short")) == cards.PARTS


def test_a_verdict_says_what_other_code_computed_and_waits_for_rows_that_changed(tmp_path: Path) -> None:
    rows = [*TOY["rows"][:2], {"id": "pact2", "run": "method=pact bits=2", "published": 80.0}]
    card = toy(tmp_path, rows=rows, claims=[{"text": "in this order", "order": ["pact", "pact2"]}])

    def said(**more: Any) -> str:
        kept = Kept([entry("pact", 91.0, code="a"), entry("pact2", 89.0, **{"code": "b", **more})])
        return verdict(card, card.claims[0], cells_of(card, kept, "paper"), alike)

    assert said(code="a") == "holds"
    assert said() == "holds (computed by 2 versions of the code)"
    assert said(earlier=True) == "not run yet with the configuration of today"


def test_what_an_earlier_configuration_came_to_is_no_match(tmp_path: Path) -> None:
    card = toy(tmp_path)
    kept = Kept([entry("float", 92.0), entry("pact", 91.0, earlier=True)])
    assert [c.status for c in cells_of(card, kept, "paper")] == ["match", "earlier", "not run"]
    assert "*earlier*: run with an earlier configuration of this row (†)" in pages.page(card, kept, alike)


def test_the_committed_cards_do_not_credit_methods_with_what_their_recipes_do() -> None:
    card = cards.load("onebit_resnet20")
    found = cells_of(card, read(DOCS / card.name), "short")
    said = {c.text: verdict(card, c, found, study.composed(resolve_row)) for c in card.claims}
    assert said["ReCU beats IR-Net"].startswith("confounded: optimizer (sgd, adam); learning rate (0.1, 0.005); ")
    card = cards.load("flexor_fig6")
    found = cells_of(card, read(DOCS / card.name), "short")
    small, large = (verdict(card, c, found, study.composed(resolve_row)) for c in card.claims)
    assert small.startswith("undecided: s10.0 and s1.0 are 0.37 points apart, noise is taken as 1.00")
    assert large == "holds (computed by 2 versions of the code)"


def test_notes_written_by_hand_are_in_the_page(tmp_path: Path) -> None:
    card = toy(tmp_path)
    (tmp_path / "notes.md").write_text("It agrees. It does not. Because.\n")
    pages.write(card, tmp_path, alike)
    assert "It agrees. It does not. Because." in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", CARDS)
def test_every_card_can_be_drawn(name: str, tmp_path: Path) -> None:
    """With two budgets, three seeds, curves and histograms, as far as the card asks for them; and empty."""
    card = cards.load(name)
    pages.write(card, tmp_path / "empty", alike)
    course = {"epoch": [1.0, 2.0], "test_accuracy": [50.0, 60.5]}
    more = {"course": course, "histogram": {"counts": [1, 4, 2], "lo": -1.0, "hi": 1.0}}
    kept = Kept([entry(r.id, 60.0 + i + s, "short", s, **more) for i, r in enumerate(card.runs) for s in (0, 1)])
    kept.add(entry(card.runs[0].id, 61.0, "paper"))
    (tmp_path / RESULTS).write_text(kept.text())
    assert pages.write(card, tmp_path, alike).is_file()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 2 * len(card.rows)


# What is committed.


def test_the_committed_pages_are_what_the_generator_makes() -> None:
    setup_of = study.composed(resolve_row)
    assert (DOCS / "README.md").read_text() == pages.index(DOCS, setup_of), "qbench paper all draw=true makes it anew"
    for path in DOCS.glob(f"*/{RESULTS}"):
        card, kept, notes = cards.load(path.parent.name), read(path.parent), path.parent / "notes.md"
        text = notes.read_text() if notes.is_file() else ""
        assert (path.parent / "table.md").read_text() == pages.page(card, kept, setup_of, text), path
        assert (path.parent / "table.csv").read_text() == pages.table(card, kept), path
        assert not re.search(r'"[^"]*/[^"]*/|"/', path.read_text()), f"{path} names a folder"
        assert not [e for e in kept.entries if e["budget"] == "smoke"], path


def test_the_index_links_no_page_of_a_study_that_was_stopped_before_its_first_run_was_done(tmp_path: Path) -> None:
    (tmp_path / "flexor_fig5").mkdir()
    (tmp_path / "flexor_fig5" / RESULTS).write_text(Kept().text())
    assert "| flexor_fig5 |" in pages.index(tmp_path, alike)


# The command.


def test_the_command_tries_a_card_on_narrow_nets(cli: Callable[..., Any], tmp_path: Path) -> None:
    said = cli("paper", "flexor-table2", "budget=smoke", "out=o", "tensorboard=false", "device=cpu")
    assert said.status == 0, said.err
    kept = read(tmp_path / "o" / "papers" / "flexor_table2")
    assert len(kept.entries) == 2
    assert "dataset=synthetic" in said.out
    assert "dataset=cifar10" not in said.out
    assert not list(tmp_path.glob("results*"))
    assert "[flexor_table2](flexor_table2/table.md)" in (tmp_path / "o" / "papers" / "README.md").read_text()
    said = cli("paper", "flexor_table2", "budget=smoke", "out=o", "only=19-16-7,16-16-?", "plan=true")
    assert re.findall(r"to do  (\S+)", said.out) == ["16-16-8", "19-16-7"]
    assert "qbench model=" in said.out.replace("method=flexor ", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("flexor_table9",), "unknown card 'flexor_table9'. Did you mean 'flexor_table"),
        (("pact_table1", "bugdet=short"), "Did you mean 'budget'"),
        (("pact_table1", "budget=shrot"), "Did you mean 'short'"),
        (("pact_table1", "seeds=x"), "seeds must be"),
        (("pact_table1", "draw=yes"), "draw must be true or false"),
        (("pact_table1", "only=lsq*"), "fits no row of pact_table1: float, pact-2"),
        (("all", "only=nonexistent"), "only=nonexistent fits no row of any card: "),
    ],
)
def test_wrong_words_are_answered(words: tuple[str, ...], said: str, cli: Callable[..., Any]) -> None:
    answer = cli("paper", *words)
    assert answer.status == 2
    assert said in answer.err


def test_seeds() -> None:
    assert study._seeds("3") == (0, 1, 2)
    assert study._seeds("1,4") == (1, 4)
    assert study._seeds("4,") == (4,)


def test_listing_is_quick_and_complete() -> None:
    code = (
        "import sys; from qbench.cli.command import main; assert main(['paper', 'list']) == 0; "
        "sys.exit(bool({'torch', 'hydra', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [name for name in CARDS if f"  {name} " not in done.stdout]


def test_every_card_has_a_make_target() -> None:
    for name in CARDS:
        words = ["make", "-n", name.replace("_", "-"), "BUDGET=smoke", "SEEDS=2", "ONLY=a*", "VENV=v"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"qbench paper {name} budget=smoke seeds=2 only='a*'" in done.stdout


def test_rows_of_two_methods_are_tried(tmp_path: Path) -> None:
    card = toy(tmp_path)
    assert [r.id for r in study._two(card.runs)] == ["pact", "dorefa"]
    assert [r.id for r in study._two(card.runs[:2])] == ["pact", "float"]
    assert [r.id for r in study._two(card.runs[:1])] == ["float"]
    one = [Row(f"r{i}", "", ("method=flexor",)) for i in range(3)]
    assert [r.id for r in study._two(one)] == ["r0", "r1"]
