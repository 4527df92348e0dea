"""What conf/ holds, read without Hydra or torch: names, one line each, where a paper is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qbench.errors import UserError, unknown
from qbench.shapes import check

GROUPS = ("method", "model", "dataset", "budget")
FAMILIES = ("float", "ptq", "qat", "fixed-point", "binary", "flexor")
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("name", "title", "family", "summary", "init", "arxiv?", "check?"), str),
    **dict.fromkeys(("w_bits", "a_bits", "recipe?", "budgets?", "needs?", "added?"), dict),
    **{name: [dict] for name in ("rules?", "stages?", "param_groups?")},
    "unmoved?": [str],
}
NEEDED = ("name", "title", "family", "summary", "w_bits", "a_bits", "init")  # what no method's YAML goes without


def conf_folder() -> Path:
    """conf/ beside the package (a checkout) or inside it (an installed wheel)."""
    package = Path(__file__).resolve().parents[1]
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


def options(method: str) -> dict[str, Any]:
    """{name: default} of what a method, or the one that an alias points to, offers as options.NAME."""
    return dict(read("method", _target(method)).get("options", {}))


def _target(method: str) -> str:
    """The method that an alias points to; any other is itself."""
    return remark("method", method, "alias") or method


def read(group: str, name: str) -> dict[str, Any]:
    """What the file of one of a group holds."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return dict(yaml.load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"), loader))


def methods() -> list[dict[str, Any]]:
    """The `method` node of every method that is not an alias, by family."""
    skip = aliases()
    found = []
    for name in names("method"):
        if name not in skip:
            found.append(check_method(read("method", name).get("method"), f"{name}.yaml"))
    return sorted(found, key=lambda m: (FAMILIES.index(m["family"]), m["name"]))


def check_method(method: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The `method` node of a YAML, if it holds what every method must.

    Errors: UserError naming the file and what it lacks.
    """
    if missing := [k for k in NEEDED if not (method or {}).get(k)]:
        raise UserError(
            f"{where}: method.{missing[0]} is missing; CONTRIBUTING.md shows a whole file, which begins with the line "
            f"'# @package _global_' and holds 'method:' and 'options:'"
        )
    assert method is not None
    try:
        check({k: v for k, v in method.items() if v is not None}, SHAPE)
    except ValueError as error:
        raise UserError(f"{where}: method.{error}") from error
    if method["family"] not in FAMILIES:
        raise unknown(f"method.family in {where}", method["family"], FAMILIES)
    return dict(method)


def remark(group: str, name: str, word: str) -> str:
    """What a line `# word: ...` (or `word: ...`) of a YAML says; empty where there is none."""
    for line in (conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ")
        if text.startswith(f"{word}:"):
            return text.removeprefix(f"{word}:").strip()
    return ""


def about(method: str) -> str:
    """What `qbench method=... --help` prints: the paper, and the options as their YAML explains them."""
    if method not in names("method"):
        raise unknown("method", method, names("method"))
    name = _target(method)
    found = check_method(read("method", name).get("method"), f"{name}.yaml")
    paper = f" (arXiv {found['arxiv']})" if found.get("arxiv") else ""
    lines = [f"method={name}: {found['summary']}", f"  {found['title']}{paper}"]
    for word, of in (("w_bits", "weights"), ("a_bits", "activations")):
        bits = found[word]
        allowed = " or ".join(map(str, bits["only"])) if "only" in bits else f"{bits['lo']} to {bits['hi']}"
        default = "" if allowed == str(bits["default"]) else f", {bits['default']} by default"
        lines.append(f"  {word}=   bits of {of}: {allowed}{default}")
    _, _, text = (conf_folder() / "method" / f"{name}.yaml").read_text(encoding="utf-8").partition("\noptions:")
    text = text.strip("\n")
    own = (
        f"Options, as options.NAME=value, with their defaults:\n  {text.strip()}"
        if text
        else "It has no options of its own."
    )
    return "\n".join([*lines, "", own])


def table() -> str:
    """The methods as a table in Markdown, for the README: `qbench list format=md`."""
    lines = ["| family | `method=` | what it does | paper |", "| --- | --- | --- | --- |"]
    family = ""
    for method in methods():
        if method["name"] == "float":
            continue
        shown, family = "" if method["family"] == family else method["family"], method["family"]
        arxiv = method.get("arxiv")
        paper = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""
        lines.append(f"| {shown} | `{method['name']}` | {method['summary']} | {paper} |")
    return "\n".join(lines)


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
