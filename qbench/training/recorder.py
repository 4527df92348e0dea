"""What a run leaves behind: metrics.jsonl (the source of truth), its mirror in TensorBoard, and result.json."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.files import atomic_write
from qbench.records import METRICS, RESULT, read_metrics, sealed

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

DISTINCT = 256  # up to so many different values are counted one by one; more are binned


class Recorder:
    """Appends records to `folder`/metrics.jsonl, one JSON object a line, each flushed as it is written.

    Without `resume_step` the run starts anew and what an earlier one recorded is dropped; with it, records up to and
    including that step, and of these the first `resume_records`, stay and later ones are dropped, in TensorBoard too,
    so that everything stands there once. `count` is the number of records so far, `sha256` the hash of their lines;
    where the checkpoint holds that (`resume_sha256`), what stays must have it.

    Numbers are rounded to six significant digits; NaN and infinity become null.

    Errors: UserError when the folder cannot be written or metrics.jsonl is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        resume_records: int | None = None,
        resume_sha256: str | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        self.stage: str | None = None  # the stage that scalars belong to, where a method has several
        last = -1 if resume_step is None else resume_step
        kept = [] if resume_step is None else [r for r in read_metrics(self.folder) if r["step"] <= last]
        kept = kept[:resume_records]
        self.count = len(kept)
        text = "".join(map(_line, kept))
        self._sha256 = hashlib.sha256(text.encode())
        if resume_sha256 not in (None, self.sha256):
            raise UserError(
                f"{self.folder / METRICS} is corrupt: it is not what the run had written when its checkpoint was "
                "saved; move the folder away to run again"
            )
        path = atomic_write(self.folder / METRICS, text)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._purge_step = last + 1
        self._writer: SummaryWriter | None = None

    @property
    def sha256(self) -> str:
        """64 hex digits over the lines of all records so far."""
        return self._sha256.hexdigest()

    def scalars(self, step: int, epoch: float, phase: str = "train", **values: float | Tensor | None) -> None:
        """Records {"step", "epoch", "phase", name: value, ...}; in TensorBoard each is `name/phase`."""
        stage = {} if self.stage is None else {"stage": self.stage}
        record = self._append({"step": step, "epoch": epoch, "phase": phase, **stage, **values})
        self._mirror(((f"{name}/{phase}", record[name]) for name in values), step)

    def unit(self, step: int, epoch: float, number: int, name: str, values: Mapping[str, float]) -> None:
        """Records {"step", "epoch", "unit": {"stage", "number", "name", "values"}}: what an acting stage has done."""
        self._append(
            {
                "step": step,
                "epoch": epoch,
                "unit": {"stage": self.stage, "number": number, "name": name, "values": values},
            }
        )
        self._mirror(((f"{name}/{self.stage}", value) for name, value in values.items()), number)

    def trace(self, step: int, epoch: float, values: Mapping[str, float | Tensor]) -> None:
        """Records {"step", "epoch", "traces": {name: value}}: scales of quantizers; in TensorBoard `trace/name`.

        The last word of a name says what it is, so that like is drawn with like: `layer1.conv1.weight_quantizer.step`.
        """
        record = self._append({"step": step, "epoch": epoch, "traces": values})
        self._mirror(((f"trace/{name}", value) for name, value in record["traces"].items()), step)

    def telemetry(self, step: int, epoch: float, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Records {"step", "epoch", "telemetry": {layer: {measure: value}}}; in TensorBoard `measure/layer`."""
        record = self._append({"step": step, "epoch": epoch, "telemetry": layers})
        flat = ((f"{what}/{layer}", v) for layer, found in record["telemetry"].items() for what, v in found.items())
        self._mirror(flat, step)

    def histograms(
        self, step: int, epoch: float, layers: Mapping[str, dict[str, Any]], kind: str = "histograms"
    ) -> None:
        """Records {"step", "epoch", kind: {layer: what `layer_histogram` gave}}: of weights, or of "activations"."""
        self._append({"step": step, "epoch": epoch, kind: layers})
        if not self.tensorboard:
            return
        before = "" if kind == "histograms" else f"{kind}/"
        for layer, histogram in layers.items():
            for part in ("latent", "quantized", "codes"):
                if histogram[part] and sum(histogram[part]["counts"]):
                    tag = f"{before}{part}/{layer}"
                    self._tensorboard().add_histogram_raw(tag, **_raw(histogram[part]), global_step=step)

    def result(self, values: Mapping[str, Any]) -> Path:
        """Writes result.json, whole or not at all; call it last, for where it stands the run is done.

        It seals itself and what lies beside it (`records.sealed`).
        """
        self.flush()
        content = sealed(_plain(values, digits=None), self.folder)
        text = json.dumps(content, sort_keys=True, indent=2, allow_nan=False)
        return atomic_write(self.folder / RESULT, text + "\n")

    def flush(self) -> None:
        """Puts everything on the disk; call it before a checkpoint, which must not run ahead of the records."""
        with self._naming():
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, record: dict[str, Any]) -> dict[str, Any]:
        record = _plain(record)
        line = _line(record)
        with self._naming():
            self._file.write(line)
            self._file.flush()
            gone = os.fstat(self._file.fileno()).st_nlink == 0
        if gone:
            raise UserError(f"{self.folder / METRICS} was removed while the run was at work")
        self.count += 1
        self._sha256.update(line.encode())
        return record

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.folder / METRICS}: {error.strerror}.") from error

    def _mirror(self, values: Iterable[tuple[str, float | None]], step: int) -> None:
        if self.tensorboard:
            for name, value in values:
                if value is not None:
                    self._tensorboard().add_scalar(name, value, step)

    def _tensorboard(self) -> "SummaryWriter":
        if self._writer is None:
            with warnings.catch_warnings():  # not ours to mend
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard.writer import SummaryWriter  # here: the import takes 1.5 s

                self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        return self._writer


def layer_histogram(
    latent: Tensor, quantized: Tensor, codes: Tensor | None, levels: int | None, bins: int = 64
) -> dict[str, Any]:
    """How the values of a layer lie before and after quantization, and how often each code is used.

    Values of any shape count as one flat float32 list. `latent` is binned; `quantized` and `codes` are counted value by
    value when there are few ("values", "counts"), else binned ("lo", "hi", "counts" over equal bins). The entropy of
    the codes is -sum p log2 p in bits a value, of at most log2(levels). What is not finite is left out and counted.
    """
    used = None
    if codes is not None:
        used, counts = _count(codes, bins)
        p = counts.double() / max(codes.numel(), 1)
        entropy = abs(float(-(p * p.log2()).sum()))  # abs: one code alone would give -0.0
        used |= {"distinct": len(counts), "entropy": entropy}
    finite = _finite(latent)
    return {
        "latent": _bin(finite, bins),
        "quantized": _count(quantized, bins)[0],
        "codes": used,
        "levels": levels,
        "count": latent.numel(),
        "nonfinite": latent.numel() - finite.numel(),
    }


def _finite(x: Tensor) -> Tensor:
    # On the CPU, as histc on CUDA is refused under deterministic algorithms; in float64, where hi - lo cannot overflow.
    x = x.detach().cpu().float().flatten()
    return x[x.isfinite()].double()


def _bin(x: Tensor, bins: int) -> dict[str, Any]:
    if not x.numel():
        return {"counts": [], "lo": None, "hi": None}
    lo, hi = x.min().item(), x.max().item()
    if lo == hi:
        half = 0.5 * (abs(lo) or 1.0)
        lo, hi = lo - half, hi + half
    return {"counts": torch.histc(x, bins, lo, hi).long().tolist(), "lo": lo, "hi": hi}


def _count(x: Tensor, bins: int) -> tuple[dict[str, Any], Tensor]:
    """The histogram of x, and how often each of its values comes."""
    x = _finite(x)
    values, counts = torch.unique(x, return_counts=True)
    few = {"values": values.tolist(), "counts": counts.tolist()} if len(values) <= DISTINCT else None
    return few or _bin(x, bins), counts


def _raw(histogram: Mapping[str, Any]) -> dict[str, Any]:
    """What add_histogram_raw takes; single values become bins that meet halfway between neighbours."""
    counts = torch.tensor(histogram["counts"], dtype=torch.float64)
    if "values" in histogram:
        centres = torch.tensor(histogram["values"], dtype=torch.float64)
        gaps = centres.diff() if len(centres) > 1 else torch.ones(1, dtype=torch.float64)
        limits = centres + torch.cat([gaps, gaps[-1:]])[: len(centres)] / 2
        lo, hi = centres[0] - gaps[0] / 2, limits[-1]
    else:
        edges = torch.linspace(histogram["lo"], histogram["hi"], len(counts) + 1, dtype=torch.float64)
        centres, limits = (edges[1:] + edges[:-1]) / 2, edges[1:]
        lo, hi = edges[0], edges[-1]
    return {
        "min": lo.item(),
        "max": hi.item(),
        "num": counts.sum().item(),
        "sum": (counts * centres).sum().item(),
        "sum_squares": (counts * centres.square()).sum().item(),
        "bucket_limits": limits.tolist(),
        "bucket_counts": counts.tolist(),
    }


def _plain(value: Any, digits: int | None = 6) -> Any:
    """`value` as JSON knows it: tensors as lists or numbers, rounded to significant digits, null where not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
