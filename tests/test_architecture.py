"""Who imports whom, and what must stay quick: no cycle, nothing in the core knows a paper, no torch before a run."""

import ast
import functools
import os
import re
import resource
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from qbench.config import catalog
from qbench.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent / "qbench"
FILES = sorted(PACKAGE.rglob("*.py"))
LEAVES = (
    "errors",
    "files",
    "shapes",
    "screen",
    "quant.ops",
    "quant.clipping",
    "quant.packing",
    "config.kinds",
    "config.bits",
)
ON_LEAVES = {"quant.ranges": "quant.clipping"}  # what needs one leaf, and is one otherwise
# Rooms and modules that a command without computing may load: torch takes seconds.
LIGHT = (
    "config",
    "cli",
    "papers",
    "errors",
    "files",
    "records",
    "shapes",
    "screen",
    "figures.report",
    "methods.shared.xor_spec",
    "methods.shared.formats",
)
# What each room may import, beside errors, files, records, shapes and itself.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "quant": set(),
    "methods": {"quant"},
    "models": set(),
    "data": {"config"},
    "kernels": {"quant", "models", "config", "data"},
    "figures": {"training"},
    "lowbit": {"quant"},
    "training": {"config", "quant", "lowbit", "kernels", "data", "figures", "screen"},
    "papers": {"config", "figures", "training"},
    "bench": {"config", "quant", "kernels", "models", "data", "training", "figures", "cli", "screen"},
    "cli": {"config", "figures", "training", "papers", "bench", "screen", "lowbit"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(p) for p in FILES}


def imports(path: Path, everywhere: bool) -> set[str]:
    """Modules that a file imports: when it is loaded, or `everywhere` in it (inside functions too)."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else _at_load(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in NAMES else str(node.module)
                for a in node.names
            }
    return found


def _at_load(tree: ast.Module) -> list[ast.stmt]:
    return [n for n in tree.body if not isinstance(n, ast.If)]  # `if TYPE_CHECKING:` loads nothing


@functools.cache
def graph(everywhere: bool) -> dict[str, set[str]]:
    found = {name_of(p): {i for i in imports(p, everywhere) if i in NAMES} - {name_of(p)} for p in FILES}
    return {name: used - {"qbench"} for name, used in found.items()}


def test_no_cycle() -> None:
    """Nor one that is hidden in functions."""
    order = list(TopologicalSorter(graph(everywhere=True)).static_order())
    assert set(order) >= NAMES - {"qbench"}


def test_only_what_answers_without_torch_imports_late() -> None:
    late = {n for n, used in graph(everywhere=True).items() if used - graph(everywhere=False)[n]}
    assert late == {
        "qbench",
        "qbench.cli.command",
        "qbench.cli.overrides",
        "qbench.cli.packed",
        "qbench.cli.sensitivity",
        "qbench.cli.sweep",
        "qbench.papers.study",
    }


def test_nothing_in_the_core_knows_a_paper() -> None:
    core = {n: used for n, used in graph(everywhere=True).items() if not n.startswith("qbench.methods")}
    assert len(core) > 20
    assert not {n: u for n, used in core.items() if (u := {x for x in used if x.startswith("qbench.methods")})}


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()))
def test_a_room_knows_only_those_it_may(room: str) -> None:
    for name, used in graph(everywhere=True).items():
        if name.startswith(f"qbench.{room}"):
            rooms = {u.split(".")[1] for u in used} - {room, "errors", "files", "records", "shapes"}
            assert rooms <= ROOMS[room], f"{name}: {sorted(rooms - ROOMS[room])}"


def test_a_method_knows_no_other_method_but_what_is_shared() -> None:
    for name, used in graph(everywhere=True).items():
        if name.startswith("qbench.methods."):
            others = {u for u in used if u.startswith("qbench.methods.") and not u.startswith("qbench.methods.shared")}
            assert not others, f"{name}: {others}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_needs_nothing_of_ours_but_errors(leaf: str) -> None:
    assert graph(everywhere=True)[f"qbench.{leaf}"] <= {"qbench.errors"}


def test_what_stands_on_one_leaf_needs_no_more() -> None:
    for name, leaf in ON_LEAVES.items():
        assert graph(everywhere=True)[f"qbench.{name}"] <= {"qbench.errors", f"qbench.{leaf}"}


def test_the_models_know_nothing_of_quantization() -> None:
    for name, used in graph(everywhere=True).items():
        if name.startswith("qbench.models."):
            assert all(u.startswith("qbench.models") for u in used), name


def test_every_text_names_its_encoding() -> None:
    """The system's own may be another on the machine where a file is read."""
    opening = {"open", "read_text", "write_text", "fdopen", "run", "Popen", "check_output"}
    found, seen = [], 0
    for path in [*FILES, *sorted((PACKAGE.parent / "scripts").glob("**/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            texts = [str(a.value) for a in node.args if isinstance(a, ast.Constant)] + [words.get("mode", "")]
            binary = any(re.fullmatch(r"[rwxa+]*b[rwxa+]*", t.strip("'\"")) for t in texts)
            other = ast.unparse(node.func) in ("os.open", "Image.open") or (
                name in ("run", "Popen", "check_output") and not {"text", "universal_newlines"} & words.keys()
            )
            if name in opening and not binary and not other:
                seen += 1
                found += [] if "encoding" in words else [f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}"]
    assert seen > 20
    assert found == []


def test_only_build_instantiates() -> None:
    users = [p.name for p in FILES if "hydra.utils" in imports(p, everywhere=True)]
    assert users == ["build.py"]


@pytest.mark.parametrize("room", LIGHT)
def test_light_modules_import_no_torch(room: str) -> None:
    todo = [n for n in NAMES if n == f"qbench.{room}" or n.startswith(f"qbench.{room}.")]
    assert todo
    seen: set[str] = set()
    edges = graph(everywhere=False)
    while todo:
        module = todo.pop()
        seen.add(module)
        path = PACKAGE.parent / Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        heavy = {i.partition(".")[0] for i in imports(file, everywhere=False)} & {
            "torch",
            "numpy",
            "matplotlib",
            "sklearn",
        }
        assert not heavy, f"{module}: {heavy}"
        todo += edges[module] - seen


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("list",), 0),
        (("--help",), 0),
        (("paper", "--help"), 0),
        (("bench", "-h"), 0),
        (("eval", "RUN", "--help"), 0),
        (("--version",), 0),
        (("tabel",), 2),
        (("method=pct",), 2),
        (("train.lrr=1",), 2),
        (("bits=99",), 2),
        (("train.schedule=cosin",), 2),
        (("bits=2,4",), 2),
        (("table", "nowhere"), 2),
    ],
)
def test_answers_that_need_no_torch_do_not_load_it(words: tuple[str, ...], status: int, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "from qbench.cli.command import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'torchvision', 'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ)
    )
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing may be left behind"
    bound = (
        0.5 if words[-1] in ("list", "--help", "-h", "--version", "tabel") else 1.5
    )  # seconds of CPU; torch alone takes 2
    assert spent < bound


