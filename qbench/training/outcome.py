"""What a run leaves: its result, manifest, pictures, and the hash of its weights."""

import json
from typing import Any

import torch
import yaml
from torch import nn

import qbench
from qbench import files
from qbench.figures import pictures
from qbench.quant import surgery
from qbench.training import checkpoint, home, trainer
from qbench.training.recorder import Recorder
from qbench.training.run import Run


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of every tensor of the net."""
    return checkpoint.sha256_of(model.state_dict())


def summary(run: Run, model: nn.Module, outcome: trainer.Outcome) -> dict[str, Any]:
    config = run.config
    result = {k: config[k] for k in ("budget", "w_bits", "a_bits", "seed", "protocol", "init")}
    result |= {k: config[k]["name"] for k in ("method", "model", "dataset")}
    result |= vars(outcome)
    result |= surgery.size(model) | surgery.learned_bits(model, config["method"])
    result |= {"weights_sha256": weights_sha256(model), "version": qbench.__version__, "torch": torch.__version__}
    result |= {"precision": config["train"]["precision"], "evaluated_in": trainer.REPORTED, "key": run.key}
    if "auto" in config:
        result["auto"] = config["auto"]
    result |= {"identity": run.identity, "epochs": config["train"]["epochs"], "seconds": round(outcome.seconds, 1)}
    return result


def write(run: Run, model: nn.Module, kept: dict[str, str], recorder: Recorder, result: dict[str, Any]) -> None:
    """Everything a run leaves; result.json last, then the checkpoint goes."""
    folder = run.folder
    checkpoint.save(folder / "model.pt", model.state_dict())
    manifest = surgery.manifest(model, kept)
    files.atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))
    images = {k: getattr(run.data, k) for k in ("channels", "classes", "size")}  # so that `qbench.load` needs no data
    config = {**run.config, "dataset": {**run.config["dataset"], **images}}
    files.atomic_write(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
    recorder.flush()
    pictures.draw(folder, result, run.config["figures"])
    recorder.result(result)
    recorder.close()
    home.clean(folder)
