"""The wheel holds the whole program, the Makefile says what it offers, no file names the place where it was written."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbench.config import catalog

ROOT = Path(__file__).resolve().parent.parent
TRIAL = ("method=pact", "bits=4", "budget=smoke", "model=tiny", "dataset=synthetic")
# Split so that this file does not match itself.
PLACES = re.compile(
    r"(?<![\w.}])/(?:home|Users|root|work)/\w|py" + r"pi\.org|python" + r"hosted|download\.py" + r"torch"
)


def call(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """The output of a command, in an environment in which qbench is found at `path` or in `cwd` alone."""
    drop = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "QBENCH_DATA")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def source(folder: str, suffix: str, inside: str) -> set[str]:
    """Names that the files of `folder` have in the wheel."""
    return {f"{inside}/{p.relative_to(ROOT / folder).as_posix()}" for p in (ROOT / folder).rglob(f"*{suffix}")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the wheel was unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_every_source_file_and_every_configuration(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    yaml, python = source("conf", ".yaml", "qbench/conf"), source("qbench", ".py", "qbench")
    assert len(yaml) > 20
    assert len(python) > 40
    assert {n for n in held if n.endswith(".yaml")} == yaml
    assert {n for n in held if n.endswith(".py")} == python
    rest = {n for n in held - yaml - python if ".dist-info/" not in n}
    assert rest == source("qbench", ".cpp", "qbench")
    assert any(n.endswith("licenses/LICENSE") for n in held)


@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_it_runs_from_the_wheel_and_from_the_bare_checkout(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home = request.getfixturevalue("unpacked") if kind == "wheel" else None
    package = (home or ROOT) / "qbench"
    cwd = ROOT if home is None else tmp_path / "elsewhere"
    cwd.mkdir(exist_ok=True)
    before = set(cwd.iterdir())
    found = call(sys.executable, "-c", "import qbench; print(qbench.__file__)", cwd=cwd, path=home)
    assert Path(found.strip()).parent == package
    listing = call(sys.executable, "-m", "qbench", "list", cwd=cwd, path=home)
    assert {"pact", "resnet20", "digits", "smoke"} <= set(listing.split())
    out = tmp_path / "out"
    shown = call(sys.executable, "-m", "qbench", *TRIAL, f"out={out}", "tensorboard=false", cwd=cwd, path=home)
    assert "after training" in shown
    results = sorted(p.parent.name for p in out.glob("*/result.json"))
    assert [name.rpartition("-")[0] for name in results] == ["float-tiny-synthetic", "pact-w4a4-tiny-synthetic"]
    if home is not None:  # the checkout is busy with other tests
        assert set(cwd.iterdir()) == before


def targets() -> list[str]:
    return re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_help_tells_of_every_target() -> None:
    assert {"install", "demo", "test", "lint", "type", "smoke", "clean"} <= set(targets())
    shown = call("make", "--no-print-directory", cwd=ROOT)
    assert re.findall(r"^  make ([a-z-]+) +\S", shown, re.MULTILINE) == targets()


def test_every_target_is_phony() -> None:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split() == targets()


def pages() -> Iterator[Path]:
    yield from ROOT.glob("*.md")
    yield from (ROOT / "docs").rglob("*.md")


def test_what_the_pages_tell_to_make_can_be_made() -> None:
    told = set()
    for page in pages():
        for code in re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.DOTALL):
            told |= set(re.findall(r"\bmake(?: [A-Z_]+=\S+)* ([a-z0-9-]+)", re.sub(r"#.*", "", code)))
    assert told >= {"install", "test"}
    cards = {path.stem.replace("_", "-") for path in (ROOT / "conf" / "paper").glob("*.yaml")}
    assert told <= set(targets()) | cards


def test_the_readme_lists_the_methods_that_there_are() -> None:
    assert catalog.table() in (ROOT / "README.md").read_text(), "`qbench list format=md` makes it"


def tracked() -> list[Path]:
    """Files of the project: those git would take, or those outside hidden folders in a copy without git."""
    if (ROOT / ".git").exists():
        names = call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    own = ("qbench", "conf", "tests", "docs", "scripts")
    return [p for p in (*ROOT.glob("*"), *(q for f in own for q in (ROOT / f).rglob("*"))) if p.is_file()]


def test_no_file_names_the_place_where_it_was_written() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line.strip()[:100]}"
            for i, line in enumerate(lines, 1)
            if PLACES.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_files_that_the_text_names_are_there() -> None:
    """foo stands for a name that the reader chooses."""
    named = re.compile(r"(?<![\w/])(?:docs|tests|conf|scripts|qbench)/[\w/]+\.(?:md|py|yaml|json|png|cpp)\b")
    texts = [*pages(), ROOT / "Makefile", *(p for f in ("qbench", "conf") for p in (ROOT / f).rglob("*.[py][ya]*"))]
    told = {name for path in texts if path.suffix != ".pyc" for name in named.findall(path.read_text())}
    assert len(told) > 10
    assert not [name for name in sorted(told) if "foo" not in name and not (ROOT / name).exists()]


def test_gitignore_leaves_the_source_folders_alone() -> None:
    """Patterns for results and data are anchored at the top, where source folders of the same name would be lost."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    plain = [line for line in lines if line.rstrip("/") in ("data", "outputs", "build", "dist")]
    assert not plain
    assert {"/outputs/", "/data/", ".venv/"} <= set(lines)
