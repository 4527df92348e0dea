"""How the threads of a run wait for each other. OpenMP reads it while torch is loaded: it must be said before."""

import os

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # where a user may have said it


def sleep_while_waiting() -> None:
    """Let threads that wait sleep, in this process and those that it starts, where the user has said nothing.

    By default they spin, and beside other programs they so take the cores from the thread that they wait for: see
    docs/speed.md.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
