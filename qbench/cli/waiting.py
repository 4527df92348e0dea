"""How the threads of a run wait for each other. OpenMP reads it while torch is loaded: it must be said before."""

import os

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # where a user may have said it


def spin_briefly() -> None:
    """Let threads that wait spin for some microseconds and then sleep, here and in processes started from here.

    Only where the user has said nothing. By default they spin on, and beside other programs they so take the cores from
    the thread that they wait for; asleep at once they lose a fifth of the speed on an idle machine: see docs/speed.md.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ["GOMP_SPINCOUNT"] = "10000"
