"""A recorded and replayed step against the same step run op by op: bit for bit the same training, for every method."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from imitation import Imitation, OnDevice
from torch import Tensor, nn
from yamls import config_of

from qbench import kernels
from qbench.cli.overrides import resolve_row
from qbench.config import catalog
from qbench.config.recipe import Recipe
from qbench.data import load
from qbench.errors import UserError
from qbench.methods.shared import dorefa_weight
from qbench.quant.method import Hook, State
from qbench.training import captured, evaluation
from qbench.training.build import assemble, place_net
from qbench.training.captured import WARM, Captured
from qbench.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 14
NAMES = [n for n in catalog.names("method") if n not in catalog.aliases()]
EAGER = {"abcnet": "BinaryBases finds its scales by an eigendecomposition"}  # what says why it is not recorded
SCHEDULE = ("train.schedule=cosine", "train.warmup=1")
# Every method as it comes, and what in it changes with the step, draws numbers or takes another way through the code.
CASES: dict[str, tuple[str, ...]] = {name: (f"method={name}",) for name in NAMES if name not in EAGER}
CASES |= {
    "float, adam": ("method=float", "train.optimizer=adamw", "train.weight_decay=0.1"),
    "float, parts, clipped": ("method=float", "train.accumulate=2", "train.clip_grad=0.1"),
    "float, bf16": ("method=float", "precision=bf16"),
    "float, resnet": ("method=float", "model=resnet20", "model.width=0.25"),
    "pact, resnet": ("method=pact", "model=resnet20", "model.width=0.25", "options.last_input=8"),
    "flexor, doubling": ("method=flexor", "options.s_doublings=[0.6,0.8]", "options.s_warmup=0.5", "options.clip=true"),
    "flexor, ste": ("method=flexor", "options.mode=ste", "bits=1.6"),
    "qat, late": ("method=qat", "options.delay_steps=5", "options.freeze_after=0.7"),
    "qat, krishnamoorthi": ("method=qat", "options.fold=krishnamoorthi", "options.per_channel=true"),
    "dorefa, gradients": ("method=dorefa", "options.g_bits=6", "options.bound=abs"),
    "bnn, drawn": ("method=bnn", "options.stochastic=true"),
    "binaryconnect, drawn": ("method=binaryconnect", "options.stochastic=true"),
    "diffq, gaussian": ("method=diffq", "options.noise=gaussian", "train.accumulate=2"),
    "gupta, adam": ("method=gupta", "train.optimizer=adam"),
    "ttq, sparse": ("method=ttq", "options.sparsity=0.3"),
    "twn, optimal": ("method=twn", "options.rule=optimal"),
    "squared hinge": ("method=binaryconnect", "train.loss=squared_hinge"),
    "tga, all at once": ("method=tga", "options.turn=0"),
    "xnor, released": (
        *("method=xnor", "options.k=false", "options.gradient=released", "options.center=true", "options.clamp=true"),
    ),
    "recu, released": ("method=recu", "options.scale=learned", "options.normalize=true"),
    "fda_bnn, whole": ("method=fda_bnn", "options.noise_forward=true"),
    "lsq_plus, no offset": ("method=lsq_plus", "options.offset=false", "options.signed=true"),
    "pact_sawb, inputs": ("method=pact_sawb", "options.at_inputs=true", "options.clip_gradient=true"),
    "qil, down the ladder": ("method=qil", "bits=2", "options.gradient_scale=lsq"),
    "hwgq, lloyd": ("method=hwgq", "options.grid=lloyd", "options.backward=log", "options.affine=true"),
    "apot, down the ladder": ("method=apot", "bits=3", "options.ladder=[4]", "options.through=true"),
    "lqnet, parts": ("method=lqnet", "bits=3", "options.turns=2", "train.accumulate=2"),
    "distilled": ("method=lsq", "distill.weight=0.5"),
    "distilled from one that learns": ("method=lsq", "distill.weight=0.5", "distill.joint=true"),
    "distilled, no labels": ("method=reactnet", "distill.weight=1"),
}


def trainer(
    words: tuple[str, ...], folder: Path, graphs: Any, steps: int = STEPS, device: torch.device = CPU
) -> Trainer:
    data = ["model=tiny", "dataset=synthetic", "dataset.train_size=40", "dataset.test_size=16", "dataset.size=8"]
    base = [*data, "budget=smoke", "train.batch_size=8", f"train.steps={steps}", *SCHEDULE, "device=cpu"]
    taken = {w.partition("=")[0] for w in words}
    config = config_of(*(w for w in base if w.partition("=")[0] not in taken), *words)
    config |= {"init": "scratch", "checkpoint_seconds": 1e9}  # calibrated on batch statistics
    data, teachers = load(config["dataset"]), []

    def start(model: nn.Module) -> None:
        teachers.append(copy.deepcopy(place_net(model, device, True)).eval().requires_grad_(False))

    net = assemble(config, data, start, device)
    loop = net.trainer(folder, teacher=teachers[0], graphs=graphs, generator=graphs.generator if graphs else None)
    net.calibrate(loop)
    return loop


def state(loop: Trainer) -> dict[str, Tensor]:
    """Every tensor that a step may change."""
    found = {**loop.model.state_dict(), **{f"hooks.{k}": v for k, v in loop.hooks.state_dict().items()}}
    for n, optimizer in enumerate(loop.optimizer.state_dict()):
        for i, values in optimizer["state"].items():
            found |= {f"optimizer.{n}.{i}.{k}": v for k, v in values.items()}
    found |= {"losses": torch.stack(loop.losses), "correct": loop.correct, "random": loop.state.generator.get_state()}
    return {k: v.clone() for k, v in found.items() if isinstance(v, Tensor)}


def run_steps(loop: Trainer, steps: int = STEPS, first: int = 0) -> dict[str, Tensor]:
    if loop.state.step == 0:
        loop.begin()
    spe = loop.steps_per_epoch
    for step in range(first, steps):
        x, y = next(iter(loop.train_batches.epoch(*divmod(step, spe))))
        replayed = loop.captured is not None and bool(loop.captured.recorded)
        with OnDevice() if replayed else nullcontext():  # what surrounds a replay must not wait either
            loop._step(x, y)
    return state(loop)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ."""
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


