"""Noticing that steps have come to take several times what they took at their best: mostly another program's doing."""

SLOW_FACTOR = 3.0  # times the seconds of the fastest window
SLOW_SECONDS = 10.0  # for so long on end, so that a short disturbance is not worth a line
WINDOW_STEPS = 5  # fewest steps to measure


class Pace:
    """The seconds per step of a run, from window to window; what is saved in between does not count."""

    def __init__(self, step: int, time: float) -> None:
        self._fastest = float("inf")
        self._slow_seconds = 0.0
        self._told = False
        self.restart(step, time)

    def restart(self, step: int, time: float) -> None:
        """Measure from here: `step` updates are done at `time`, in seconds."""
        self._step, self._time = step, time

    def look(self, step: int, time: float) -> float | None:
        """How many times slower than at their best steps have become, once, when it is worth a line; else None."""
        steps, seconds = step - self._step, time - self._time
        if steps < WINDOW_STEPS:
            return None
        self.restart(step, time)
        self._fastest = min(self._fastest, seconds / steps)
        factor = seconds / steps / self._fastest
        self._slow_seconds = self._slow_seconds + seconds if factor >= SLOW_FACTOR else 0.0
        if self._told or self._slow_seconds < SLOW_SECONDS:
            return None
        self._told = True
        return factor
