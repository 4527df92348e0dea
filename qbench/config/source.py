"""Which code a run was made by. No torch here."""

import ast
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
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
    """Ten hex digits over the code of the core and of the modules that the configuration names, with their imports."""
    text = json.dumps([config["method"], config["model"]])
    todo = {target.rpartition(".")[0] for target in re.findall(r'"_target_": "([^"]+)"', text)}
    found = {name: _code(name) for name in CORE}
    while todo:
        name = todo.pop()
        found[name] = _code(name)
        todo |= _imports(found[name]) - found.keys()
    return digest([found[name] for name in sorted(found)])


def _imports(code: str) -> set[str]:
    """The modules of ours that `code`, as `ast.unparse` writes it, imports."""
    lines = re.findall(r"^from (qbench[\w.]*) import (.+)$", code, re.MULTILINE)
    inside = (f"{m}.{n.partition(' as ')[0]}" for m, names in lines for n in names.split(", "))
    return {name if _code(name) else name.rpartition(".")[0] for name in inside}


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
