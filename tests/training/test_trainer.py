"""The training loop: schedules, losses, groups, accumulation, evaluation, calibration, workers."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from qbench.config.recipe import SCHEDULES, Recipe
from qbench.data import Split, batches
from qbench.errors import UserError
from qbench.quant.grid import Grid, affine
from qbench.quant.hooks import Distill
from qbench.quant.layers import QuantLayer
from qbench.quant.method import Hook, Method, Rule, State
from qbench.quant.quantizer import Quantizer
from qbench.quant.surgery import quantize
from qbench.screen import Screen
from qbench.training import checkpoint, evaluation, execute
from qbench.training.evaluation import calibrate, evaluate
from qbench.training.optim import criterion, make_optimizer, parameter_groups
from qbench.training.trainer import Trainer

Cli = Callable[..., Any]
CPU = torch.device("cpu")
FLOAT = Method(name="float", title="", family="float")


class Scale(Quantizer):
    """x rounded to multiples of a trainable step; counts what calibration showed it."""

    def __init__(self, layer: nn.Module, site: str) -> None:
        super().__init__()
        self.bits = 8
        self.step = nn.Parameter(torch.tensor(0.01))
        self.shown: list[Tensor] = []

    def calibrate(self, x: Tensor) -> None:
        self.shown.append(x.clone())

    def quantize(self, x: Tensor) -> Tensor:
        return x * (1 + 0 * self.step)

    def grid(self, x: Tensor | None = None) -> Grid:
        return affine(self.step, -128, 127)


def split(count: int = 64) -> Split:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=random, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 4)


def data(batch_size: int, count: int = 64, train: bool = True) -> Any:
    options = {"mean": (0.5,), "std": (0.3,), "seed": 0, "channels_last": False}
    return batches(split(count), batch_size=batch_size, shuffle=train, drop_last=train, **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def trainer(model: nn.Module, recipe: Recipe, folder: Path, **more: Any) -> Trainer:
    options = {"recorder": None, "device": CPU, "generator": torch.Generator(), "screen": Screen(quiet=True)}
    options |= {"checkpoint_seconds": 1e9} | more
    method = options.pop("method", FLOAT)
    return Trainer(
        model, method, recipe, data(recipe.batch_size), {"test": data(16, train=False)}, folder=folder, **options
    )


# --- schedules


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        (Recipe(steps=10, schedule="constant"), {0: 1, 9: 1}),
        (Recipe(steps=10, schedule="cosine"), {0: 1, 5: 0.5, 10: 0}),
        (Recipe(steps=10, schedule="linear"), {0: 1, 2: 0.8, 10: 0}),
        (Recipe(steps=10, schedule="exponential", gamma=0.01), {0: 1, 5: 0.1, 10: 0.01}),
        (Recipe(steps=40, schedule="step", milestones=(1, 3), gamma=0.1), {0: 1, 9: 1, 10: 0.1, 29: 0.1, 30: 0.01}),
        (Recipe(steps=20, schedule="cosine", warmup=1.0), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 15: 0.5}),
        (Recipe(steps=10, schedule="onecycle"), {0: 0.1 / 0.4, 2: 0.3 / 0.4, 3: 1, 10: 0}),
    ],
    ids=lambda x: x.schedule if isinstance(x, Recipe) else "",
)
def test_learning_rate(recipe: Recipe, values: dict[int, float]) -> None:
    for step, value in values.items():
        assert recipe.lr_factor(step, int(recipe.steps or 0), 10) == pytest.approx(value, abs=1e-12), step


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.integers(0, 299),
)
def test_learning_rate_stays_in_0_and_1(schedule: str, total: int, spe: int, warmup: float, step: int) -> None:
    recipe = Recipe(steps=total, schedule=schedule, warmup=warmup, milestones=(1, 2))
    assert 0 <= recipe.lr_factor(step % total, total, spe) <= 1 + 1e-12


def test_steps_of_a_phase() -> None:
    assert Recipe(epochs=2.5).total_steps(10) == 25
    assert Recipe(epochs=0.25).total_steps(10) == 3
    assert Recipe(steps=7).total_steps(10) == 7
    assert Recipe(epochs=0).total_steps(10) == 0


# --- losses


def test_label_smoothing_by_hand() -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    log_p = logits.log_softmax(1)[0]
    expected = -(0.8 * log_p[0] + 0.1 * log_p[1] + 0.1 * log_p[2])  # 0.7 + 0.3 / 3, 0.3 / 3
    found = criterion(Recipe(steps=1, label_smoothing=0.3), logits, labels)
    torch.testing.assert_close(found, expected)


def test_squared_hinge_by_hand() -> None:
    logits, labels = torch.tensor([[0.5, -2.0, 3.0]]), torch.tensor([0])
    # margins: 1 - 0.5, 1 - 2 -> 0, 1 + 3
    assert criterion(Recipe(steps=1, loss="squared_hinge"), logits, labels).item() == pytest.approx((0.25 + 0 + 16) / 3)


def test_distillation_by_hand() -> None:
    teacher, student, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), 2.0
    p = math.exp(0.5) / (math.exp(0.5) + 1)
    expected = 3.0 * t * t * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    state = State(nn.Identity(), torch.Generator(), teacher=nn.Identity(), inputs=teacher, logits=student)
    found = Distill(weight=3.0, temperature=t).loss(state)
    assert found is not None
    assert found.item() == pytest.approx(expected, rel=1e-5)
    state.logits = teacher
    assert Distill().loss(state).item() == pytest.approx(0, abs=1e-7)  # type: ignore[union-attr]


def test_a_teacher_that_learns_adds_its_own_loss_and_gets_no_gradient_from_the_students() -> None:
    """Apprentice, scheme A: CE(y, teacher) + gamma KL(teacher || student); the teacher's scale s gives logits s x."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.s * x

    x, labels, logits = torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.zeros(1, 2, requires_grad=True)
    hook = Distill(weight=0.5, labels=0.5, teacher=Scale())
    state = State(nn.Identity(), torch.Generator(), inputs=x, labels=labels, logits=logits)
    found = hook.loss(state)
    assert found is not None
    p = 1 / (1 + math.exp(-2.0))
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert found.item() == pytest.approx(-math.log(p) + 0.5 * divergence, rel=1e-5)
    found.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.5 * (0.5 - p), 0.5 * (p - 0.5)], rel=1e-5)
    (s,) = hook.parameters()
    assert s.grad is not None
    assert s.grad.item() == pytest.approx(2 * (p - 1), rel=1e-5)  # of its cross-entropy alone
    assert hook.labels_weight == 0.5
    assert list(hook.eval_models(state)) == ["teacher"]


