"""A run before anything is computed: its data, its identity and its folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qbench import files
from qbench.config import options
from qbench.config.identity import digest, folder_name, identity, needs_parent, parent_of
from qbench.data import DataSet, load
from qbench.errors import UserError
from qbench.records import RESULT, read_result
from qbench.screen import Screen
from qbench.training import checkpoint, precision
from qbench.training.build import make_model

# Float parents that travel with the repository, so that every run starts from the same nets.
COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "results" / "parents"


@dataclass
class Run:
    """One run's place and identity, before anything is computed."""

    config: dict[str, Any]
    data: DataSet
    folder: Path
    key: str
    identity: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.config["method"]["name"])

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run, or None."""
        path = self.folder / "result.json"
        return read_result(path) if path.is_file() else None


def prepare(config: dict[str, Any], data: DataSet | None = None) -> Run:
    """Load the data, decide what was left to `auto`, and name the run's folder."""
    data = load(config["dataset"]) if data is None else data
    options.check_size(config, len(data.train))
    plain = config
    config = precision.decided(config, lambda: make_model(plain, data))
    facts = {k: getattr(data, k) for k in ("name", "checksum", "augment", "mean", "std")}
    if data.preprocess != "standard":
        facts["preprocess"] = data.preprocess
    if data.classes != int(data.train.labels.max()) + 1:  # else the labels say it, and the checksum holds them
        facts["classes"] = data.classes
    init = config["init"]
    if init == "float":
        parent = parent_of(config)
        init = "float " + digest(identity(parent, facts, "scratch"))
    elif init != "scratch":
        init = files.sha256_file(checkpoint_file(init))
    whole = identity(config, facts, init)
    if (distill := config["distill"])["weight"]:
        if distill.get("teacher"):
            whole["teacher"] = files.sha256_file(checkpoint_file(distill["teacher"], "distill.teacher"))
        elif not init.startswith("float ") and needs_parent(config):
            whole["teacher"] = digest(identity(parent_of(config), facts, "scratch"))
    key = digest(whole)
    return Run(config, data, Path(config["out"]) / folder_name(config, key), key, whole)


def checkpoint_file(name: str, option: str = "init") -> Path:
    """The weights that `init=name`, or another option, means: a file, or the model.pt of a run folder."""
    path = Path(name).expanduser()
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        words = "neither 'scratch' nor 'float' nor" if option == "init" else "not"
        raise UserError(f"{option}={name}: {words} a checkpoint file or run folder")
    return path


def start_from_file(run: Run, model: nn.Module, screen: Screen) -> Path | None:
    """Load the checkpoint that `init` names into `model`, and return its path; None where it names none.

    Errors: UserError where it does not fit, or where it is one of ours that was trained on other data.
    """
    init = run.config["init"]
    if init in ("scratch", "float"):
        return None
    path = checkpoint_file(init)
    beside = path.parent / RESULT
    if beside.is_file() and read_result(beside)["identity"]["data"]["checksum"] != run.data.checksum:
        # its test images may have been training images
        raise UserError(f"{path} was trained on other data than dataset={run.data.name} (or another split of it)")
    for line in checkpoint.load_weights(model, path, run.config["init_head"] == "new"):
        screen.line(f"  {line}")
    return path


def parent_places(parent: Run) -> list[Run]:
    """The float parent where it may lie: with the repository, or where it is trained."""
    return [replace(parent, folder=COMMITTED / parent.folder.name), parent]
