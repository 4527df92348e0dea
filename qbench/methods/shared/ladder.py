"""Progressive bits: a net is trained with many bits first, then with fewer and fewer."""

from collections.abc import Hashable, Sequence
from typing import Any

from qbench.quant.method import Hook, State
from qbench.quant.quantizer import Quantizer, check_bits


class Progressive(Quantizer):
    """A quantizer whose bits may be more than those asked for while a `Ladder` trains it.

    A subclass calls `ask` in its constructor and computes all that depends on the bits from `bits`, which is part of
    its state.
    """

    asked: int
    bits: int

    def ask(self, bits: float, lo: int, hi: int) -> None:
        """Have so many bits, in lo..hi; ValueError outside."""
        self.bits = self.asked = check_bits(bits, lo, hi)

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "bits": self.bits}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.bits = state["bits"]


class Ladder(Hook):
    """Each stage trains at the bits that are its value, the last, which has none, at those asked for.

    Quantizers that were asked for more bits than a rung has (first and last layer, say) keep their own. What is
    learned, weights and the quantizers' parameters, goes on from rung to rung.

    Args:
        rungs: the values of the stages, falling

    Raises:
        ValueError: bits out of 1..16, or not falling
    """

    def __init__(self, rungs: Sequence[int]) -> None:
        super().__init__()
        checked = [check_bits(rung, 1, 16, "bits of the ladder") for rung in rungs]
        if checked != sorted(set(checked), reverse=True):
            raise ValueError(f"bits of the ladder must fall from rung to rung, got {list(rungs)}")

    def phase(self, state: State) -> Hashable:
        value: Hashable = state.stage.value
        return value

    def before_stage(self, state: State) -> None:
        for q in state.model.modules():
            if isinstance(q, Progressive):
                q.bits = max(q.asked, state.stage.value or 0)