# --- parameter groups


def quantized() -> nn.Module:
    model = net()
    quantize(model, [Rule(weight=Scale)])
    return model


def test_quantizers_get_no_weight_decay_unless_the_method_says_so() -> None:
    model, recipe = quantized(), Recipe(steps=1, weight_decay=0.1)
    steps = {id(q.step) for q in model.modules() if isinstance(q, Scale)}
    for patterns, decay in (
        ([], 0.0),
        ([{"match": "*.step", "weight_decay": "same"}], 0.1),
        ([{"match": "*.step", "weight_decay": 0.5, "lr_scale": 3.0}], 0.5),
    ):
        method = Method(name="m", title="", family="qat", param_groups=patterns)
        groups = parameter_groups(model, [], method, recipe)
        of = {id(p): g for g in groups for p in g["params"]}
        assert len(of) == len(list(model.parameters()))
        assert {of[i]["weight_decay"] for i in steps} == {decay}
        assert {g["weight_decay"] for i, g in of.items() if i not in steps} == {0.1}
        assert [of[i]["top_lr"] for i in steps] == pytest.approx([0.3 if decay == 0.5 else 0.1] * len(steps))


@pytest.mark.parametrize(
    ("decay", "held"),
    [
        ("all", {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}),
        ("weights", {"0.weight", "4.weight"}),
        ("last", {"4.weight"}),
    ],
)
def test_weight_decay_acts_on_what_the_recipe_says(decay: str, held: set[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    quantize(model, [Rule(weight=Scale, match="0")])
    recipe = Recipe(steps=1, weight_decay=0.1, decay=decay)
    for patterns, more in ([], set()), ([{"match": "1.bias", "weight_decay": "same"}], {"1.bias"}):
        groups = parameter_groups(model, [], Method("m", "", "qat", param_groups=patterns), recipe)
        of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert {n for n, p in model.named_parameters() if of[id(p)] == 0.1} == held | more
        assert {*of.values()} <= {0.0, 0.1}


def test_a_pattern_that_matches_nothing_is_an_error_unless_optional() -> None:
    pattern = {"match": "*.stepp"}
    with pytest.raises(ValueError, match=r"'\*\.stepp' of m matches none of: .*1\.weight"):
        parameter_groups(quantized(), [], Method("m", "", "qat", param_groups=[pattern]), Recipe(steps=1))
    parameter_groups(
        quantized(), [], Method("m", "", "qat", param_groups=[{**pattern, "optional": True}]), Recipe(steps=1)
    )


def test_hooks_own_parameters_that_are_trained() -> None:
    class Owner(Hook):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

    hook = Owner()
    method = Method("m", "", "qat", param_groups=[{"match": "hook.gain", "weight_decay": 0.7}])
    groups = parameter_groups(net(), [hook], method, Recipe(steps=1))
    (group,) = [g for g in groups if any(p is hook.gain for p in g["params"])]
    assert group["weight_decay"] == 0.7


def test_learning_rate_scale_of_a_group_reaches_the_optimizer(tmp_path: Path) -> None:
    method = Method("m", "", "qat", param_groups=[{"match": "3.*", "lr_scale": 0.0}])
    model = net()
    before = [p.clone() for p in model.parameters()]
    trainer(model, Recipe(steps=3, batch_size=16, lr=0.1), tmp_path, method=method).train()
    moved = [not p.equal(b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "adamw", "adamax", "rmsprop", "adagrad", "adadelta", "torch.optim.NAdam"]
)
def test_every_optimizer_steps(name: str, tmp_path: Path) -> None:
    model = net()
    before = [p.clone() for p in model.parameters()]
    outcome = trainer(model, Recipe(steps=2, batch_size=16, lr=0.01, optimizer=name), tmp_path).train()
    assert outcome.accuracy_last is not None
    assert not any(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_optimizer_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(UserError, match=r"train\.optimizer=torch\.optim\.Addam"):
        make_optimizer([{"params": list(net().parameters())}], Recipe(steps=1, optimizer="torch.optim.Addam"))


# --- the loop


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_big_batch(accumulate: int, tmp_path: Path) -> None:
    models = []
    for parts in (1, accumulate):
        model = net().double()
        loop = trainer(model, Recipe(steps=6, batch_size=16, lr=0.1, accumulate=parts, weight_decay=1e-3), tmp_path)
        loop.train_batches = Double(loop.train_batches)
        loop.tests = {"test": Double(loop.tests["test"])}
        loop.train()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class Double:
    """Batches in float64, so that the order of additions does not show."""

    def __init__(self, inner: evaluation.Batches) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x.double(), y) for x, y in self.inner.epoch(epoch, start))


def test_one_step_by_hand(tmp_path: Path) -> None:
    model, twin = net(), net()
    recipe = Recipe(steps=1, batch_size=16, lr=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    loop = trainer(model, recipe, tmp_path)
    x, y = next(loop.train_batches.epoch(0))
    F.cross_entropy(twin(x), y).backward()
    loop.train()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * (q.grad + 0.1 * q))


def test_gradient_clipping_bounds_the_step(tmp_path: Path) -> None:
    model = net()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    recipe = Recipe(steps=1, batch_size=16, lr=1.0, momentum=0.0, schedule="constant", clip_grad=1e-3)
    trainer(model, recipe, tmp_path).train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_hooks_are_called_in_order(tmp_path: Path) -> None:
    called: list[str] = []

    class Watch(Hook):
        def __getattribute__(self, name: str) -> Any:
            if callable(Hook.__dict__.get(name)) and not name.startswith("_"):
                called.append(name)
            return super().__getattribute__(name)

    trainer(net(), Recipe(steps=2, batch_size=32), tmp_path, hooks=[Watch()]).train()
    step = ["before_step", "loss", "after_backward", "after_step"]
    assert called == ["before_stage", "before_train", *step, *step, "eval_models", "after_train"]


def test_a_hooks_loss_is_added(tmp_path: Path) -> None:
    class Pull(Hook):
        def loss(self, state: State) -> Tensor:
            return 1e3 * sum(p.square().sum() for p in state.model.parameters())  # type: ignore[return-value]

    model = net()
    before = sum(p.square().sum().item() for p in model.parameters())
    trainer(model, Recipe(steps=4, batch_size=16, lr=1e-4, momentum=0.0), tmp_path, hooks=[Pull()]).train()
    assert sum(p.square().sum().item() for p in model.parameters()) < 0.7 * before


def test_a_checkpoint_holds_all_that_decides_the_next_step(tmp_path: Path) -> None:
    recipe = Recipe(steps=8, batch_size=16, lr=0.1, optimizer="adam")
    straight = net()
    checkpoint.seed_all(1)
    trainer(straight, recipe, tmp_path / "a").train()
    first = net()
    checkpoint.seed_all(1)
    loop = trainer(first, recipe, tmp_path / "b")
    loop.total = loop.state.steps = 8
    for x, y in list(loop.train_batches.epoch(0))[:3]:
        loop._step(x, y)
    loop.save()
    torch.manual_seed(99)
    second = net()
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    again = trainer(second, recipe, tmp_path / "b")
    assert again.restore()
    assert again.state.step == 3
    again.train()
    assert all(p.equal(q) for p, q in zip(second.parameters(), straight.parameters(), strict=True))


# --- evaluation and calibration


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 64])
def test_evaluation_counts_every_image_once(batch_size: int) -> None:
    model, whole = net().eval(), data(50, 50, train=False)
    x, y = next(whole.epoch(0))
    with torch.no_grad():
        logits = model(x)
    loss, accuracy = evaluate(model, data(batch_size, 50, train=False), CPU, "fp32")
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == 100.0 * (logits.argmax(1) == y).sum().item() / 50


