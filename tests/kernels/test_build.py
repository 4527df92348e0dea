"""The compiled library: instruction sets, what is kept of it, and what of that is never loaded."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import CASES, FORMATS, SHAPES, Reference, compiled
from torch import Tensor

from qbench import kernels
from qbench.kernels import build
from qbench.kernels.backend import Backend
from qbench.kernels.functions import Fast
from qbench.quant import quantizer


@pytest.mark.parametrize("level", [level for level in build.LEVELS if level != "plain"])
@pytest.mark.parametrize("bf16", [False, True])
def test_all_instruction_sets_give_the_same_bits(level: str, bf16: bool) -> None:
    library = build.library()
    best = list(build.LEVELS).index(Backend(library).level)
    if list(build.LEVELS).index(level) > best:
        pytest.skip(f"this processor has no {level}")

    def all_of(name: str, case: str, shape: tuple[int, ...], layout: str) -> list[Tensor]:
        torch.manual_seed(0)
        m = Reference(shape[1], *CASES[case](shape[1]))
        x, r = (torch.randn(shape).to(torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
        leaves = [t.to(memory_format=FORMATS[layout]).requires_grad_() for t in (x, r)]
        quantizer.fast = Fast(Backend(library, name))
        found = compiled(m, *leaves)
        torch.autograd.backward(found, [torch.randn(shape).to(y.dtype) for y in found])
        return [*found, *(t.grad for t in (*leaves, *m.parameters()) if t.grad is not None), *m.buffers()]

    with kernels.using("cpp"):
        for case in CASES:
            for shape in SHAPES[::3]:
                for layout in FORMATS:
                    pair = (all_of(name, case, shape, layout) for name in ("plain", level))
                    for a, b in zip(*pair, strict=True):
                        assert a.equal(b), (case, shape, layout)


def test_the_processor_is_asked_which_instruction_set_it_has() -> None:
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    expected = "avx2" if "avx2" in flags else "plain"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        expected = "avx512"
    assert Backend(build.library()).level == expected


def test_the_plain_instruction_set_is_one_that_every_processor_of_its_kind_has() -> None:
    assert not [flag for flag in build.LEVELS["plain"] if flag.startswith("-m")]
    assert not [flag for flag in build.FLAGS if flag.startswith("-m")]
    assert next(iter(build.LEVELS)) == "plain"  # the linker keeps the first of what several objects hold


COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit 0
for word; do last=$word; done
case " $* " in
*" -shared "*) sleep {seconds}; echo linked >> {log}; cp {library} "$last" ;;
*) touch "$last" ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Path]:
    """place(seconds): an empty folder for libraries, and a compiler that takes so long, writing the log `linked`.

    What it links is a copy of the real library.
    """
    real = build.library()._name

    def make(seconds: float = 0) -> Path:
        script = tmp_path / "cc"
        script.write_text(COMPILER.format(seconds=seconds, log=tmp_path / "linked", library=real))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        monkeypatch.setenv("QBENCH_KERNELS", str(tmp_path / "kernels"))
        return tmp_path

    return make


def links(folder: Path) -> int:
    path = folder / "linked"
    return len(path.read_text().splitlines()) if path.exists() else 0


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "one bit": lambda content: content[:99_999] + bytes([content[99_999] ^ 1]) + content[100_000:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(damage: str, place: Callable[..., Path]) -> None:
    folder = place()
    first = Path(build.library()._name)
    whole = first.read_bytes()
    assert build.library()._name == str(first)
    assert links(folder) == 1
    replaced = first.with_name("replaced")  # another file: this process has the first one in memory
    replaced.write_bytes(DAMAGES[damage](whole))
    replaced.chmod(0o700)
    os.replace(replaced, first)
    second = Path(build.library()._name)
    assert links(folder) == 2
    assert second.read_bytes() == whole
    assert len(list(second.parent.glob("*.so"))) == 1


def test_what_another_user_may_have_written_is_never_loaded(
    place: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place()
    path = Path(build.library()._name)

    def refused(match: str) -> None:
        with pytest.raises(build.CannotBuild, match=match):
            build.library()

    for victim in (path, path.parent):
        victim.chmod(0o720)
        refused(rf"{victim.name} is not trusted, as other users may write to it; remove it, or set QBENCH_KERNELS")
        victim.chmod(0o700)
    build.library()
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused("symbolic link")
    path.unlink()
    planted = path.parent.with_name(f"user-{os.geteuid() + 1}")  # made by us, for the next user to find
    shutil.copytree(path.parent, planted)
    elsewhere.rename(path)
    build.library()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    refused(f"{planted} is not trusted, as it belongs to another user")


def test_two_processes_build_it_once(place: Callable[..., Path], process: Any) -> None:
    folder = place(1.0)
    code = "from qbench.kernels import build; print(build.library()._name)"
    both = [process.script("-c", code) for _ in range(2)]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0] == said[1]
    assert links(folder) == 1


def test_a_compiler_that_fails_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x: error: no luck' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("QBENCH_KERNELS", str(tmp_path / "kernels"))
    with pytest.raises(build.CannotBuild, match="no luck"):
        build.library()
    assert not list((tmp_path / "kernels").rglob("*.so"))
