"""What OpenMP is told of waiting threads, before torch loads it."""

from typing import Any

import pytest

WORDS = ("method=float", "model=tiny", "dataset=synthetic", "budget=smoke", "plan=true")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
    ],
)
def test_threads_sleep_soon_while_they_wait_unless_the_user_says_otherwise(
    said: dict[str, str], expected: str, process: Any
) -> None:
    own = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "", "OMP_DISPLAY_ENV": "VERBOSE", **said}
    one = process("--version", **own)
    assert "OPENMP" not in one.communicate()[1]  # torch is not loaded for this
    one = process(*WORDS, **own)
    err = one.communicate()[1]
    assert one.returncode == 0, err
    if "OPENMP DISPLAY ENVIRONMENT" not in err:
        pytest.skip("torch computes without OpenMP here")
    assert expected in err  # as the library itself read it