def test_bf16_is_near_float() -> None:
    fp32 = evaluate(net(), data(16, train=False), CPU, "fp32")[0]
    bf16 = evaluate(net(), data(16, train=False), CPU, "bf16")[0]
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=2e-2)


@pytest.mark.parametrize("scratch", [False, True])
def test_calibration_shows_float_activations_and_leaves_no_trace(scratch: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    quantize(model, [Rule(weight=Scale, input=Scale)])
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    calibrate(model, data(16, train=False).epoch(0), CPU, "fp32", scratch)
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    for layer in layers:
        q = layer.input_quantizer
        assert isinstance(q, Scale)
        assert sum(len(x) for x in q.shown) == 64
        assert q.enabled
        assert not q._forward_pre_hooks
    for k, v in model.state_dict().items():
        assert not isinstance(v, Tensor) or v.equal(before[k]), k


def test_calibration_images_do_not_depend_on_the_batch_size(
    tiny: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    seen: list[Tensor] = []
    real = evaluation.calibrate

    def spy(model: nn.Module, images: Any, *rest: Any) -> None:
        kept = list(images)
        seen.append(torch.cat([x for x, _ in kept]))
        real(model, iter(kept), *rest)

    monkeypatch.setattr(execute.evaluation, "calibrate", spy)
    for size in (16, 64):
        words = ("method=pact", "bits=4", "init=scratch", f"train.batch_size={size}", "train.steps=1", "out=o")
        assert tiny(*words).status == 0
    assert len(seen) == 2
    assert len(seen[0]) == 64
    assert seen[0].equal(seen[1])


# --- workers

MLP = ("model=mlp", "model.hidden=[16]", "dataset=synthetic", "dataset.size=8", "budget=smoke", "tensorboard=false")
WORKERS = ("method=float", "device=cpu", "precision=fp32", "threads=1", *MLP)


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*/result.json")
    return json.loads(path.read_text())


def weights(out: Path) -> dict[str, Tensor]:
    (path,) = out.glob("*/model.pt")
    return checkpoint.load(path)


def test_two_workers_equal_one(cli: Cli, process: Cli, tmp_path: Path) -> None:
    one = process(*WORKERS, "workers=2", "out=two")
    out, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    assert out.count("float training  epoch") == 1  # the first worker alone writes and prints
    assert cli(*WORKERS, "out=one").status == 0
    for (name, a), (_, b) in zip(weights(tmp_path / "one").items(), weights(tmp_path / "two").items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    a, b = result(tmp_path / "one"), result(tmp_path / "two")
    assert a["accuracy_last"] == b["accuracy_last"]
    assert a["key"] != b["key"]


def test_workers_that_do_not_divide_the_test_images_count_each_once(cli: Cli, process: Cli, tmp_path: Path) -> None:
    more = ("train.batch_size=33", "parent.batch_size=33", "dataset.test_size=127")  # 43, 42 and 42 images
    one = process(*WORKERS, *more, "workers=3", "out=three")
    _, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    (folder,) = (tmp_path / "three").glob("float-*")
    accuracy = result(tmp_path / "three")["accuracy_last"]
    assert accuracy * 1.27 == pytest.approx(round(accuracy * 1.27), abs=1e-9)
    assert f"accuracy {accuracy:.2f} %" in cli("eval", folder).out


def test_what_has_no_gradient_is_not_exchanged(tmp_path: Path) -> None:
    """The optimizer leaves it alone with workers too, as it is without."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    b.grad = torch.full((3,), 2.0)
    trainer = SimpleNamespace(optimizer=torch.optim.SGD([a, b], 0.1), own_hooks=lambda: [])
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        Trainer._exchange(trainer)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    assert a.grad is None
    assert b.grad.tolist() == [2, 2, 2]


def test_two_workers_resume_bit_for_bit(process: Cli, tmp_path: Path) -> None:
    words = (*WORKERS, "workers=2", "train.steps=20", "train.evaluate_every=0.5")  # 8 steps an epoch
    straight = process(*words, "out=straight")
    assert straight.wait(timeout=300) == 0
    code = (
        "import os, sys, signal\n"
        "from qbench.training import evaluation, trainer\n"
        "real = trainer.Trainer._step\n"
        "def step(self, x, y):\n"
        "    if self.state.step == 12 and evaluation.rank() == 0 and not os.path.exists('died'):\n"
        "        open('died', 'w').close()\n"
        "        os._exit(9)  # the other worker waits for its gradients\n"
        "    real(self, x, y)\n"
        "trainer.Trainer._step = step\n"
        "if __name__ == '__main__':\n"
        "    from qbench.cli.command import main\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "dying.py").write_text(code)
    killed = process.script(tmp_path / "dying.py", *words, "out=o")
    _, err = killed.communicate(timeout=300)
    assert killed.returncode == 2
    assert "a worker ended" in err
    again = process(*words, "out=o")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "resumed at step 8 of 20" in out
    assert result(tmp_path / "o")["weights_sha256"] == result(tmp_path / "straight")["weights_sha256"]


def test_workers_train_and_share_a_parent(process: Cli, tmp_path: Path) -> None:
    one = process("method=lsq", "bits=4", *WORKERS[1:], "workers=2", "out=o")
    out, err = one.communicate(timeout=300)
    assert one.returncode == 0, err
    assert "training it once" in out
    assert len(list((tmp_path / "o").glob("*/result.json"))) == 2
