"""Every YAML under conf composes, every method fits every net, and words are merged by rank."""

import itertools
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from yamls import composed, config_of

from qbench.cli.overrides import compose
from qbench.config import bits, catalog
from qbench.config.identity import digest, folder_name, identity, parent_of
from qbench.config.recipe import DEFAULTS, KEYS, Recipe, merge
from qbench.config.resolve import _training, resolve
from qbench.data import DataSet, Split
from qbench.errors import UserError
from qbench.training.build import make_method, make_model, quantize

CONF = catalog.conf_folder()
FILES = sorted(CONF.rglob("*.yaml"))
THERE = CONF / "config.yaml"  # for init=: some file that is there
METHODS = [n for n in catalog.names("method") if n not in catalog.aliases()]
FACTS = {"name": "synthetic", "checksum": "0" * 64, "augment": "none", "mean": (0.5,), "std": (0.35,)}
SMALL = {"vgg_small": 0.05, "mobilenet_v1": 0.1, "mobilenet_v2": 0.1, "lenet5": 0.1, "mlp": 0.02}
SMALL |= {"vgg7": 0.05, "vgg10": 0.05, "mlp3x1024": 0.02, "mlp3x2048": 0.01, "mlp3x4096": 0.005}


def key(*words: str, facts: Mapping[str, Any] = FACTS) -> str:
    config = config_of(*words)
    init = config["init"]
    if init == "float":
        init = "float " + digest(identity(parent_of(config), facts, "scratch"))
    return digest(identity(config, facts, init))


