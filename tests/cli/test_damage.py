"""Files of a run that were damaged, copied, or come from elsewhere: each is refused by name, and nothing of it runs."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import qbench
from qbench.errors import UserError
from qbench.records import read_result, sealed

Cli = Callable[..., Any]
PACT = ("method=pact", "bits=8", "init=scratch", "out=o")


def only(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"{name}-*")
    return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a run's config.yaml as whoever made the folder could: result.json vouches for it."""
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    result = path.parent / "result.json"
    result.write_text(json.dumps(sealed(json.loads(result.read_text()), path.parent)))


def test_a_folder_from_elsewhere_runs_nothing(
    tiny: Cli, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny(*PACT).status == 0
    folder = only(tmp_path / "o", "pact")
    evil = {"_target_": "pathlib.Path.write_text", "_args_": [{"_target_": "pathlib.Path", "_args_": ["ran"]}, "x"]}
    whole = (folder / "config.yaml").read_text()
    rewrite(folder / "config.yaml", lambda c: c["model"].update(parts=[evil]))
    said = cli("eval", folder)
    assert (said.status, "config.yaml: model.parts.0._args_.0._target_ names 'pathlib.Path'" in said.err) == (2, True)
    with pytest.raises(UserError, match="allow=pathlib"):
        qbench.load(folder)
    assert not Path("ran").exists()

    (tmp_path / "mynets.py").write_text("from qbench.models.tiny import Tiny\nclass Net(Tiny):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (folder / "config.yaml").write_text(whole)
    rewrite(folder / "config.yaml", lambda c: c["model"].update(_target_="mynets.Net"))
    said = cli("eval", folder)
    assert (said.status, "allow=mynets" in said.err, "mynets" in sys.modules) == (2, True, False)
    said = cli("eval", folder, "allow=mynets", "device=cpu")
    assert said.status == 0, said.err
    assert type(qbench.load(folder, allow=("mynets",))).__name__ == "Net"
    said = cli("eval", folder, "device=gpu")
    assert (said.status, "Available: auto, cpu, cuda" in said.err) == (2, True)


def test_weights_that_are_not_the_runs_own_are_refused_wherever_they_are_read(
    tiny: Cli, cli: Cli, tmp_path: Path
) -> None:
    assert tiny("method=float", "out=o").status == 0
    folder = only(tmp_path / "o", "float")
    state = torch.load(folder / "model.pt", weights_only=True)
    state["fc.bias"][0] += 1
    torch.save(state, folder / "model.pt")
    for words in (("method=pact", "bits=4", "out=o"), ("method=pact", f"init={folder}", "out=p")):
        said = tiny(*words)
        assert (said.status, "model.pt is damaged: its weights are not those of" in said.err) == (2, True)
    assert "model.pt is damaged" in cli("eval", folder).err
    with pytest.raises(UserError, match=r"model\.pt is damaged"):
        qbench.load(folder)


def test_a_copied_result_is_not_that_of_the_run(tiny: Cli, tmp_path: Path) -> None:
    assert tiny("method=float", "out=o").status == 0
    assert tiny("method=float", "out=o", "seed=1").status == 0
    one, other = sorted((tmp_path / "o").glob("float-*"))
    shutil.copy(one / "result.json", other / "result.json")
    seeds = [read_result(one / "result.json")["seed"]]
    said = tiny("method=float", "out=o", f"seed={1 - seeds[0]}")
    assert (said.status, "result.json is of another run" in said.err) == (2, True)


def test_a_parent_without_training_is_refused(tiny: Cli, tmp_path: Path) -> None:
    for _ in range(2):  # when it is made, and when it is found
        said = tiny("method=pact", "bits=4", "out=o", "parent.epochs=0")
        assert (said.status, "was not trained (epochs=0)" in said.err) == (2, True), said.err


def test_files_of_the_user_survive_the_end_of_a_run(tiny: Cli, tmp_path: Path) -> None:
    assert tiny(*PACT).status == 0
    folder = only(tmp_path / "o", "pact")
    (folder / "result.json").unlink()
    for name in (".notes.txt", ".model.pt.abcdefgh"):
        (folder / name).write_text("the user's")
    (folder / ".a.folder").mkdir()
    assert tiny(*PACT).status == 0
    assert all((folder / n).exists() for n in (".notes.txt", ".model.pt.abcdefgh", ".a.folder", "result.json"))


def test_fewer_bits_from_a_quantized_run(tiny: Cli, tmp_path: Path) -> None:
    assert tiny(*PACT).status == 0
    folder = only(tmp_path / "o", "pact")
    for more in ((), ("plan=true",)):
        said = tiny("method=pact", "bits=4", f"init={folder}", "out=p", *more)
        assert said.status == 0, said.err
        assert "tensors of quantizers are left behind" in said.out
    assert "% in float)" in tiny("method=pact", "bits=2", f"init={folder}", "out=p").out
    said = tiny("method=flexor", "init=scratch", "out=f")
    assert said.status == 0, said.err
    answers = set()
    for more in ((), ("plan=true",)):
        said = tiny("method=pact", "bits=4", f"init={only(tmp_path / 'f', 'flexor')}", "out=p", *more)
        assert said.status == 2
        answers.add(said.err)
    (answer,) = answers
    assert "model.pt is of another architecture" in answer


def test_a_head_of_another_size_on_request(tiny: Cli, tmp_path: Path) -> None:
    assert tiny("method=float", "out=o").status == 0
    state = torch.load(only(tmp_path / "o", "float") / "model.pt", weights_only=True)
    state |= {"fc.weight": torch.zeros(100, 8), "fc.bias": torch.zeros(100)}
    torch.save(state, tmp_path / "hundred.pt")
    said = tiny("method=pact", "bits=4", "init=hundred.pt", "out=p")
    assert (said.status, "init_head=new starts the last layer anew" in said.err) == (2, True)
    said = tiny("method=pact", "bits=4", "init=hundred.pt", "init_head=new", "out=p")
    assert said.status == 0, said.err
    assert "init_head=new: fc keeps its initial values" in said.out
    result = read_result(only(tmp_path / "p", "pact") / "result.json")
    assert result["identity"]["init_head"] == "new"
    for wrong in (("init_head=old", "init=hundred.pt"), ("init_head=new", "init=scratch")):
        said = tiny("method=pact", "bits=4", *wrong, "out=q")
        assert (said.status, "init_head" in said.err) == (2, True)
