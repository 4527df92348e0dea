"""What is written under a temporary name, and what is removed of it."""

from pathlib import Path

from qbench.files import TEMPORARY, remove_parts


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