def test_every_file_is_one_of_the_groups_or_the_root() -> None:
    groups = {g: {p.stem for p in FILES if p.parent == CONF / g} for g in catalog.GROUPS}
    assert {g: set(catalog.names(g)) for g in catalog.GROUPS} == groups
    papers = [p for p in FILES if p.parent == CONF / "paper"]
    assert len(FILES) == 1 + sum(map(len, groups.values())) + len(papers)
    assert sum(map(len, groups.values())) >= 30


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in catalog.GROUPS], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_file_composes_and_resolves(path: Path) -> None:
    config = config_of(f"{path.parent.name}={path.stem}")
    group = config[path.parent.name]
    name = group if isinstance(group, str) else group["name"]
    assert name == catalog.aliases().get(path.stem, path.stem)
    yaml.safe_dump(config["train"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", catalog.names("budget"))
def test_every_method_has_every_budget(name: str, budget: str) -> None:
    config = config_of(f"method={name}", f"budget={budget}")
    assert set(config["train"]) == set(config["parent"]) == set(KEYS)
    assert (config["train"]["epochs"] is None) != (config["train"]["steps"] is None)
    assert config["init"] in ("scratch", "float")


def _data(model: str) -> DataSet:
    grey = model == "lenet5"
    images = torch.randint(0, 256, (4, 1 if grey else 3, 16, 16), dtype=torch.uint8)
    split = Split(images, torch.arange(4))
    channels = images.shape[1]
    return DataSet("synthetic", split, split, None, 4, channels, 16, (0.5,) * channels, (0.3,) * channels, "none", "0")


@pytest.mark.parametrize("model", catalog.names("model"))
def test_every_method_fits_every_net(model: str) -> None:
    data = _data(model)
    x = torch.rand(2, data.channels, 16, 16)
    node = compose([f"model={model}", f"model.width={SMALL.get(model, 0.25)}"]).model
    if node.get("depth", 0) > 18:
        node.depth = 8  # CIFAR's ResNets: more blocks of the same kind are no other case
    for name in METHODS:
        whole = deepcopy(composed(f"method={name}"))
        whole.model = node
        config = resolve(whole)
        net = make_model(config, data)
        quantize(config, net, make_method(config))
        with torch.no_grad():
            y = net.train()(x)  # batch-norm as it trains: with weights of ±1 an untrained deep net overflows without
        assert y.shape == (2, 4), name
        assert y.isfinite().all(), name


def test_a_wrong_argument_in_a_methods_file_is_named_with_its_class() -> None:
    data = _data("tiny")
    config = config_of("method=dorefa", "model=tiny")
    rule = next(r for r in config["method"]["rules"] if "weight" in r)
    rule["weight"]["bist"] = 4
    with pytest.raises(UserError, match=r"method=dorefa on model=tiny: DoReFaWeight.__init__\(\) .* 'bist'"):
        quantize(config, make_model(config, data), make_method(config))


def test_the_user_beats_the_method_and_the_method_beats_the_budget() -> None:
    def lr(*words: str) -> float:
        return config_of("method=flexor", "budget=demo", *words)["train"]["lr"]

    assert config_of("method=pact", "budget=demo")["train"]["lr"] == 0.02
    assert config_of("method=pact", "budget=demo", "init=scratch")["train"]["lr"] == 0.1
    assert config_of("method=flexor", "budget=demo")["train"]["weight_decay"] == 1e-5
    assert config_of("method=flexor", "budget=demo")["train"]["epochs"] == 20
    assert lr("train.lr=0.3") == 0.3
    assert config_of("method=flexor", "train.weight_decay=0.5")["train"]["weight_decay"] == 0.5


def test_rate_update_rule_and_length_belong_to_the_methods_own_start() -> None:
    """BNN's Adam at 5e-3 is for signs from scratch; from the float net its budget's SGD runs, at that one's rate."""

    def told(*words: str) -> tuple[Any, ...]:
        train = config_of("method=bnn", "budget=short", *words)["train"]
        return tuple(train[k] for k in ("optimizer", "lr", "momentum", "epochs", "weight_decay"))

    assert told() == ("adam", 5e-3, 0.9, 20, 0.0)
    assert told("init=float") == told(f"init={THERE}") == ("sgd", 0.05, 0.9, 8, 0.0)
    assert told("init=float", "train.lr=0.3") == ("sgd", 0.3, 0.9, 8, 0.0)

    method = {"name": "m", "init": "scratch", "budgets": {"short": {**dict.fromkeys(KEYS, 1), "stages": {}}}}
    budget = {"name": "short", "scratch": {}, "finetune": {}}
    theirs, others = (set(_training(method, budget, init, 4)[1]) for init in ("scratch", "float"))
    assert theirs - others == {"optimizer", "lr", "momentum", "nesterov", "betas", "eps", "epochs", "steps"}


def test_the_users_precision_is_for_every_phase() -> None:
    config = config_of("method=pact", "budget=short", "precision=fp32")
    assert config["train"]["precision"] == config["parent"]["precision"] == "fp32"
    config = config_of("method=pact", "budget=short")
    assert config["train"]["precision"] == config["parent"]["precision"] == "bf16"


def test_a_train_option_of_the_float_method_is_for_its_own_training() -> None:
    config = config_of("method=float", "budget=demo", "train.epochs=3")
    assert (config["train"]["epochs"], config["train"]["lr"]) == (3, 0.1)
    parent = config_of("method=float", "budget=demo")
    child = config_of("method=pact", "budget=demo")
    assert parent["train"] == child["parent"]
    # the net of `method=float` is the one that others start from
    assert digest(identity(parent, FACTS, "scratch")) == digest(identity(parent_of(child), FACTS, "scratch"))


def test_steps_silence_epochs_and_the_other_way_round() -> None:
    smoke = config_of("method=pact", "budget=smoke", "train.epochs=2")["train"]
    assert (smoke["epochs"], smoke["steps"]) == (2, None)
    demo = config_of("method=pact", "budget=demo", "train.steps=7")["train"]
    assert (demo["epochs"], demo["steps"]) == (None, 7)


@given(st.lists(st.sampled_from(["epochs", "steps"]), min_size=1, max_size=6))
def test_the_last_duration_counts(names: list[str]) -> None:
    recipe = merge([{name: i + 1} for i, name in enumerate(names)])
    assert getattr(recipe, names[-1]) == len(names)
    assert (recipe.epochs is None) != (recipe.steps is None)


def test_null_means_not_my_business() -> None:
    assert merge([{"epochs": 3, "lr": 0.5}, {"lr": None, "epochs": None}]) == Recipe(epochs=3, lr=0.5)
    with pytest.raises(UserError, match=r"'epoch'.*Did you mean 'epochs'"):
        merge([{"epoch": 3}])
    with pytest.raises(UserError, match="exactly one"):
        merge([{}])


def test_the_paper_budget_is_the_methods_recipe() -> None:
    config = config_of("method=pact", "budget=paper")
    train = config["train"]
    assert (train["epochs"], train["batch_size"], train["lr"], train["schedule"]) == (200, 128, 0.1, "step")
    assert tuple(train["milestones"]) == (60, 120)
    assert config["init"] == "scratch"
    assert config["model"]["preactivation"] is True
    assert config_of("method=pact", "budget=demo")["model"]["preactivation"] is None
    assert config_of("method=pact", "budget=paper", "init=float")["init"] == "float"
    assert config_of("method=pact", "budget=paper", "train.epochs=1")["train"]["epochs"] == 1
    assert config_of("method=pact", "budget=paper", "model.preactivation=false")["model"]["preactivation"] is False


def test_what_a_method_needs_of_the_net_yields_to_the_user() -> None:
    for name in METHODS:
        needs = config_of(f"method={name}")["method"].get("needs") or {}
        for option, value in needs.items():
            if option in config_of("model=resnet20")["model"]:
                assert config_of(f"method={name}", "model=resnet20")["model"][option] == value
                words = (f"method={name}", "model=resnet20", f"model.{option}=false")
                assert config_of(*words)["model"][option] is False


def test_init_follows_the_method_unless_told() -> None:
    assert config_of("method=pact")["init"] == "float"
    assert config_of("method=flexor")["init"] == "scratch"
    assert config_of("method=float")["init"] == "scratch"
    assert config_of("method=flexor", "init=float")["init"] == "float"
    assert config_of("method=pact", f"init={THERE}")["init"] == str(THERE)


def test_the_uniform_protocol_has_the_same_exceptions_for_all() -> None:
    for name in METHODS:
        rules = config_of(f"method={name}", "protocol=uniform")["method"]["rules"]
        if name == "float":
            assert rules == []
            continue
        assert rules[0] == {"match": "@ends", "keep": "protocol=uniform: first and last layer in float"}
        assert not [r for r in rules[1:] if r.get("match") in ("@first", "@last", "@ends") and "kind" not in r]
    rules = config_of("method=xnor", "protocol=uniform")["method"]["rules"]
    assert {"match": "@last", "kind": "ReLU*", "keep": "before the float last layer"} in rules


def test_thirty_two_bits_take_the_slot_away() -> None:
    rules = config_of("method=lsq", "w_bits=4", "a_bits=32")["method"]["rules"]
    assert "input" not in rules[-1]
    assert "weight" in rules[-1]
    rules = config_of("method=lsq", "bits=32")["method"]["rules"]
    assert set(rules[-1]) == {"keep"}
    rules = config_of("method=irnet", "a_bits=32")["method"]["rules"]
    assert ("input" in rules[-2], "weight" in rules[-2]) == (False, True)
    assert set(rules[-1]) == {"kind", "keep", "optional"}  # the ReLU stays


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (4, 4)),
        (("bits=3",), (3, 3)),
        (("bits=2/8",), (2, 8)),
        (("bits=2", "a_bits=5"), (2, 5)),
        (("bits=2", "w_bits=5"), (5, 2)),
        (("w_bits=3",), (3, 4)),
        (("bits=4/32",), (4, 32)),
        (("method=flexor", "bits=0.8"), (0.8, 32)),
        (("method=flexor", "bits=1/32"), (1, 32)),
    ],
)
def test_bits(words: tuple[str, ...], expected: tuple[float, float]) -> None:
    config = config_of(*words)
    assert (config["w_bits"], config["a_bits"]) == expected


