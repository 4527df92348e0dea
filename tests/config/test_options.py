"""Every option of conf/config.yaml is declared, once, and every default is one of its own values."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qbench.cli.overrides import check
from qbench.config import catalog, options
from qbench.config.kinds import seconds
from qbench.config.recipe import DEFAULTS, FIELDS, KEYS, Recipe, merge, optimizer_fields, unread
from qbench.errors import UserError
from qbench.training.optim import make_optimizer


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_the_table_is_the_configuration() -> None:
    whole = yaml.safe_load((catalog.conf_folder() / "config.yaml").read_text())
    given = leaves({k: v for k, v in whole.items() if k not in ("defaults", "hydra", "options")})
    assert set(given) == set(options.OPTIONS)
    for name, value in given.items():
        options.OPTIONS[name].check(name, value)
    assert set(FIELDS) == set(KEYS)


def test_every_option_of_a_net_is_declared() -> None:
    for model in catalog.names("model"):
        node = yaml.safe_load((catalog.conf_folder() / "model" / f"{model}.yaml").read_text())
        for name in node.keys() - {"name", "_target_", "defaults"}:
            options.MODEL[name].check(name, node[name])


def test_a_whole_number_that_torch_does_not_have_is_a_float() -> None:
    recipe = merge([{"lr": 10**30, "epochs": 3}])
    assert (type(recipe.lr), recipe.lr, type(recipe.epochs)) == (float, 1e30, int)
    with pytest.raises(UserError, match=r"train\.batch_size must be a whole number"):
        merge([{"batch_size": 10**30, "epochs": 3}])


def test_a_number_that_no_float_can_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.lr must be a number of at least 0"):
        options.OPTIONS["train.lr"].check("train.lr", 10**400)


@pytest.mark.parametrize("name", sorted(options.OPTIONS))
def test_no_option_takes_whatever_comes(name: str) -> None:
    for wrong in ("no such word", -1, [[]], {}, float("nan")):
        if wrong == "no such word" and name in ("name", "out"):
            continue
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            options.OPTIONS[name].check(name, wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        (90, 90),
        ("90s", 90),
        ("8m", 480),
        ("1.5h", 5400),
        ("2d", 172800),
        ("0", None),
        ("m", None),
        (True, None),
    ],
)
def test_times(text: Any, expected: float | None) -> None:
    assert seconds(text) == expected


def recipe(**more: Any) -> Recipe:
    return merge([{"epochs": 1, "momentum": 0.9, "nesterov": True}, more])


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("sgd", {}, {"momentum": 0.9, "nesterov": True}),
        ("adam", {"eps": 1e-5}, {"betas": (0.9, 0.999), "eps": 1e-5}),
        ("adamw", {}, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("rmsprop", {}, {"momentum": 0.0, "eps": 1e-8}),
        ("rmsprop", {"momentum": 0.5, "eps": 1e-3}, {"momentum": 0.5, "eps": 1e-3}),
        ("torch.optim.SGD", {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}),
        ("torch.optim.NAdam", {"betas": [0.5, 0.9], "eps": 1e-4}, {"betas": (0.5, 0.9), "eps": 1e-4}),
        ("qbench.methods.bnn.ShiftAdaMax", {}, {"betas": (1 - 2**-3, 1 - 2**-10), "eps": 2**-30}),
    ],
)
def test_what_the_recipe_says_reaches_the_optimizer(name: str, more: dict[str, Any], expected: dict[str, Any]) -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
    (group,) = make_optimizer(groups, recipe(optimizer=name, **more)).param_groups
    assert {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in group.items() if k in expected} == expected


def test_every_field_that_is_taken_exists() -> None:
    for name in ("sgd", "adam", "adamw", "adamax", "rmsprop", "adagrad", "adadelta"):
        groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
        group = make_optimizer(groups, recipe(optimizer=name, eps=1e-3)).param_groups[0]
        assert all(group[k] == v for k, v in optimizer_fields(recipe(optimizer=name, eps=1e-3)).items())


def test_an_eps_meant_for_another_optimizer_is_left_behind() -> None:
    assert merge([{"epochs": 1, "optimizer": "adam", "eps": 1e-5}, {"optimizer": "sgd"}]).eps is None
    assert merge([{"epochs": 1, "optimizer": "adam"}, {"eps": 1e-5, "optimizer": "adam"}]).eps == 1e-5
    assert DEFAULTS["eps"] is None


def test_what_switches_a_field_off_asks_for_nothing() -> None:
    adam = recipe(optimizer="adam", loss="squared_hinge")
    assert (
        unread({"momentum": 0, "nesterov": False, "label_smoothing": 0.0, "gamma": None, "milestones": []}, [adam])
        == ""
    )
    assert "momentum=0.9" in unread({"momentum": 0.9}, [adam])
    assert unread({"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.1}, [adam]) == ""


def test_one_recipe_of_several_that_reads_a_field_is_enough() -> None:
    both = [recipe(optimizer="adam"), recipe(optimizer="sgd")]
    assert unread({"momentum": 0.9, "betas": [0.9, 0.99]}, both) == ""
    assert unread({"momentum": 0.9}, both[:1]).startswith("momentum=0.9 is not read with optimizer=adam")
    assert unread({"betas": [0.9, 0.99], "gamma": 0.5}, both).startswith("gamma=0.5 is not read with schedule=cosine")


FOO = (catalog.conf_folder().parent / "CONTRIBUTING.md").read_text().partition("```yaml\n")[2].partition("```")[0]


def foo(folder: Path, text: str, *words: str) -> None:
    """Check a command of a method whose YAML this is."""
    (folder / "method").mkdir(exist_ok=True)
    (folder / "method" / "foo.yaml").write_text(text)
    check(["method=foo", *words], own=folder)


@pytest.mark.parametrize("budget", ["demo", "paper"])
def test_the_method_shown_in_contributing_is_whole(tmp_path: Path, budget: str) -> None:
    foo(tmp_path, FOO, f"budget={budget}", "options.center=false")


@pytest.mark.parametrize("lacks", catalog.NEEDED)
def test_what_a_methods_yaml_lacks_is_named(tmp_path: Path, lacks: str) -> None:
    text = "".join(line for line in FOO.splitlines(True) if not line.startswith(f"  {lacks}:"))
    with pytest.raises(UserError, match=rf"method\.{lacks} is missing.*CONTRIBUTING"):
        foo(tmp_path, text)


def test_a_methods_yaml_without_its_first_line_is_told_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.name is missing.*'# @package _global_'"):
        foo(tmp_path, FOO.partition("\n")[2])


def test_the_papers_budget_needs_a_recipe(tmp_path: Path) -> None:
    text = "".join(line for line in FOO.splitlines(True) if not line.startswith("  recipe:"))
    foo(tmp_path, text, "budget=short")
    with pytest.raises(UserError, match=r"method=foo names no recipe of its paper \(method\.recipe\)"):
        foo(tmp_path, text, "budget=paper")


STAGED = FOO.replace(
    "  recipe: {", "  stages: [{name: one, recipe: {optimizer: adam}}, {name: two, share: 0.5}]\n  recipe: {"
)


def test_an_unknown_option_of_a_rule_is_answered_with_the_nearest(tmp_path: Path) -> None:
    text = FOO.replace("keep: first", "only: {centre: true}\n      keep: first")
    with pytest.raises(UserError, match=r"unknown option of method=foo in 'only' of a rule 'centre'.*mean 'center'"):
        foo(tmp_path, text)
    with pytest.raises(UserError, match=r"'only' of a rule must look like \{option: value\}, got 'center'"):
        foo(tmp_path, FOO.replace("keep: first", "only: center\n      keep: first"))


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("momentum: 0.5", "stage one: recipe.momentum=0.5 is not read with optimizer=adam"),
        ("gamma: 0.5", "stage one: recipe.gamma=0.5 is not read with schedule=cosine"),
        ("batch_size: 32", r"stage one: batch_size is one for all stages.*train\.batch_size"),
        ("epochs: 3", "stage one: epochs stands beside the stage's recipe"),
    ],
)
def test_what_a_stage_does_not_read_is_refused(tmp_path: Path, field: str, said: str) -> None:
    foo(tmp_path, STAGED)
    with pytest.raises(UserError, match=said):
        foo(tmp_path, STAGED.replace("optimizer: adam", f"optimizer: adam, {field}"), "budget=paper")


def test_the_user_may_ask_for_what_one_of_the_stages_reads(tmp_path: Path) -> None:
    words = ("budget=paper", "train.betas=[0.5,0.9]")
    foo(tmp_path, STAGED, *words)
    foo(tmp_path, STAGED, "budget=paper", "train.momentum=0.5")
    with pytest.raises(UserError, match=r"train\.betas=\[0\.5, 0\.9\] is not read with optimizer=sgd"):
        foo(tmp_path, FOO, *words)
