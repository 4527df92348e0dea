"""`qbench bench`: how fast everything is, as ratios that another machine can be held to."""

from qbench.bench.command import main

__all__ = ["main"]
