"""Wall-clock time of a fit."""

import time

BURN_IN = 2
"""Iterations that ``time/fps`` leaves out: the first ones warm up allocators and caches."""


class Clock:
    """Wall-clock time of one fit: since its start, and since its burn-in without evaluations."""

    def __init__(self) -> None:
        self.fps: float | None = None
        """Environment steps per second since the burn-in; None before its end."""
        self._started = time.perf_counter()
        self._evaluating = 0.0  # seconds since the burn-in
        self._last_evaluation = 0.0  # seconds since the last iteration was logged
        self._iterations = 0
        self._last_lap = self._started
        self._mark = (0, 0.0)  # environment steps and time at the end of the burn-in

    def add_evaluation(self, seconds: float) -> None:
        """Record an evaluation."""
        self._evaluating += seconds
        self._last_evaluation += seconds

    def lap(self, env_steps: int) -> dict[str, float]:
        """Record the end of an iteration; returns its ``time/…`` in seconds and environment steps per second."""
        now = time.perf_counter()
        self._iterations += 1
        metrics = {
            "time/time_elapsed": now - self._started,
            "time/iteration": now - self._last_lap,
            "time/evaluate": self._last_evaluation,
        }
        self._last_lap = now
        self._last_evaluation = 0.0
        if self._iterations == BURN_IN:
            self._mark, self._evaluating = (env_steps, now), 0.0
        elif self._iterations > BURN_IN:
            steps, then = self._mark
            self.fps = (env_steps - steps) / (now - then - self._evaluating)
            metrics["time/fps"] = self.fps
        return metrics
