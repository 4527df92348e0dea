"""calibrate -> train -> evaluate: the only loop that trains a whole net."""

import math
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qbench import kernels
from qbench.config.recipe import Recipe
from qbench.errors import UserError
from qbench.quant.layers import quantized_weights
from qbench.quant.method import Hook, Method, State
from qbench.quant.quantizer import Quantizer
from qbench.screen import Screen
from qbench.training import captured, checkpoint
from qbench.training.evaluation import Batches, autocast, evaluate, rank, world
from qbench.training.interrupt import Interrupted, Stop
from qbench.training.optim import criterion, load_state, make_optimizer, parameter_groups, set_lr
from qbench.training.recorder import Recorder
from qbench.training.telemetry import Telemetry

LOGS_PER_EPOCH = 10


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


class Trainer:
    """Trains one net by one recipe, from a checkpoint where there is one.

    Everything that decides the next step is a pure function of the step number or is in the checkpoint, so that a run
    cut off anywhere ends with the same weights as one that was not.

    On a GPU the computing of a step becomes a CUDA graph (`graph`: auto, True or False; `graphs` is what records it, by
    default torch's). `eager` says why it does not; empty where it does.
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
        compile: bool = False,
        graph: bool | str = "auto",
        graphs: captured.Graphs | None = None,
        checkpoint_seconds: float = 60,
        phase: str = "train",
    ) -> None:
        self.model, self.method, self.recipe = model, method, recipe
        self.train_batches, self.tests = train, tests
        self.folder, self.recorder, self.device, self.screen = folder, recorder, device, screen
        self.hooks = nn.ModuleList([*method.hooks, *hooks]).to(device)
        self.net = torch.compile(model) if compile else kernels.fuse(model)
        self.compile, self.checkpoint_seconds, self.phase = compile, checkpoint_seconds, phase
        self.steps_per_epoch = len(train)
        self.total = recipe.total_steps(self.steps_per_epoch)
        self.state = State(
            model=model,
            generator=generator,
            steps=self.total,
            teacher=teacher,
            warmup=self._share(recipe.warmup),
            lr_drops=tuple(map(self._share, recipe.milestones)) if recipe.schedule == "step" else (),
        )
        self.quantizers = [m for part in (model, self.hooks) for m in part.modules() if isinstance(m, Quantizer)]
        for q in self.quantizers:
            q.generator = generator
        self.outcome, self.telemetry = Outcome(), Telemetry()
        gpu = device.type == "cuda" or graphs is not None
        self.eager = captured.why_not((model, self.hooks), recipe, gpu, compile)
        recorded = captured.asked(graph, self.eager)
        groups = parameter_groups(model, self.own_hooks(), method, recipe)
        self.optimizer = make_optimizer(groups, recipe, device, capturable=recorded)
        self.state.optimizer = self.optimizer
        self.captured: captured.Captured | None = None
        if recorded:
            self.captured = captured.Captured(self._compute, graphs or captured.CudaGraphs(device, generator))
        self.graph = graph
        self.losses: list[Tensor] = []
        self.correct = torch.zeros((), device=device)
        self.seen = 0
        self.started = self.saved = time.monotonic()
        self.last_saved_step: int | None = None
        self.stop = Stop()

    def _share(self, epochs: float) -> float:
        """Epochs as a share of this phase, on a whole step."""
        return round(epochs * self.steps_per_epoch) / max(1, self.total)

    def own_hooks(self) -> list[Hook]:
        return [h for h in self.hooks if isinstance(h, Hook)]

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
                    "model": self.model.state_dict(),
                    "hooks": self.hooks.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "randoms": randoms,
                    "kernels": kernels.tier(),
                    "telemetry": self.telemetry.state_dict(),
                    "outcome": {**vars(self.outcome), "seconds": elapsed},
                    "running": [self.losses and torch.stack(self.losses).cpu(), self.correct.cpu(), self.seen],
                },
            )

    def restore(self) -> bool:
        """Continue from the checkpoint if there is one."""
        if not self.checkpoint_path.is_file():
            return False
        content = checkpoint.load(self.checkpoint_path)
        with checkpoint.belonging(self.checkpoint_path, content, self.total):
            self.model.load_state_dict(content["model"])
            self.hooks.load_state_dict(content["hooks"])
            load_state(self.optimizer, content["optimizer"])
            mine = content["randoms"][rank()]
            self.state.step = self.last_saved_step = content["step"]
            checkpoint.set_random_state(mine["global"])
            self.state.generator.set_state(mine["own"])
            self.outcome = Outcome(**content["outcome"])
            self.telemetry.load_state_dict(content.get("telemetry", {}))
            losses, correct, self.seen = content["running"]
            self.losses = list(losses.to(self.device).unbind()) if len(losses) else []
            self.correct.copy_(correct)
        return True

    def train(self) -> Outcome:
        """Run the phase to its end; returns what it came to."""
        if self.state.step == 0:
            self._before_train()
        self.started = time.monotonic()
        spe = self.steps_per_epoch
        every = max(1, round(self.recipe.evaluate_every * spe))
        with self.screen.phase(self.phase, self.total, self.state.step) as view, self.stop:
            while self.state.step < self.total:
                epoch, start = divmod(self.state.step, spe)
                for x, y in self.train_batches.epoch(epoch, start):
                    self._step(x, y)
                    step = self.state.step
                    if step % max(1, spe // LOGS_PER_EPOCH) == 0 or step == self.total:
                        note = self._log()
                        view.advance(step, note)
                    if step % every == 0 or step == self.total:
                        self._evaluate(view)
                    if self._asked_to_stop():
                        self._interrupt()
                    if time.monotonic() - self.saved > self.checkpoint_seconds and world() == 1:
                        self._save_finite()
                    if step >= self.total:
                        break
                if world() > 1:
                    self._save_finite()
        for hook in self.own_hooks():
            hook.after_train(self.state)
        self.outcome.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        return self.outcome

    def _before_train(self) -> None:
        for hook in self.own_hooks():
            hook.before_train(self.state)
        self.take_stock()

    def _step(self, x: Tensor, y: Tensor) -> None:
        state, recipe = self.state, self.recipe
        state.lr_scale = recipe.lr_factor(state.step, self.total, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            set_lr(group, recipe.lr * state.lr_scale * group["lr_scale"])
        if not self.model.training:  # after an evaluation; to say it to every module takes a third of a millisecond
            self.model.train()
        for hook in self.own_hooks():
            hook.before_step(state)
        loss = self._compute(x, y) if self.captured is None else self._replay(self.captured, x, y)
        state.step += 1
        state.epoch = state.step / self.steps_per_epoch
        for hook in self.own_hooks():
            hook.after_step(state)
        self.losses.append(loss)
        self.seen += len(y)

    def _compute(self, x: Tensor, y: Tensor) -> Tensor:
        """From the batch to the stepped weights; the loss. All that a CUDA graph holds of a step."""
        state, recipe = self.state, self.recipe
        self.optimizer.zero_grad(set_to_none=True)
        state.logits = state.labels_loss = None  # their graph goes, and the stream that gathers gradients
        total = torch.zeros((), device=self.device)
        for state.inputs, state.labels in zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True):
            share = len(state.labels) / len(y)
            total += share * self._forward_backward(share)
        for hook in self.own_hooks():
            hook.after_backward(state)
        self._exchange()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        return total

    def _replay(self, step: captured.Captured, x: Tensor, y: Tensor) -> Tensor:
        """`_compute` as a CUDA graph; op by op from now on where torch cannot record it."""
        kind: Hashable = (
            tuple(q.enabled for q in self.quantizers),
            *(hook.phase(self.state) for hook in self.own_hooks()),
        )
        try:
            return step(x, y, kind)
        except captured.NotRecorded as error:
            self.eager = f"torch could not record it ({error})"
            captured.asked(self.graph, self.eager)
            self.screen.line(f"graph: off, {self.eager}")
            self.captured = None
            return self._compute(x, y)

    def _forward_backward(self, share: float) -> Tensor:
        """Forward and backward of one micro-batch, `share` of the batch; its loss, detached."""
        state = self.state
        assert state.inputs is not None
        assert state.labels is not None
        with autocast(self.device, self.recipe.precision):
            if self.compile:  # the compiled graph quantizes the weights itself
                state.logits = self.net(state.inputs)
            else:
                with quantized_weights(self.model):
                    state.logits = self.net(state.inputs)
        assert state.logits is not None
        loss = state.labels_loss = criterion(self.recipe, state.logits.float(), state.labels)
        for hook in self.own_hooks():
            extra = hook.loss(state)
            loss = loss if extra is None else loss + extra
        (loss * share).backward()  # type: ignore[no-untyped-call]
        self.correct += (state.logits.argmax(1) == state.labels).sum()
        return loss.detach()

    def _exchange(self) -> None:
        """Average the gradients over the workers."""
        if not dist.is_initialized():
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in parameters]
        for hook in self.own_hooks():
            hook.exchange(grads)
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world()
        for p, g in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = torch.empty_like(p).copy_(g.view_as(p))  # in the memory format of p, as fused optimizers want it

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
            loss, scores[name] = evaluate(self.model, batches, self.device, self.recipe.precision)
            if self.recorder is not None:
                self.recorder.scalars(state.step, state.epoch, phase=name, loss=loss, accuracy=scores[name])
        for hook in self.own_hooks():
            for name, net in hook.eval_models(state).items():
                out.extra[name] = evaluate(net, self.tests["test"], self.device, self.recipe.precision)[1]
        test = scores["test"]
        out.accuracy_last = test
        if out.accuracy_best is None or test > out.accuracy_best:
            out.accuracy_best, out.epoch_best = test, state.epoch
        if "val" in scores and (out.val_best is None or scores["val"] > out.val_best):
            out.val_best, out.accuracy_at_best_val = scores["val"], test
        self.take_stock()
        view.report(state.step, f"epoch {state.epoch:.4g}  test accuracy {test:.2f} %")

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

    def _interrupt(self) -> None:
        self._save_finite()
        raise Interrupted(
            f"stopped at step {self.state.step} of {self.total}; everything is saved in {self.folder}. "
            "The same command goes on from there."
        )