def test_help_names_every_command() -> None:
    from qbench.cli.usage import HELP, USAGE

    assert not [c for c in HELP if f"qbench {c}" not in USAGE]


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_every_command_has_help_of_its_own(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qbench.cli.command import main
    from qbench.cli.usage import HELP, USAGE

    for command, text in HELP.items():
        assert text.startswith(f"qbench {command}")
        for words in ([command, flag], [flag, command]):
            assert main(words) == 0
            assert capsys.readouterr().out.rstrip() == text.rstrip()
    assert main([flag]) == 0
    assert capsys.readouterr().out.rstrip() == USAGE.rstrip()


def test_every_method_has_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    from qbench.cli.command import main

    for method in catalog.names("method"):
        for words in ([f"method={method}", "--help"], ["help", f"method={method}"]):
            assert main(words) == 0
            out = capsys.readouterr().out
            assert not [o for o in catalog.options(method) if f"\n  {o}: " not in out]
            assert "bits of weights: " in out
    assert main(["method=flexr", "--help"]) == 2
    assert "Did you mean 'flexor'?" in capsys.readouterr().err


def test_the_options_of_a_command_stand_in_its_help() -> None:
    from qbench.bench.command import OPTIONS
    from qbench.cli.usage import HELP
    from qbench.papers.study import OPTIONS as PAPER

    assert not [o for o in OPTIONS if o != "debug" and f"{o}=" not in HELP["bench"]]
    assert not [o for o in PAPER if f"{o}=" not in HELP["paper"]]


@pytest.mark.parametrize(("field", "said"), [("family: odd", "unknown method.family in odd.yaml"), ("", "is missing")])
def test_a_method_that_is_not_whole_is_named(
    field: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qbench.config import catalog

    (tmp_path / "method").mkdir()
    whole = "name: odd, title: Odd, summary: odd, w_bits: {default: 4}, a_bits: {default: 4}, init: float"
    (tmp_path / "method" / "odd.yaml").write_text(f"method: {{{whole}, {field}}}\n")
    monkeypatch.setattr(catalog, "conf_folder", lambda: tmp_path)
    with pytest.raises(UserError, match=said):
        catalog.methods()


def test_list_shows_everything_that_conf_holds() -> None:
    from qbench.config import catalog

    text = catalog.listing()
    for group in catalog.GROUPS:
        assert not [name for name in catalog.names(group) if name not in text], group
    for method in catalog.methods():
        assert method["title"] in text
        assert method.get("summary")
    assert all(catalog.remark(g, n, "description") for g in ("model", "dataset", "budget") for n in catalog.names(g))
