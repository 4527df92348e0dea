"""scripts/mutants.py tells a fault that a test notices from one that none does; scripts/test_cost.py adds up times."""

import ast
import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TOY = '''"""Toy."""

LOW = [7][0]

def clip(x: int, lo: int) -> int:
    """The greater one."""
    if x < lo:
        return lo
    return x
'''
TESTS = """from toy.calc import clip

def test_clip():
    assert clip(1, 2) == 2
    assert clip(3, 2) == 3

def test_that_fails_as_it_is():
    assert clip(1, 2) == 5
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    return load("mutants")


def test_noticed_and_surviving_faults_are_told_apart(process: Any, tmp_path: Path) -> None:
    """At x = lo the two branches give the same: < for <= is no fault, and nothing else of `clip` survives.

    Nobody looks at the value of LOW; where it cannot be imported everything fails.
    """
    (tmp_path / "toy").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("from toy.calc import LOW")  # a fault may break this, too
    (tmp_path / "toy" / "calc.py").write_text(TOY)
    (tmp_path / "tests" / "test_calc.py").write_text(TESTS)
    ran = process.script(SCRIPTS / "mutants.py", "toy/calc.py", "count=0")
    said, error = ran.communicate()
    assert ran.returncode == 1, error
    lines = [line.strip() for line in said.splitlines()]
    assert lines == [
        "toy/calc.py: 9 of 9 faults",
        "left out: tests/test_calc.py::test_that_fails_as_it_is fails as it is",
        "survived, line 3: 7  ->  8",
        "survived, line 3: 7  ->  6",
        "survived, line 3: 0  ->  -1",
        "survived, line 7: x < lo  ->  x <= lo",
        "5 noticed, 0 of them by the time limit; 4 survived",
    ]
    assert (tmp_path / "toy" / "calc.py").read_text() == TOY


def test_an_endless_loop_has_its_time(mutants: ModuleType) -> None:
    assert mutants.forked(lambda: time.sleep(60), 0.1) is None
    assert mutants.forked(lambda: 5, 60) == 5


@pytest.mark.parametrize(
    ("source", "planted"),
    [
        ("y = a < 1", ["y = a <= 1", "y = a >= 1", "y = a < 2", "y = a < 0"]),
        ("y = a - b", ["y = a + b"]),
        ("y = -a if not b else 0", ["y = a", "not not b", "else 1", "else -1"]),
        ("def f(x):\n    return x", ["return None"]),
        ("y = max(a, b)", ["min(a, b)", "max(b, a)"]),
        ("f(a)", ["pass"]),
        ("self.a = b", ["pass"]),
        ("raise ValueError(1 + 1)", ["pass"]),
        ("if a and b:\n    c", ["a or b", "not (a and b)", "pass"]),
    ],
)
def test_what_is_planted(mutants: ModuleType, source: str, planted: list[str]) -> None:
    tree = ast.parse(source)
    found = [fault.planted(tree) for fault in mutants.faults(tree)]
    assert ast.unparse(tree) == ast.unparse(ast.parse(source)), "a fault is taken out again"
    for text in planted:
        assert any(text in new for new in found), (text, found)


@pytest.mark.parametrize(
    "source", ['"""3 < 4"""', "assert a < 1", "x: int | float", "def f(x: int | None) -> A | B: ...", "f'{a + 1}'"]
)
def test_texts_types_and_assertions_are_left_alone(mutants: ModuleType, source: str) -> None:
    tree = ast.parse(source)
    assert [new for fault in mutants.faults(tree) if "pass" not in (new := fault.planted(tree))] == []


def test_tests_are_found_by_folder_and_by_import(
    mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("b/test_c", ""),
        ("b/test_x", ""),
        ("test_d", "from a.b import c"),
        ("test_e", "from a.b import other"),
    ):
        path = tmp_path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert mutants.concerned("a/b/c.py") == ["tests/b/test_c.py", "tests/b/test_x.py", "tests/test_d.py"]


def test_what_a_method_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ("tests.test_contract", "test_x[lsq]", 1.0),
        ("tests.test_contract", "test_bits[lsq-4-4]", 0.5),
        ("tests.training.test_captured", "test_steps[pact, resnet]", 2.0),
        ("tests.methods.test_lsq", "test_by_hand[0.5-2]", 4.0),
        ("tests.config.test_conf", "test_budget[demo-pact]", 0.25),
        ("tests.quant.test_grid", "test_lsq", 8.0),
    ]
    text = "".join(f'<testcase classname="{c}" name="{n}" time="{s}"/>' for c, n, s in cases)
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    cost = load("test_cost")
    assert cost.main([str(tmp_path / "report.xml")]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["lsq", "5.5", "1.5", "0.0", "4.0", "0.0", "too", "much"]
    assert lines[2] == ["pact", "2.2", "0.0", "2.0", "0.0", "0.2"]
    assert lines[3] == ["no", "method", "8.0"]
    assert cost.main([str(tmp_path / "report.xml"), "most=6"]) == 0
    assert cost.main([]) == 2
