"""torchvision's import, in fresh processes."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, folder: Path | None = None) -> str:
    """What `code` prints in a fresh interpreter, with `folder` first on its path."""
    first = f"import sys; sys.path.insert(0, {str(folder)!r}); " if folder else ""
    command = [sys.executable, "-W", "error", "-c", first + "from qbench.data.torchvision_loader import *; " + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def fake(folder: Path, source: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    (folder / "torchvision" / "part.py").write_text("")
    return folder


def test_data_sets_and_transforms_can_be_used() -> None:
    shown = run(
        "import torch; assert 'torchvision' not in sys.modules; tv = torchvision(); assert torchvision() is tv; "
        "print(tv.datasets.CIFAR10.__name__, tv.transforms.functional.hflip(torch.arange(6).view(2, 3)).tolist())"
    )
    assert shown == "CIFAR10 [[2, 1, 0], [5, 4, 3]]\n"


def test_nothing_is_declared_where_the_import_works(tmp_path: Path) -> None:
    folder = fake(tmp_path, "name = 'working'\n")
    shown = run("import torch; print(torchvision().name, hasattr(torch.ops.torchvision, 'nms'))", folder)
    assert shown == "working False\n"


def test_the_operators_are_declared_where_the_import_fails_for_them(tmp_path: Path) -> None:
    folder = fake(
        tmp_path,
        "import torch\nfrom torchvision import part\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: None)\n",
    )
    shown = run("tv = torchvision(); print(tv.part.__name__, tv.torch.ops.torchvision.nms.default.name())", folder)
    assert shown == "torchvision.part torchvision::nms\n"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("raise RuntimeError('something else')", "RuntimeError: something else"),
        ("raise ModuleNotFoundError('no torchvision')", "UserError: torchvision is needed here (no torchvision)"),
        ("raise RuntimeError('operator torchvision::nms is odd')", "RuntimeError: operator torchvision::nms is odd"),
    ],
)
def test_other_failures_are_told_and_not_hidden(tmp_path: Path, source: str, shown: str) -> None:
    assert shown in run("torchvision()", fake(tmp_path, source))
