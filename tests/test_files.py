"""Locks with and without flock, and the cache folder without a home."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qbench import files
from qbench.errors import UserError
from qbench.files import TEMPORARY, remove_parts


@pytest.fixture(params=["flock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of lock, at a quick pace."""
    monkeypatch.setattr(files, "POLL", 0.01)
    monkeypatch.setattr(files, "BEAT", 0.05)
    monkeypatch.setattr(files, "SILENT", 0.5)
    if request.param == "lease":
        monkeypatch.setattr(files, "_flock", no_flock)
    return str(request.param)


def no_flock(descriptor: int) -> bool:
    raise OSError(errno.ENOSYS, "Function not implemented")


def hold(path: Path, inside: Any, waiting: Any = lambda: None) -> threading.Thread:
    def work() -> None:
        with files.locked(path, waiting):
            inside()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.usefixtures("kind")
def test_one_at_a_time_however_long_and_the_other_is_told_once(tmp_path: Path) -> None:
    inside, told = [], []

    def work() -> None:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.8)  # longer than a silent holder would be waited for
        inside.clear()

    threads = [hold(tmp_path / "lock", work, lambda: told.append(1)) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert len(told) == 2
    assert not inside
    with files.locked(tmp_path / "lock", lambda: told.append(1)):
        assert len(told) == 2


def test_what_a_dead_holder_left_does_not_hold(tmp_path: Path, kind: str) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    (tmp_path / "lock.lease").touch()  # of another host, or empty
    told: list[int] = []
    start = time.monotonic()
    with files.locked(lock, lambda: told.append(1)):
        assert (time.monotonic() - start > 0.5) == (kind == "lease") == bool(told)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["lock"] if kind == "lease" else ["lock", "lock.lease"])


def test_a_lock_that_was_taken_over_is_not_taken_away_by_its_first_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_flock", no_flock)
    with files.locked(tmp_path / "lock"):
        (tmp_path / "lock.lease").write_text("another's")
    assert (tmp_path / "lock.lease").read_text() == "another's"


def test_a_killed_process_frees_its_lock(tmp_path: Path) -> None:
    code = (
        f"from qbench.files import locked; import time\nwith locked({str(tmp_path / 'lock')!r}):\n"
        " print(1, flush=True)\n time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        told: list[int] = []
        waiter = hold(tmp_path / "lock", lambda: None, lambda: told.append(1))
        while not told:
            time.sleep(0.01)
        other.kill()
        waiter.join(10)
        assert not waiter.is_alive()


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.locked(tmp_path / "nowhere" / "lock"):
        pass


def test_without_a_home_the_cache_is_a_private_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QBENCH_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    place = files.cache_folder()
    assert place == files.cache_folder() == tmp_path / f"qbench-{os.getuid()}"
    assert place.stat().st_mode & 0o777 == 0o700
    place.rmdir()
    place.symlink_to(tmp_path)  # planted
    with pytest.raises(UserError, match=r"there is no home folder, and .* cannot be used; set QBENCH_CACHE"):
        files.cache_folder()


def test_only_our_own_parts_are_removed(tmp_path: Path) -> None:
    kept = [".notes.txt", ".model.pt.abcdefgh", ".gitignore", "model.pt", f"x{TEMPORARY}"]
    for name in kept:
        (tmp_path / name).write_text("the user's")
    (tmp_path / f".folder{TEMPORARY}").mkdir()
    (tmp_path / f".link{TEMPORARY}").symlink_to(tmp_path / "model.pt")
    (tmp_path / f".model.pt.x1{TEMPORARY}").write_text("cut off")
    remove_parts(tmp_path)
    left = {*kept, f".folder{TEMPORARY}", f".link{TEMPORARY}"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_a_write_that_is_killed_leaves_a_name_that_is_removed(tmp_path: Path) -> None:
    import os

    from qbench.files import atomic_write

    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os._exit(9)  # type: ignore[assignment]
        atomic_write(tmp_path / "model.pt", "weights")
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())