def both(words: tuple[str, ...], folder: Path) -> tuple[Imitation, dict[str, Tensor], dict[str, Tensor]]:
    graphs = Imitation(torch.Generator())
    with kernels.using("torch"):
        loop = trainer(words, folder, graphs)
        recorded = run_steps(loop)
        assert loop.eager == ""
        plain = trainer(words, folder, Imitation(torch.Generator()))
        plain.captured = None
        return graphs, recorded, run_steps(plain)


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_steps(case: str, tmp_path: Path) -> None:
    graphs, recorded, plain = both(CASES[case], tmp_path)
    assert all(v.isfinite().all() for v in plain.values() if v.is_floating_point())
    assert same(recorded, plain) == []
    assert graphs.records >= 1
    assert graphs.replays == STEPS - graphs.eagers >= 2


def test_all_weights_in_one_row_as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dorefa_weight, "_DoReFaWeights", dorefa_weight._DoReFaWeightsInOneRow)
    graphs, recorded, plain = both(CASES["pact, resnet"], tmp_path)
    assert same(recorded, plain) == []
    assert graphs.replays >= 2


@pytest.mark.parametrize("detach", [False, True])
def test_one_row_of_weights_is_each_layer_by_itself(detach: bool) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (5, 7), (4, 4, 1, 1), (6, 3, 3, 3)]
    ws, gs = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(2))
    ws[0] = ws[0].contiguous(memory_format=torch.channels_last)
    ws[2].zero_()  # nothing to divide by
    ws[3].view(-1)[:3] = torch.tensor([5.0, 5.0, -5.0])  # three largest
    scales, leaves = [torch.tensor(s) for s in (1.3, 1.0, 0.7, 2.0)], [w.requires_grad_() for w in ws]
    found = []
    for function in (dorefa_weight._DoReFaWeights, dorefa_weight._DoReFaWeightsInOneRow):
        hats = function.apply([15, 3, 255, 15], [detach] * 4, *scales, *leaves)
        found.append([*hats, *torch.autograd.grad(hats, leaves, gs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert found[1][0].is_contiguous(memory_format=torch.channels_last)
    assert found[1][4].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        *((("method=" + name,), reason) for name, reason in EAGER.items()),
        (("method=flexor", "options.mode=analog"), "FleXOR differentiates a product"),
        (("method=float", "train.optimizer=rmsprop"), "its optimizer rmsprop is none of sgd, adam, adamw"),
    ],
)
def test_what_cannot_be_recorded_says_why(words: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    loop = trainer(words, tmp_path, Imitation(torch.Generator()))
    assert loop.captured is None
    assert loop.eager.startswith(reason)
    with pytest.raises(UserError, match="graph=true, but a step of this run cannot be a CUDA graph: "):
        captured.asked(True, loop.eager)


def test_on_the_cpu_nothing_is_recorded() -> None:
    reason = captured.why_not([nn.Identity()], ["sgd"], gpu=False)
    assert reason == "the run is not on a GPU"
    assert not captured.asked("auto", reason)
    assert captured.why_not([nn.Identity()], ["sgd"], gpu=True) == ""
    assert captured.asked("auto", "")
    assert captured.asked(True, "")
    assert not captured.asked(False, "")
    assert "compile=true" in captured.why_not([], ["sgd"], gpu=True, compile=True)
    with pytest.raises(UserError, match="auto, false, true"):
        resolve_row(["graph=yes"])


class Fading(Hook):
    """A loss whose weight moves with the step: through Python alone, or as the promise says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("share", torch.zeros(()))

    def phase(self, state: State) -> int:
        return state.step // 5 if self.way == "phase" else 0

    def before_step(self, state: State) -> None:
        self.share.fill_(state.step / state.steps)

    def loss(self, state: State) -> Tensor:
        share: Any = {"tensor": self.share, "phase": state.step // 5}.get(self.way, state.step / state.steps)
        size = sum(p.square().sum() for p in state.model.parameters())
        assert isinstance(size, Tensor)
        if self.way == "host" and size.item() < 0:
            return size
        return share * size


@pytest.mark.parametrize("way", ["python", "tensor", "phase", "host"])
def test_what_a_hook_reads_of_the_step_comes_through_a_tensor_or_its_phase(way: str, tmp_path: Path) -> None:
    """And the imitation tells a hook that keeps to it from one that does not."""
    said: list[str] = []
    graphs = Imitation(torch.Generator())

    def steps(recorded: bool) -> dict[str, Tensor]:
        loop = trainer(("method=float",), tmp_path, graphs)
        loop.hooks.append(Fading(way))
        loop.screen.line = said.append  # type: ignore[method-assign]
        loop.captured = loop.captured if recorded else None
        return run_steps(loop)

    differ = same(steps(True), steps(False))
    assert bool(differ) == (way == "python")
    assert (graphs.replays > 0) == (way != "host")
    if way == "host":
        assert said == ["graph: off, torch could not record it (item waits for the device)"]


def test_a_run_goes_on_from_its_checkpoint_recorded_or_not(tmp_path: Path) -> None:
    words = ("method=lsq", "train.optimizer=adam")
    straight = run_steps(trainer(words, tmp_path, Imitation(torch.Generator())))
    for stop, kinds in ((5, (True, True)), (9, (True, False)), (9, (False, True))):
        first = trainer(words, tmp_path / f"{stop}{kinds}", Imitation(torch.Generator()))
        first.captured = first.captured if kinds[0] else None
        run_steps(first, stop)
        first.save()
        again = trainer(words, first.folder, Imitation(torch.Generator()))
        correct = again.correct
        assert again.restore()
        again.captured = again.captured if kinds[1] else None
        assert again.correct is correct  # a recording holds this tensor
        assert all(isinstance(g["lr"], Tensor) and g["capturable"] for g in again.optimizer.param_groups)
        assert same(run_steps(again, first=stop), straight) == []


def test_a_checkpoint_of_another_device_keeps_the_way_the_optimizer_computes(tmp_path: Path) -> None:
    words = ("method=float", "train.optimizer=adam")
    plain = trainer(words, tmp_path, Imitation(torch.Generator()))
    from qbench.training.optim import load_state, make_optimizer, parameter_groups, set_lr

    groups = parameter_groups(plain.model, [], plain.method, plain.recipe)
    cpu = make_optimizer(groups, plain.recipe)
    (gpu,) = plain.optimizer.members
    for p in plain.model.parameters():
        p.grad = torch.ones_like(p)
    cpu.step()
    assert not isinstance(cpu.param_groups[0]["lr"], Tensor)
    load_state(gpu, cpu.state_dict())
    assert gpu.param_groups[0]["fused"]
    assert gpu.param_groups[0]["capturable"]
    set_lr(gpu.param_groups[0], 0.25)
    assert isinstance(gpu.param_groups[0]["lr"], Tensor)
    assert gpu.param_groups[0]["lr"].item() == 0.25
    gpu.step()
    load_state(cpu, gpu.state_dict())
    assert not cpu.param_groups[0]["fused"]
    cpu.step()
    assert {float(v["step"]) for v in cpu.state.values()} == {3.0}


def test_the_optimizer_of_a_recording_starts_as_the_plain_one_does(tmp_path: Path) -> None:
    """A parameter whose first gradient comes late included, on which torch's fused SGD fails."""
    from qbench.training.optim import make_optimizer

    recipe = Recipe(steps=1, lr=0.1, nesterov=True, weight_decay=0.01)
    found = []
    for capturable in (False, True):
        random = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(3, 4, 2, 2, generator=random)) for _ in range(2)]
        ps[0].data = ps[0].data.contiguous(memory_format=torch.channels_last)
        optimizer = make_optimizer([{"params": ps, "weight_decay": 0.01, "lr_scale": 1.0}], recipe, CPU, capturable)
        for grads in (1, 2, 2):
            optimizer.zero_grad()
            for p in ps[:grads]:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=random))
            optimizer.step()
        found.append([p.detach() for p in ps])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_batch_of_another_size_runs_op_by_op(tmp_path: Path) -> None:
    graphs = Imitation(torch.Generator())
    seen: list[Tensor] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        return x.sum() + y.sum()

    take = Captured(step, graphs)
    for size in (4, 4, 4, 4, 3, 4):
        x = torch.full((size, 2), float(len(seen)))
        seen.append(take(x, torch.zeros(size), None))
    assert [t.item() for t in seen] == [0.0, 8.0, 16.0, 24.0, 24.0, 40.0]  # a result that no later replay changes
    assert (graphs.eagers, graphs.records, graphs.replays) == (WARM + 1, 1, 2)


