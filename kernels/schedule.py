"""The learning rate and the cycle, as pure functions of the step. Free of torch.

Steps count from 0. Cycle i (from 0) covers the steps [b_i, b_{i+1}) with b_i = floor(i * T / M): the same as equation 2
of Huang et al. (2017) when M divides T; when it does not, every cycle still ends annealed (the equation cuts the last
cycle short and saves it at a high rate). The update kernel computes the same on the device from its step counter.
A step past the last one is an error: the cosine would begin again, at the full rate, and undo the last snapshot.
"""

import math
from dataclasses import dataclass

KINDS = ("snapshot", "step")
STEP_DECAY = 0.1  # the standard schedule divides by 10 at 50 % and at 75 % of the steps


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule over `steps` updates that saves `cycles` snapshots.

    kind            "snapshot": M cosine cycles; "step": the standard schedule, which also saves M equally spaced
                    snapshots (the paper's NoCycle baseline)
    steps           T, total number of updates, >= 1
    cycles          M, 1 <= M <= T
    learning_rate   a0, the rate that every cycle (or the run) starts with; finite and > 0

    Raises ValueError for values outside these ranges, and its functions for steps outside 0..T-1.
    """

    kind: str
    steps: int
    cycles: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 1 <= self.cycles <= self.steps:
            raise ValueError(
                f"cycles must be between 1 and the number of steps ({self.steps}), got {self.cycles}: "
                "use fewer cycles or more epochs"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning rate must be finite and above 0, got {self.learning_rate}")

    def boundary(self, cycle: int) -> int:
        """First step of `cycle`, b_i = floor(i * T / M); `boundary(cycles)` is T."""
        return cycle * self.steps // self.cycles

    def check(self, step: int) -> None:
        """Raise ValueError unless the schedule has an update `step`."""
        if not 0 <= step < self.steps:
            raise ValueError(
                f"step must be from 0 to {self.steps - 1}, got {step}: the schedule has {self.steps} updates and then "
                "ends, annealed; to train for longer, make one with more steps"
            )

    def cycle(self, step: int) -> int:
        """Cycle that `step` belongs to, from 0."""
        self.check(step)
        return ((step + 1) * self.cycles - 1) // self.steps

    def ends_cycle(self, step: int) -> bool:
        """Whether a snapshot is due after the update of `step`."""
        return step + 1 == self.boundary(self.cycle(step) + 1)

    def rate(self, step: int) -> float:
        """Learning rate of the update of `step`."""
        self.check(step)
        if self.kind == "step":
            drops = (2 * step >= self.steps) + (4 * step >= 3 * self.steps)
            return self.learning_rate * STEP_DECAY**drops
        cycle = (
            (step + 1) * self.cycles - 1
        ) // self.steps  # as `cycle`, checked above: this runs at every update
        start, end = self.boundary(cycle), self.boundary(cycle + 1)
        return self.learning_rate / 2 * (math.cos(math.pi * (step - start) / (end - start)) + 1)

    def rate_after(self, updates: int) -> float:
        """Learning rate of the update that follows `updates` updates; 0 after the last, which none follows."""
        return 0.0 if updates == self.steps else self.rate(updates)