PLACES = [
    "out=x",
    "dataset.root=y",
    "threads=3",
    "device=cpu",
    "graph=false",
    "debug=true",
    "tensorboard=false",
    "checkpoint_seconds=1",
    "name=z",
]


@pytest.mark.parametrize("word", PLACES)
def test_where_a_run_happens_decides_nothing(word: str) -> None:
    assert key("method=pact", word) == key("method=pact")


def test_the_same_words_said_twice_or_as_defaults_decide_nothing() -> None:
    assert key("method=pact", "bits=4") == key() == key("w_bits=4", "a_bits=4") == key("init=float", "seed=0")
    assert key("train.lr=0.02", "budget=demo") == key("budget=demo")


def test_a_new_option_that_is_null_or_a_default_renames_nothing() -> None:
    config = config_of("method=pact")
    before = digest(identity(config, FACTS, "scratch"))
    config["options"]["brand_new"] = None
    config["model"]["brand_new"] = None
    config["method"]["rules"][2]["error"] = None
    config["method"]["hooks"] = []
    assert digest(identity(config, FACTS, "scratch")) == before
    config["train"]["clip_grad"] = DEFAULTS["clip_grad"]
    assert digest(identity(config, FACTS, "scratch")) == before


def test_what_the_schedule_does_not_read_decides_nothing() -> None:
    """The user may not ask for it (`unread`); a method's recipe may hold it when another schedule was asked for."""

    def name(schedule: str, **recipe: Any) -> str:
        config = config_of(f"train.schedule={schedule}")
        return digest(identity({**config, "train": {**config["train"], **recipe}}, FACTS, "scratch"))

    drops, decay = {"milestones": (2.0,)}, {"gamma": 0.3}
    assert name("constant", **drops, **decay) == name("constant")
    assert name("exponential", **drops) == name("exponential") != name("exponential", **decay)
    assert len({name("step"), name("step", **drops), name("step", **decay)}) == 3


