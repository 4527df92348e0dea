"""What a run leaves: its result, manifest, pictures, and hashes of weights and code."""

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

import qbench
from qbench import checkpoint, files, plots, surgery, telemetry_plots, trainer
from qbench.recorder import Recorder, read
from qbench.resolve import digest

if TYPE_CHECKING:
    from qbench.run import Run


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of every tensor of the net."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            sha.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def code_hash(config: Mapping[str, Any]) -> str:
    """Ten hex digits over the source of the core and of the modules that this run's configuration names."""
    core = (
        "ops",
        "quantizer",
        "quantizers",
        "uniform",
        "layers",
        "surgery",
        "hooks",
        "trainer",
        "evaluation",
        "optim",
        "recipe",
    )
    names = {f"qbench.{name}" for name in core}
    text = json.dumps([config["method"], config["model"]])
    names |= {target.rpartition(".")[0] for target in re.findall(r'"_target_": "([^"]+)"', text)}
    sources = []
    for name in sorted(names):
        with suppress(ImportError, OSError):
            sources.append(inspect.getsource(importlib.import_module(name)))
    return digest(sources)


def summary(run: "Run", model: nn.Module, outcome: trainer.Outcome) -> dict[str, Any]:
    config = run.config
    result = {k: config[k] for k in ("budget", "w_bits", "a_bits", "seed", "protocol", "init")}
    result |= {k: config[k]["name"] for k in ("method", "model", "dataset")}
    result |= vars(outcome)
    result |= surgery.size(model)
    result |= {"weights_sha256": weights_sha256(model), "version": qbench.__version__, "torch": torch.__version__}
    result |= {"precision": config["train"]["precision"], "key": run.key}
    if "auto" in config:
        result["auto"] = config["auto"]
    result |= {"identity": run.identity, "epochs": config["train"]["epochs"], "seconds": round(outcome.seconds, 1)}
    return result


def write(run: "Run", model: nn.Module, kept: dict[str, str], recorder: Recorder, result: dict[str, Any]) -> None:
    """Everything a run leaves; result.json last, then the checkpoint goes."""
    folder = run.folder
    checkpoint.save(folder / "model.pt", model.state_dict())
    manifest = surgery.manifest(model, kept)
    files.atomic_write(folder / "manifest.json", json.dumps(manifest, indent=1))
    files.atomic_write(folder / "config.yaml", yaml.safe_dump(json.loads(json.dumps(run.config)), sort_keys=False))
    recorder.flush()
    records = read(folder)
    if run.config["train"]["steps"] != 0:
        plots.curves(folder, result, records)
    if any("quantizer" in entry for entry in manifest["weights"].values()):
        plots.histograms(folder, result, records)
        telemetry_plots.telemetry(folder, result, records)
    recorder.result(result)
    recorder.close()
    for path in (
        folder / "checkpoint.pt",
        folder / "before.json",
        *folder.glob(".*.*"),
    ):  # .*.*: writes cut off by a kill
        path.unlink(missing_ok=True)
