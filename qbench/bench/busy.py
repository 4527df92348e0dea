"""A training step beside other programs at work, by what OpenMP's threads do while they wait for each other."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from qbench.bench.setting import Setting
from qbench.bench.speed import Elsewhere
from qbench.bench.timing import Act, Entry, alternate, compared
from qbench.cli.waiting import NAMES

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
}
BESIDE = (0, 1, 2)
# Computes until it is ended, or whoever started it is gone.
PROGRAM = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def steps(s: Setting) -> Iterator[Entry]:
    """Plain float steps, each policy in a process of its own, beside no, one and two busy programs of one thread."""
    for model in s.models:
        config, acts = s.config("float", model), dict[str, Act]()
        with ExitStack() as opened:
            for name, policy in POLICIES.items():
                with _said(policy):
                    acts[name] = opened.enter_context(Elsewhere(config, s.threads)).step
            for count in BESIDE:
                with _programs(count):
                    times = alternate(acts, s.rounds, warm=1)
                of = "the same step with OpenMP's own waiting, beside as many busy programs"
                for name in POLICIES:
                    mode = f"{count} beside/{name}"
                    yield compared("busy", mode, times, name, "default", of, model=model, batch=s.batch)


@contextmanager
def _said(policy: Mapping[str, str]) -> Iterator[None]:
    """Within the block a process that is started finds `policy` in its environment, and no other."""
    before = {name: os.environ.pop(name) for name in NAMES if name in os.environ}
    os.environ.update(policy)
    try:
        yield
    finally:
        for name in policy:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _programs(count: int) -> Iterator[None]:
    """Within the block `count` other programs compute, with one thread each."""
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM]) for _ in range(count)]
    try:
        yield
    finally:
        for one in started:
            one.kill()
            one.wait()
