"""What each method costs in the test suite: `scripts/test_cost.py REPORT.xml [most=5]`.

    PYTEST_ADDOPTS=--junitxml=outputs/tests.xml make test
    scripts/test_cost.py outputs/tests.xml

A test is a method's where its parameters name it (the contract, recorded steps, nets, budgets), or where its file in
tests/methods is called after it. Printed are seconds by the clock of the process that ran it, most first, and at the
end what no method is charged with. Exit status 1 where a method takes more than `most` seconds.
"""

import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from qbench.config import catalog

KINDS = ("contract", "recorded steps", "own file", "others")


def of_test(where: str, name: str, methods: set[str]) -> tuple[str, str]:
    """(method, kind) of a test in the module `where`; the method is '' where it is none's."""
    parameters = name.partition("[")[2]
    file = where.rpartition("test_")[2]
    kind = {"contract": "contract", "captured": "recorded steps"}.get(file, "others")
    for word in re.split(r"[-,\] ]+", parameters):
        if word in methods:
            return word, "own file" if where.startswith("tests.methods.") and file == word else kind
    return (file, "own file") if where.startswith("tests.methods.") and file in methods else ("", kind)


def costs(report: Path) -> dict[str, dict[str, float]]:
    """{method: {kind: seconds}} of a report in JUnit's format."""
    methods = {m["name"] for m in catalog.methods()}
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for case in ET.parse(report).getroot().iter("testcase"):
        method, kind = of_test(case.get("classname", ""), case.get("name", ""), methods)
        found[method][kind] += float(case.get("time", 0))
    return dict(found)


def main(words: list[str]) -> int:
    """Exit status 1 where a method takes too long, 2 where the words make no sense."""
    options = dict(w.split("=", 1) for w in words if "=" in w)
    files = [w for w in words if "=" not in w]
    if len(files) != 1 or not Path(files[0]).is_file() or not options.keys() <= {"most"}:
        print(__doc__, file=sys.stderr)
        return 2
    found, most = costs(Path(files[0])), float(options.get("most", 5))
    rest = sum(found.pop("", {}).values())
    total = {method: sum(kinds.values()) for method, kinds in found.items()}
    print(f"{'method':<15}{'seconds':>9}" + "".join(f"{kind:>16}" for kind in KINDS))
    for method in sorted(total, key=lambda m: -total[m]):
        mark = "  too much" if total[method] > most else ""
        print(f"{method:<15}{total[method]:9.1f}" + "".join(f"{found[method][k]:16.1f}" for k in KINDS) + mark)
    print(f"{'no method':<15}{rest:9.1f}")
    return 1 if max(total.values(), default=0) > most else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
