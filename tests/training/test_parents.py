"""The float parents that lie with the repository are those that today's commands ask for."""

from pathlib import Path

import pytest
import yamls

from qbench.config.identity import digest, identity, parent_of
from qbench.records import read_result
from qbench.training.run import COMMITTED

FOLDERS = sorted(COMMITTED.glob("float-*"))


def test_there_are_some() -> None:
    assert len(FOLDERS) >= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_run_with_a_short_budget_finds_its_parent(folder: Path) -> None:
    result = read_result(folder / "result.json")
    config = yamls.config_of("method=pact", f"model={result['model']}", "dataset=cifar10", "budget=short")
    key = digest(identity(parent_of(config), result["identity"]["data"], "scratch"))
    assert result["key"] == key == digest(result["identity"])
    assert folder.name == f"float-{result['model']}-cifar10-{key}"