def test_the_graphs_of_torch_are_driven_as_its_manual_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CudaGraphs` on a torch.cuda that only writes down what is asked of it: what can be seen of it without a GPU."""
    calls: list[str] = []

    class Noted:
        def __init__(self, name: str, *args: Any, **more: Any) -> None:
            self.name = name
            calls.append(" ".join([name, *sorted(more)]))

        def __enter__(self) -> None:
            calls.append(f"enter {self.name}")

        def __exit__(self, *error: Any) -> None:
            calls.append(f"exit {self.name}")

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: calls.append(f"{self.name}.{name}")

    for name, label in (("Stream", "Stream"), ("CUDAGraph", "CUDAGraph"), ("graph", "graph"), ("stream", "stream")):
        monkeypatch.setattr(torch.cuda, name, lambda *a, label=label, **more: Noted(label, *a, **more))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Noted("current"))
    graphs = captured.CudaGraphs(torch.device("cuda"), torch.Generator())

    def step() -> Tensor:
        calls.append("step")
        return torch.zeros(())

    calls.clear()
    graphs.eager(step)
    assert [c for c in calls if not c.startswith("current") or "wait" in c] == [
        *("Stream.wait_stream", "stream", "enter stream", "step", "exit stream", "current.wait_stream"),
    ]
    calls.clear()
    replay, _ = graphs.record(step)
    replay()
    assert [c for c in calls if c != "current"] == [
        *("CUDAGraph", "CUDAGraph.register_generator_state", "graph stream", "enter graph", "step", "exit graph"),
        "CUDAGraph.replay",
    ]

    def fails() -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(f"back to {stream.name}"))
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(fails)
    assert calls[-1] == "back to current"


def test_a_whole_training_with_its_logs_and_evaluations(tmp_path: Path) -> None:
    found = []
    for recorded in (True, False):
        loop = trainer(("method=pact",), tmp_path, Imitation(torch.Generator()))
        loop.captured = loop.captured if recorded else None
        outcome = loop.train()
        found.append(
            (outcome.accuracy_last, outcome.accuracy_best, [p.detach().clone() for p in loop.model.parameters()])
        )
    assert found[0][:2] == found[1][:2]
    assert all(a.equal(b) for a, b in zip(found[0][2], found[1][2], strict=True))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_precision_says_what_a_gpu_may_round() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision, expected in (
            ("tf32", ("high", True)),
            ("fp32", ("highest", False)),
            ("bf16", ("highest", False)),
        ):
            evaluation.autocast(torch.device("cuda"), precision)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
        evaluation.autocast(CPU, "fp32")
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_tf32_on_the_cpu_is_refused() -> None:
    from qbench.training.run import prepare

    with pytest.raises(UserError, match=r"precision=tf32 is a number format of GPUs.*Use fp32 or bf16"):
        prepare(resolve_row(["precision=tf32", "model=tiny", "dataset=synthetic", "device=cpu"]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["float", "pact", "flexor", "gupta", "tga", "qat, late", "distilled"])
def test_on_a_gpu_replayed_steps_are_the_steps(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found, gpu = [], torch.device("cuda")
    for recorded in (True, False):
        with kernels.using("torch"):
            loop = trainer(CASES[case], tmp_path, None, device=gpu)
            assert loop.captured is not None, loop.eager
            loop.captured = loop.captured if recorded else None
            found.append(run_steps(loop))
            assert loop.eager == ""
    for name, a in found[0].items():
        torch.testing.assert_close(a, found[1][name], rtol=1e-4, atol=1e-5, msg=name)
