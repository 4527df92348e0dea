"""What a run leaves: its result, manifest, pictures, and the hash of its weights."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn

import qbench
from qbench import files
from qbench.errors import UserError
from qbench.figures import pictures
from qbench.lowbit import container
from qbench.lowbit.sizes import totals
from qbench.quant import surgery
from qbench.training import checkpoint, home, packed, trainer
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


def _sizes(
    model: nn.Module, config: Mapping[str, Any], result: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(five sizes and the sums of multiplications and bit operations, these of each layer), or why there are none."""
    try:
        data = packed.file_of(model, config, result)
    except UserError as error:
        return {"not_packed": str(error)}, {}
    meta = container.opened(data, "the packed file").meta
    sizes = {**meta["sizes"], "file_bytes": len(data)}
    return {"sizes": sizes, **totals(meta["layers"])}, meta["layers"]


def write(run: Run, model: nn.Module, kept: dict[str, str], recorder: Recorder, result: dict[str, Any]) -> None:
    """Everything a run leaves; result.json last, then the checkpoint goes."""
    folder = run.folder
    checkpoint.save(folder / "model.pt", model.state_dict())
    manifest = surgery.manifest(model, kept)
    images = {k: getattr(run.data, k) for k in ("channels", "classes", "size")}  # so that `qbench.load` needs no data
    config = {**run.config, "dataset": {**run.config["dataset"], **images}}
    sized, manifest["costs"] = _sizes(model, config, result)
    result |= sized
    files.atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))
    files.atomic_write(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
    recorder.flush()
    pictures.draw(folder, result, run.config["figures"])
    recorder.result(result)
    recorder.close()
    home.clean(folder)