# Commands of which no two may share a folder.
DIFFERENT = [
    (),
    ("bits=3",),
    ("bits=4/8",),
    ("w_bits=8",),
    ("seed=1",),
    ("init=scratch",),
    ("method=lsq", "protocol=uniform"),
    ("method=dorefa",),
    ("method=lsq",),
    ("method=flexor",),
    ("method=float",),
    ("model=resnet32",),
    ("model.width=0.5",),
    ("model.shortcut=B",),
    ("model.preactivation=true",),
    ("budget=smoke",),
    ("budget=short",),
    ("budget=paper",),
    ("train.epochs=3",),
    ("train.steps=3",),
    ("train.lr=0.3",),
    ("train.batch_size=16",),
    ("train.optimizer=adam",),
    ("train.momentum=0.5",),
    ("train.nesterov=false",),
    ("train.weight_decay=0.1",),
    ("train.schedule=cosine",),
    ("train.warmup=1",),
    ("train.label_smoothing=0.1",),
    ("train.loss=squared_hinge",),
    ("train.accumulate=2",),
    ("train.clip_grad=1",),
    ("train.calibration=100",),
    ("train.precision=bf16",),
    ("precision=bf16",),
    ("parent.epochs=3",),
    ("parent.lr=0.3",),
    ("distill.weight=0.5",),
    ("distill.weight=0.5", "distill.temperature=2"),
    ("options.alpha=3",),
    ("options.last_input=8",),
    ("options.detach=true",),
    ("workers=2",),
    ("compile=true",),
    (f"init={THERE}",),
]


def test_two_different_commands_never_share_a_folder() -> None:
    keys = {words: key(*words) for words in DIFFERENT}
    same = [(a, b) for a, b in itertools.combinations(keys, 2) if keys[a] == keys[b]]
    assert not same
    others = [
        {**FACTS, k: v} for k, v in (("checksum", "1" * 64), ("augment", "crop"), ("mean", (0.4,)), ("std", (0.3,)))
    ]
    assert len({key(facts=f) for f in [FACTS, *others]}) == 5


def test_the_teacher_of_a_distilled_run_is_part_of_its_name(tmp_path: Path) -> None:
    from qbench.training.run import prepare

    base = ("model=tiny", "dataset=synthetic", "init=scratch", "distill.weight=1")
    assert prepare(config_of(*base)).key != prepare(config_of(*base, "parent.epochs=1")).key
    plain = ("model=tiny", "dataset=synthetic", "init=scratch")
    assert prepare(config_of(*plain)).key == prepare(config_of(*plain, "parent.epochs=1")).key


def test_the_number_of_classes_is_part_of_the_name() -> None:
    from qbench.training.run import prepare

    base = ("model=tiny", "dataset=synthetic", "init=scratch")
    assert prepare(config_of(*base)).key != prepare(config_of(*base, "dataset.classes=12")).key


def test_folder_names_say_what_is_inside() -> None:
    assert folder_name(config_of("bits=4/8"), "k").startswith("pact-w4a8-resnet20-digits-")
    assert folder_name(config_of("method=flexor", "bits=0.8"), "k") == "flexor-w0.8a32-resnet20-digits-k"
    assert folder_name(config_of("method=float"), "k") == "float-resnet20-digits-k"
    assert folder_name(config_of("name=mine"), "k") == "mine-k"


def test_bits_are_one_width_or_two() -> None:
    assert bits.parse("4") == (4, 4)
    assert bits.parse("4/8") == (4, 8)
    assert bits.parse(None) == (None, None)
    with pytest.raises(UserError, match="must look like 4 or 4/8"):
        bits.parse("4/8/2")
