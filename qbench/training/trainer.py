"""calibrate -> train -> evaluate: the only loop that trains a whole net."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbench import kernels
from qbench.config.recipe import Recipe
from qbench.errors import UserError
from qbench.quant.method import Hook, Method, StageState, State
from qbench.quant.quantizer import Quantizer
from qbench.screen import Screen
from qbench.training import captured, checkpoint
from qbench.training.evaluation import Batches, evaluate, rank, world
from qbench.training.interrupt import Interrupted, Stop
from qbench.training.optim import (
    make_optimizers,
    optimizer_names,
    parameter_groups,
    set_lr,
)
from qbench.training.recorder import Recorder
from qbench.training.stages import Part, parts, switch
from qbench.training.step import Step
from qbench.training.telemetry import Telemetry

LOGS_PER_EPOCH = 10
REPORTED = "fp32"  # accuracies are those of the net as `qbench.load` gives it, whatever it was trained in


@dataclass
class Outcome:
    """What a training phase came to. Accuracies in percent on the test set; `best` was chosen on it."""

    accuracy_last: float | None = None
    accuracy_best: float | None = None
    epoch_best: float | None = None
    val_best: float | None = None
    accuracy_at_best_val: float | None = None
    seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


class Trainer(Step):
    """Trains one net stage by stage, from a checkpoint where there is one.

    Everything that decides the next step is a pure function of the step number or is in the checkpoint, so that a run
    cut off anywhere ends with the same weights as one that was not.

    graph: whether a step becomes a CUDA graph on a GPU (auto, True or False); graphs: what records it, by default
    torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        recipe: Recipe,
        train: Batches,
        tests: Mapping[str, Batches],
        *,
        folder: Path,
        recorder: Recorder | None,
        device: torch.device,
        generator: torch.Generator,
        screen: Screen,
        hooks: Sequence[Hook] = (),
        teacher: nn.Module | None = None,
        calibration: Batches | None = None,
        compile: bool = False,
        graph: bool | str = "auto",
        graphs: captured.Graphs | None = None,
        checkpoint_seconds: float = 60,
        phase: str = "train",
    ) -> None:
        self.model, self.method = model, method
        self.train_batches, self.tests = train, tests
        self.folder, self.recorder, self.device, self.screen = folder, recorder, device, screen
        self.hooks = nn.ModuleList([*method.hooks, *hooks]).to(device)
        self.labels_weight = math.prod(h.labels_weight for h in self.own_hooks())
        self.net = torch.compile(model) if compile else kernels.fuse(model)
        self.compile, self.checkpoint_seconds, self.phase = compile, checkpoint_seconds, phase
        self.steps_per_epoch = len(train)
        self.parts = parts(method, recipe, self.steps_per_epoch)
        self.total = sum(part.steps for part in self.parts)
        self.idle = not self.total and len(self.parts) == 1 and self.parts[0].stage.act is None
        first = self.parts[0].recipe
        self.state = State(
            model=model,
            generator=generator,
            steps=self.total,
            teacher=teacher,
            calibration=calibration,
            warmup=self._share(first.warmup),
            lr_drops=tuple(map(self._share, first.milestones)) if first.schedule == "step" else (),
        )
        self.quantizers = [m for part in (model, self.hooks) for m in part.modules() if isinstance(m, Quantizer)]
        for q in self.quantizers:
            q.generator = generator
        self.outcome, self.telemetry = Outcome(), Telemetry()
        self.makers: list[dict[str, Any]] = []  # by what code, torch and threads it is computed, from which step on
        gpu = device.type == "cuda" or graphs is not None
        names = [n for part in self.parts for n in optimizer_names(method, part.recipe)]
        self.eager = captured.why_not((model, self.hooks), names, gpu, compile)
        self.captured: captured.Captured | None = None
        self.graph, self.graphs = graph, graphs
        self.losses: list[Tensor] = []
        self.correct = torch.zeros((), device=device)
        self.seen = 0
        self.started = self.saved = time.monotonic()
        self.last_saved_step: int | None = None
        self.stop = Stop()
        self._enter(0)

    def _share(self, epochs: float) -> float:
        """Epochs as a share of the training, on a whole step."""
        return round(epochs * self.steps_per_epoch) / max(1, self.total)

    def _enter(self, index: int, step: int = 0) -> None:
        """Make the present stage the one of this index: its recipe, and an optimizer of its own."""
        part = self.parts[index]
        self.recipe, state = part.recipe, self.state
        state.stage = StageState(part.stage.name, index, step, part.steps, part.stage.value)
        for q in self.quantizers:
            q.pieces = (self.recipe.accumulate, world())
        recorded = captured.asked(self.graph, self.eager)
        groups = parameter_groups(self.model, self.own_hooks(), self.method, self.recipe)
        self.optimizer = make_optimizers(groups, self.recipe, self.device, recorded, state.generator)
        state.optimizer = self.optimizer
        self.captured = None
        if recorded:
            graphs = self.graphs or captured.CudaGraphs(self.device, state.generator)
            self.captured = captured.Captured(self._compute, graphs)
        if self.recorder is not None:
            self.recorder.stage = part.stage.name if self.method.stages else None

    @property
    def checkpoint_path(self) -> Path:
        """Where this run's state lies while it is unfinished."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint (rank 0; the random states of every worker are in it)."""
        randoms: list[Any] = [None] * world()
        mine = {"global": checkpoint.random_state(), "own": self.state.generator.get_state()}
        if dist.is_initialized():
            dist.all_gather_object(randoms, mine)
        else:
            randoms = [mine]
        self.saved = time.monotonic()
        self.last_saved_step = self.state.step
        if rank() == 0:
            if self.recorder is not None:
                self.recorder.flush()
            elapsed = self.outcome.seconds + time.monotonic() - self.started
            checkpoint.save(
                self.checkpoint_path,
                {
                    "step": self.state.step,
                    "stage": [self.state.stage.index, self.state.stage.step],
                    "records": None if self.recorder is None else self.recorder.count,
                    "records_sha256": None if self.recorder is None else self.recorder.sha256,
                    "model": self.model.state_dict(),
                    "hooks": self.hooks.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "randoms": randoms,
                    "kernels": kernels.tier(),
                    "telemetry": self.telemetry.state_dict(),
                    "makers": self.makers,
                    "outcome": {**vars(self.outcome), "seconds": elapsed},
                    "running": [self.losses and torch.stack(self.losses).cpu(), self.correct.cpu(), self.seen],
                },
            )

    def restore(self, content: Any = None) -> bool:
        """Continue from the checkpoint if there is one; `content` is what it holds, where it has been read."""
        if content is None:
            if not self.checkpoint_path.is_file():
                return False
            content = checkpoint.load(self.checkpoint_path)
        with checkpoint.belonging(self.checkpoint_path, content, self.total):
            self.model.load_state_dict(content["model"])
            self.hooks.load_state_dict(content["hooks"])
            index, step = content["stage"]
            self._enter(index, step)
            self.optimizer.load_state(content["optimizer"])
            mine = content["randoms"][rank()]
            self.state.step = self.last_saved_step = content["step"]
            self.state.epoch = self.state.step / self.steps_per_epoch
            checkpoint.set_random_state(mine["global"])
            self.state.generator.set_state(mine["own"])
            self.outcome = Outcome(**content["outcome"])
            self.telemetry.load_state_dict(content.get("telemetry", {}))
            self.makers = list(content.get("makers", []))
            losses, correct, self.seen = content["running"]
            if type(losses) not in (list, torch.Tensor) or correct.shape != () or type(self.seen) is not int:
                raise ValueError("'running' must be losses, how many images were right, and how many were seen")
            self.losses = list(losses.to(self.device).unbind()) if len(losses) else []
            self.correct.copy_(correct)
        return True

    def train(self) -> Outcome:
        """Run all stages to their end; returns what they came to."""
        if self.last_saved_step is None:
            self.begin()
        self.started = time.monotonic()
        with self.stop:
            while True:
                part = self.parts[self.state.stage.index]
                if part.stage.act is None:
                    self._train(part)
                else:
                    self._act(part)
                if part is self.parts[-1]:
                    break
                self._enter(self.state.stage.index + 1)
                self._begin()
                self._save_finite()
        for hook in self.own_hooks():
            hook.after_train(self.state)
        self.outcome.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        return self.outcome

    def begin(self) -> None:
        """What happens before the first step."""
        self._begin()
        for hook in self.own_hooks():
            hook.before_train(self.state)
        self.take_stock()

    def _begin(self) -> None:
        """What happens once at the begin of a stage."""
        if self.method.stages:
            switch(self.model, self.parts[self.state.stage.index].stage.quantize)
        for hook in self.own_hooks():
            hook.before_stage(self.state)

    def _train(self, part: Part) -> None:
        spe, state = self.steps_per_epoch, self.state
        every = max(1, round(self.recipe.evaluate_every * spe))
        name = f"{self.phase}, {part.stage.name}" if self.method.stages else self.phase
        if not part.steps and part is self.parts[-1]:
            with self.screen.phase(name, 0) as view:
                self._evaluate(view)
        with self.screen.phase(name, part.steps, state.stage.step) as view:
            while state.stage.step < part.steps:
                epoch, start = divmod(state.step, spe)
                for x, y in self.train_batches.epoch(epoch, start):
                    self._step(x, y)
                    step, last = state.stage.step, state.stage.step == part.steps
                    if state.step % max(1, spe // LOGS_PER_EPOCH) == 0 or last:
                        note = self._log()
                        view.advance(step, note)
                    if step % every == 0 or last:
                        self._evaluate(view)
                    self._keep(view)
                    if last:
                        break
                if world() > 1:
                    self._save_finite()

    def _act(self, part: Part) -> None:
        """Let the stage act, unit by unit; each is recorded and saved, so that a resumed run begins behind it."""
        state = self.state
        assert part.stage.act is not None
        with self.screen.phase(f"{self.phase}, {part.stage.name}", 0) as view:
            for done in part.stage.act(state):
                state.stage.step += 1
                state.stage.steps = done.total
                told = "  ".join(f"{k} {v:.4g}" for k, v in done.values.items())
                self.screen.line(f"  {state.stage.step} of {done.total}  {done.name}  {told}".rstrip())
                if self.recorder is not None:
                    self.recorder.unit(state.step, state.epoch, state.stage.step, done.name, done.values)
                self.save()
                self._keep(view)
            self._evaluate(view)

    def _keep(self, view: Any) -> None:
        """Stop where it was asked for, and save what is due."""
        if self._asked_to_stop():
            self._interrupt()
        if time.monotonic() - self.saved > self.checkpoint_seconds and world() == 1:
            self._save_finite()

    def _step(self, x: Tensor, y: Tensor) -> None:
        state, recipe = self.state, self.recipe
        state.lr_scale = recipe.lr_factor(state.stage.step, state.stage.steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            set_lr(group, group["top_lr"] * (1.0 if group["constant"] else state.lr_scale))
        if not self.model.training:  # after an evaluation; to say it to every module takes a third of a millisecond
            self.model.train()
        for hook in self.own_hooks():
            hook.before_step(state)
        try:
            loss = self._compute(x, y) if self.captured is None else self._replay(self.captured, x, y)
        except ValueError as error:  # torch's word for it, and that of our kernels
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"batch-norm sees one value per channel with batch_size={recipe.batch_size}, of which it cannot take a "
                "variance: give it a larger batch, or larger images"
            ) from error
        state.step += 1
        state.stage.step += 1
        state.epoch = state.step / self.steps_per_epoch
        for hook in self.own_hooks():
            hook.after_step(state)
        self.losses.append(loss)
        self.seen += len(y)

    def _log(self) -> str:
        """Record the training loss since the last log; stop on a loss that is not finite."""
        self._check_finite()
        state = self.state
        loss = float(torch.stack(self.losses).mean())
        accuracy = 100.0 * float(self.correct) / max(1, self.seen)
        self.losses, self.seen = [], 0
        self.correct.zero_()
        if self.recorder is not None:
            self.recorder.scalars(
                state.step,
                state.epoch,
                phase="train",
                loss=loss,
                accuracy=accuracy,
                lr=self.recipe.lr * state.lr_scale,
            )
            traces = {
                f"{name}.{key}": value
                for name, m in [*self.model.named_modules(), *self.hooks.named_modules()]
                if isinstance(m, Quantizer)
                for key, value in m.traces().items()
            }
            if traces:
                self.recorder.trace(state.step, state.epoch, traces)
        return f"loss {loss:.3f}"

    def _check_finite(self) -> None:
        losses = torch.stack(self.losses).tolist() if self.losses else []
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.state.step - len(losses) + i + 1
                good = (
                    f"last good checkpoint: {self.checkpoint_path} (step {self.last_saved_step})"
                    if self.last_saved_step is not None
                    else "no checkpoint was written yet"
                )
                raise UserError(
                    f"the loss of method={self.method.name} became {loss} at step {step} of {self.total}; {good}. "
                    "Try a lower train.lr, train.clip_grad=1, or train.precision=fp32."
                )

    def _save_finite(self) -> None:
        self._check_finite()
        self.save()

    def _evaluate(self, view: Any) -> None:
        state, out = self.state, self.outcome
        if dist.is_initialized():  # batch statistics differ between workers: all evaluate the first one's
            for b in self.model.buffers():
                dist.broadcast(b, 0)
        scores: dict[str, float] = {}
        for name, batches in self.tests.items():
            loss, scores[name] = self._scored(self.model, batches, name)
            if self.recorder is not None:
                self.recorder.scalars(state.step, state.epoch, phase=name, loss=loss, accuracy=scores[name])
        for hook in self.own_hooks():
            for name, net in hook.eval_models(state).items():
                out.extra[name] = self._scored(net, self.tests["test"], name)[1]
        test = scores["test"]
        out.accuracy_last = test
        whole = all(q.enabled for q in self.quantizers)  # else it is another net than the one that is left
        if whole and (out.accuracy_best is None or test > out.accuracy_best):
            out.accuracy_best, out.epoch_best = test, state.epoch
        if whole and "val" in scores and (out.val_best is None or scores["val"] > out.val_best):
            out.val_best, out.accuracy_at_best_val = scores["val"], test
        self.take_stock()
        view.report(state.step, f"epoch {state.epoch:.4g}  test accuracy {test:.2f} %")

    def _scored(self, net: nn.Module, batches: Batches, name: str) -> tuple[float, float]:
        """(loss, accuracy in percent) in the precision in which the net will be used.

        Errors: UserError where the loss is not finite.
        """
        loss, accuracy = evaluate(net, batches, self.device, REPORTED)
        if not math.isfinite(loss):
            raise UserError(
                f"the {name} loss of method={self.method.name} is {loss} after step {self.state.step} of {self.total}: "
                "the net is no longer finite. Try a lower train.lr, train.clip_grad=1, or train.precision=fp32."
            )
        return loss, accuracy

    def take_stock(self) -> None:
        """Record histograms and telemetry of every quantized layer."""
        if self.recorder is not None:
            self.telemetry.record(self.model, self.recorder, self.state.step, self.state.epoch)

    def _asked_to_stop(self) -> bool:
        """Whether any worker was asked to: all of them stop after the same step."""
        if world() == 1:
            return self.stop.asked
        flag = torch.tensor(float(self.stop.asked), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def where(self) -> str:
        """How far the training is, in words."""
        stage = self.state.stage
        if self.parts[stage.index].stage.act is not None:
            of = f" of {stage.steps}" if stage.steps else ""  # a resumed stage does not know yet
            return f"in stage {stage.name}, {stage.step}{of} done"
        return f"at step {self.state.step} of {self.total}" + (f", stage {stage.name}" if self.method.stages else "")

    def _interrupt(self) -> None:
        self._save_finite()
        raise Interrupted(
            f"stopped {self.where()}; everything is saved in {self.folder}. The same command goes on from there."
        )
