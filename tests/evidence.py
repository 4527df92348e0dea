"""Which tests of a file compute something with a method's own code and compare numbers with what comes out."""

import ast
from collections.abc import Iterator

CHECKS = {"approx", "tolist", "equal", "allclose"}


def computing_tests(source: str, wanted: set[str]) -> list[str]:
    """The names of the test functions of `source` that hold a check of numbers and call one of `wanted`.

    A call is one by name or of a member (`LSQ(...)`, `lsq.LSQ(...)`, `LSQ.apply(...)`), or a name handed to another
    call (`partial(LSQ, ...)`), in the test itself or in what it uses of the file: functions, fixtures, constants. A
    check is `assert_close`, or an assertion that calls one of CHECKS. A text counts too: the path of a file that the
    test reads.
    """
    tree = ast.parse(source)
    parts = {name: node for node in tree.body for name in names_of(node)}
    return [
        name
        for name, node in parts.items()
        if name.startswith("test_") and any(map(checks, ast.walk(node))) and reached(name, parts) & wanted
    ]


def names_of(node: ast.stmt) -> list[str]:
    """What a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def reached(name: str, parts: dict[str, ast.stmt]) -> set[str]:
    """All that is used in a part of a file, and in the parts that it uses."""
    found, left = set(), [name]
    while left:
        new = set(used(parts[left.pop()])) - found
        found |= new
        left += new & parts.keys()
    return found


def used(node: ast.stmt) -> Iterator[str]:
    """What is called by name, handed to a call, or asked for as a fixture; texts that are read."""
    if isinstance(node, ast.FunctionDef):
        yield from (a.arg for a in node.args.args)
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        owner = call.func.value if isinstance(call.func, ast.Attribute) else None
        for part in (call.func, owner, *call.args, *(k.value for k in call.keywords)):
            if isinstance(part, ast.Name | ast.Attribute):
                yield part.id if isinstance(part, ast.Name) else part.attr
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def checks(node: ast.AST) -> bool:
    """Whether numbers are compared here."""
    if not isinstance(node, ast.Assert | ast.Call):
        return False
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    names = {getattr(f, "attr", getattr(f, "id", "")) for f in calls}
    return bool(names & (CHECKS if isinstance(node, ast.Assert) else {"assert_close"}))
