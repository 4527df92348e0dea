"""What conf/ holds, read without Hydra or torch: names, one line each, where a paper is."""

from pathlib import Path
from typing import Any

import yaml

from qbench.errors import UserError, unknown

GROUPS = ("method", "model", "dataset", "budget")
FAMILIES = ("float", "ptq", "qat", "fixed-point", "binary", "flexor")


def conf_folder() -> Path:
    """conf/ beside the package (a checkout) or inside it (an installed wheel)."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ in or beside {package}")


def names(group: str) -> list[str]:
    """What a configuration group offers, aliases included."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def aliases() -> dict[str, str]:
    """{alias: method} of the method files that only point to another one."""
    return {name: target for name in names("method") if (target := remark("method", name, "alias"))}


def options(method: str) -> list[str]:
    """What a method, or the one that an alias points to, offers as options.NAME."""
    return list(_read("method", aliases().get(method, method)).get("options", {}))


def _read(group: str, name: str) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load((conf_folder() / group / f"{name}.yaml").read_text(), loader))


def methods() -> list[dict[str, Any]]:
    """The `method` node of every method that is not an alias, by family."""
    skip = aliases()
    found = []
    for name in names("method"):
        if name not in skip:
            method = _read("method", name)["method"]
            missing = [k for k in ("name", "title", "family", "summary") if not method.get(k)]
            if missing:
                raise UserError(f"{name}.yaml: method.{missing[0]} is missing")
            if method["family"] not in FAMILIES:
                raise unknown(f"method.family in {name}.yaml", method["family"], FAMILIES)
            found.append(method)
    return sorted(found, key=lambda m: (FAMILIES.index(m["family"]), m["name"]))


def remark(group: str, name: str, word: str) -> str:
    """What a line `# word: ...` (or `word: ...`) of a YAML says; empty where there is none."""
    for line in (conf_folder() / group / f"{name}.yaml").read_text().splitlines():
        text = line.lstrip("# ")
        if text.startswith(f"{word}:"):
            return text.removeprefix(f"{word}:").strip()
    return ""


def listing() -> str:
    """What `qbench list` prints."""
    lines = ["METHODS (method=)"]
    family = None
    for method in methods():
        if method["family"] != family:
            family = method["family"]
            lines.append(f"  {family}")
        paper = f"  [arXiv {method['arxiv']}]" if method.get("arxiv") else ""
        lines.append(f"    {method['name']:<13} {method.get('summary', '')}{paper}")
        lines.append(f"    {'':<13} {method['title']}")
    lines.append("  aliases: " + ", ".join(f"{a} = {m}" for a, m in aliases().items()))
    for group, title in (("model", "MODELS"), ("dataset", "DATA SETS"), ("budget", "BUDGETS")):
        lines += ["", f"{title} ({group}=)"]
        lines += [f"  {name:<14} {remark(group, name, 'description')}" for name in names(group)]
    return "\n".join(lines)
