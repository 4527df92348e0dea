"""Plant faults into modules and say which of them no test notices: `scripts/mutants.py MODULE... [count=40 seed=0]`.

    scripts/mutants.py qbench/quant/grid.py qbench/quant/packing.py count=20

Of all faults that can be planted into a module `count` are drawn by `seed` (count=0: all). Each is tried in a copy of
the tree in which the script is run: the tests that concern the module run until one fails, or for five times as long
as without the fault, which counts as noticed (an endless loop). These are the files of the folder that mirrors the
module's (qbench/quant/grid.py: tests/quant), those that import the module, but for what takes longer than `most`
seconds or fails without a fault, and `tests=FILE,FILE` if more are named. Then QUICK, the contract of two methods.
Whatever survives is told with its line; a survivor is a missing test, or a change that changes nothing. Exit status 1
where something survived.

The process imports torch and the other libraries once, and each fault is tried in a fork of it. mutmut works so too,
but leaves out what stands outside of functions and whatever is decorated (properties, formulas, `no_grad`), which is
much of what decides numbers here; cosmic-ray starts Python, and one list of tests for all modules, for every fault.
"""

import ast
import copy
import importlib
import importlib.util
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

QUICK = ["tests/test_contract.py", "-k", "[lsq] or [bnn]"]
OPTIONS = {"count": 40, "seed": 0, "most": 60}
LEFT_OUT = (".git", "outputs", "__pycache__", ".venv", ".ci", ".*_cache", ".hypothesis")
TWINS = [
    ("Add", "Sub"), ("Mult", "Div"), ("FloorDiv", "Mult"), ("Mod", "Mult"), ("Pow", "Mult"), ("BitAnd", "BitOr"),
    ("LShift", "RShift"), ("Lt", "LtE"), ("LtE", "Gt"), ("Gt", "GtE"), ("GtE", "Lt"), ("Eq", "NotEq"), ("Is", "IsNot"),
    ("In", "NotIn"), ("And", "Or"),
]  # fmt: skip
NAMES = [
    ("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("clamp_min", "clamp_max"), ("floor", "ceil"),
    ("any", "all"), ("argmin", "argmax"), ("cumsum", "cumprod"), ("sum", "mean"),
]  # fmt: skip
DROPPED = (ast.Expr, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)


def both_ways(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """{name: what may stand in its place}."""
    found: dict[str, list[str]] = {}
    for a, b in pairs:
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


OPERATORS, FUNCTIONS = both_ways(TWINS), both_ways(NAMES)


@dataclass(frozen=True)
class Fault:
    """What may be planted into a tree: `new` in the place of a node, which a field of its parent (or a list) holds."""

    parent: ast.AST
    field: str
    place: int | None
    new: ast.AST

    def told(self) -> str:
        """Its line, and what it changes."""
        node = self._held()
        was, now = (ast.unparse(ast.fix_missing_locations(n)).splitlines()[0] for n in (node, self.new))
        return f"line {getattr(node, 'lineno', '?')}: {was}  ->  {'dropped' if now == 'pass' else now}"

    def planted(self, tree: ast.Module) -> str:
        """The source of the tree with this fault."""
        held = getattr(self.parent, self.field)
        place = self.place
        setattr(self.parent, self.field, self.new if place is None else [*held[:place], self.new, *held[place + 1 :]])
        source = ast.unparse(ast.fix_missing_locations(tree))
        setattr(self.parent, self.field, held)
        return source

    def _held(self) -> ast.AST:
        held = getattr(self.parent, self.field)
        node: ast.AST = held if self.place is None else held[self.place]
        return node


def changed(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(ops=[op]):
            yield from (changed(node, ops=[getattr(ast, n)()]) for n in OPERATORS.get(type(op).__name__, ()))
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op):
            yield from (changed(node, op=getattr(ast, n)()) for n in OPERATORS.get(type(op).__name__, ()))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Return(value=value) if value is not None:
            yield ast.Return(ast.Constant(None))
        case ast.Call(func=func, args=args):
            name = getattr(func, "attr", getattr(func, "id", ""))
            field = "attr" if isinstance(func, ast.Attribute) else "id"
            yield from (changed(node, func=changed(func, **{field: n})) for n in FUNCTIONS.get(name, ()))
            if len(args) > 1 and not any(isinstance(a, ast.Starred) for a in args[-2:]):
                yield changed(node, args=[*args[:-2], args[-1], args[-2]])
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, DROPPED) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        yield ast.Pass()


def faults(node: ast.AST) -> Iterator[Fault]:
    """All that may be planted below a node, one at a time; nothing in types, assertions, texts and messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, ast.Assert | ast.JoinedStr | ast.Raise):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not text:
                yield from (Fault(node, field, place, new) for new in variants(child))
                yield from faults(child)


def imports(path: Path) -> set[str]:
    """The modules that a file imports, and what it takes of them: 'a.b' and 'a.b.c' of `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


def concerned(module: str) -> list[str]:
    """The test files of a module: those in the folder that mirrors its own, and those that import it."""
    path = Path(module)
    dotted = ".".join(path.with_suffix("").parts)
    room = sorted(Path("tests", *path.parts[1:-1]).glob("test_*.py"))
    found = [*room, *(p for p in sorted(Path("tests").rglob("test_*.py")) if dotted in imports(p))]
    return [f for f in dict.fromkeys(map(str, found)) if f != QUICK[0]]


def forked(run: Callable[[], int], seconds: float) -> int | None:
    """What `run` returns in a process of its own; None beyond the time limit."""
    started, child = time.monotonic(), os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        status = 3
        with suppress(BaseException):
            status = run()
        os._exit(status)
    status: int | None = None
    while status is None and time.monotonic() - started < seconds:
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # the processes that its tests have started, too
    if status is None:
        os.waitpid(child, 0)
    return status


class Failed:
    """Notes the tests that fail, one a line of `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def pytest_status(words: list[str], seconds: float, plugins: Sequence[object] = ()) -> int | None:
    """pytest's status: 0 where all tests pass, 1 where one fails; None where the time is over."""
    own = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    own += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins were imported before: see preload
    return forked(lambda: int(pytest.main([*own, *words], plugins=plugins)), seconds)


def passing(words: list[str], most: float) -> tuple[list[str], float]:
    """(words for those of the tests that pass without a fault, their time limit); none where they take too long."""
    started, failed = time.monotonic(), Path("failed.txt").resolve()
    failed.write_text("", encoding="utf-8")
    status = pytest_status(words, most, [Failed(failed)])
    if status not in (None, 0, 1, 5):
        raise SystemExit(f"pytest cannot run {' '.join(words)} (status {status}), without any fault")
    if status is None:
        print(f"  left out: {' '.join(words)} takes more than {most:g} s", flush=True)
        return [], 0.0
    names = failed.read_text(encoding="utf-8").splitlines()
    for name in names:
        print(f"  left out: {name} fails as it is", flush=True)
    return [*words, *(f"--deselect={name}" for name in names)], 10 + 5 * (time.monotonic() - started)


def rounds(module: str, more: list[str], most: float) -> list[tuple[list[str], float]]:
    """[(words for pytest, time limit)]: the tests that concern a module, fastest first, and QUICK."""
    found = sorted((passing([f], most) for f in dict.fromkeys([*concerned(module), *more])), key=lambda pair: pair[1])
    found += [passing(QUICK, 600)] if Path(QUICK[0]).is_file() else []
    if not any(words for words, _ in found):
        raise SystemExit(f"no test concerns {module}")
    return [(words, limit) for words, limit in found if words]


def attack(module: str, more: list[str], options: dict[str, int]) -> int:
    """Plant the faults drawn for one module, each in its turn; returns how many survive."""
    path = Path(module)
    whole = path.read_text(encoding="utf-8")
    tree = ast.parse(whole)
    found = list(faults(tree))
    count = min(options["count"] or len(found), len(found))
    drawn = sorted(random.Random(options["seed"]).sample(range(len(found)), count))
    print(f"{module}: {count} of {len(found)} faults", flush=True)
    trials = rounds(module, more, options["most"])
    survived = late = 0
    # bytecode of a fault would be taken for that of the next one, of the same length and second
    Path(importlib.util.cache_from_source(module)).unlink(missing_ok=True)
    with writing_no_bytecode():
        for fault in (found[i] for i in drawn):
            path.write_text(fault.planted(tree), encoding="utf-8")
            statuses = (pytest_status(["-x", *words], limit) for words, limit in trials)
            noticed = next((s for s in statuses if s not in (0, 5)), 0)  # 5: all tests of a file are for a GPU
            late += noticed is None
            if noticed == 0:
                survived += 1
                print(f"  survived, {fault.told()}", flush=True)
    path.write_text(whole, encoding="utf-8")
    print(f"  {count - survived} noticed, {late} of them by the time limit; {survived} survived", flush=True)
    return survived


@contextmanager
def writing_no_bytecode() -> Iterator[None]:
    """Within it neither this process nor those that it starts keep compiled modules."""
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    yield
    sys.dont_write_bytecode = False
    del os.environ["PYTHONDONTWRITEBYTECODE"]


def preload(roots: set[str]) -> None:
    """Import what the tree's own modules and tests import from elsewhere, and pytest's plugins, once for all forks."""
    names = {name for root in roots for path in Path(root).rglob("*.py") for name in imports(path)}
    own = {p.stem for p in Path().rglob("*.py")} | {p.name for p in Path().iterdir()}
    for name in sorted(n for n in names if n.partition(".")[0] not in own):
        with suppress(ImportError):
            importlib.import_module(name)
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as empty:
        pytest.main(["--collect-only", "-c", os.devnull, "--rootdir", empty, empty])


def main(words: list[str]) -> int:
    """Exit status 1 where a fault survived, 2 where the words make no sense."""
    given = dict(w.split("=", 1) for w in words if "=" in w)
    modules = [w for w in words if "=" not in w]
    more = given.pop("tests", "")
    right = given.keys() <= OPTIONS.keys() and all(v.isdigit() for v in given.values())
    if not modules or not all(Path(m).is_file() for m in modules) or not right:
        print(__doc__, file=sys.stderr)
        return 2
    options = OPTIONS | {k: int(v) for k, v in given.items()}
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(".", tree, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        preload({Path(m).parts[0] for m in modules} | {"tests"})
        return 1 if sum(attack(m, more.split(",") if more else [], options) for m in modules) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
