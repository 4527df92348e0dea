"""Which code a run was made by. No torch here."""

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from qbench.config.identity import digest

# What decides the numbers of every run, beside the method's own files and the model's.
CORE = (
    *(f"qbench.quant.{n}" for n in ("hooks", "layers", "method", "ops", "quantizer", "surgery")),
    *(f"qbench.training.{n}" for n in ("evaluation", "optim", "stages", "step", "trainer")),
    "qbench.config.recipe",
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_hash(config: Mapping[str, Any]) -> str:
    """Ten hex digits over the code of the core and of the modules that the configuration names, with their imports.

    Followed are imports of ours, and of modules that lie outside the installed packages: the user's own.
    """
    text = json.dumps([config["method"], config["model"]])
    todo = {target.rpartition(".")[0] for target in re.findall(r'"_target_": "([^"]+)"', text)}
    rules = [str(config.get("train", {}).get(k) or "").rpartition(".")[0] for k in ("optimizer", "loss")]
    todo |= {module for module in rules if module and _is_own(module.partition(".")[0])}
    found = {name: _code(name) for name in CORE}
    while todo:
        name = todo.pop()
        found[name] = _code(name)
        todo |= (_imports(found[name]) | _own_imports(name, found[name])) - found.keys()
    return digest([found[name] for name in sorted(found)])


def _imports(code: str) -> set[str]:
    """The modules of ours that `code`, as `ast.unparse` writes it, imports."""
    lines = re.findall(r"^from (qbench[\w.]*) import (.+)$", code, re.MULTILINE)
    inside = (f"{m}.{n.partition(' as ')[0]}" for m, names in lines for n in names.split(", "))
    return {name if _code(name) else name.rpartition(".")[0] for name in inside}


def _own_imports(module: str, code: str) -> set[str]:
    """The modules of the user's own that the `code` of a `module` of the user's own imports; ours import none."""
    if module.startswith("qbench."):
        return set()
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, "." * node.level + (node.module or ""))
            # a name may be a module of the package or something in its file; the file counts in both cases
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)} if base else set()
    return {name for name in found if _is_own(name.partition(".")[0]) and _code(name)}


def _absolute(module: str, name: str) -> str:
    """`name` of an import in `module`, its dots in front resolved; empty where they lead out of its package."""
    spec = find_spec(module)
    try:
        return resolve_name(name, spec.parent) if spec and spec.parent else name.lstrip(".")
    except ImportError:
        return ""


@cache
def _is_own(package: str) -> bool:
    """Whether a package or module is neither Python's nor qbench nor installed."""
    if package == "qbench" or package in sys.stdlib_module_names:
        return False
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
    installed = {str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("purelib", "platlib")}
    return any(p and not str(Path(p).resolve()).startswith(tuple(installed)) for p in places if p != "built-in")


@cache
def _code(module: str) -> str:
    """The source of a module without comments, docstrings and layout; empty where there is none."""
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, ValueError, SyntaxError):  # built in, or not in Python
        return ""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
