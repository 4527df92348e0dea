"""Who imports whom, as docs/design.md says."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "qbench").rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(path: Path, late: bool = False) -> set[str]:
    """The modules of qbench that `path` imports when it is loaded; with `late` inside functions too."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return found & set(MODULES)


def test_no_cycle() -> None:
    order = TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()})
    assert len(list(order.static_order())) == len(MODULES) > 40


def test_only_yaml_names_a_method() -> None:
    core = {name: path for name, path in MODULES.items() if not name.startswith("qbench.methods")}
    assert len(core) < len(MODULES)
    named = {
        name: sorted(m for m in imports(path, late=True) if m.startswith("qbench.methods"))
        for name, path in core.items()
    }
    assert not {name: methods for name, methods in named.items() if methods}


def test_models_hold_nothing_of_quantization() -> None:
    models = {name: path for name, path in MODULES.items() if name.startswith("qbench.models")}
    assert len(models) > 5
    for name, path in models.items():
        strange = {m for m in imports(path, late=True) if not m.startswith(("qbench.models", "qbench.errors"))}
        assert not strange, name


def test_what_needs_no_computing_loads_no_torch() -> None:
    names = ("cli", "catalog", "report", "resolve", "recipe", "bits", "xor_spec", "screen", "files")
    code = f"import sys, {', '.join(f'qbench.{n}' for n in names)}; from qbench.cli import main"
    code += "; main(['list']); assert main(['lsit']) == 2; sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
