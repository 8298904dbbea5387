"""What the scripts in this folder share: workloads, arguments, the clock, and the line that they print."""

import argparse
import importlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

GAMMA, GAE_LAMBDA, VF_COEF, MAX_GRAD_NORM, ADAM_EPS = 0.99, 0.95, 0.5, 0.5, 1e-5
HIDDEN = (64, 64)


@dataclass(frozen=True)
class Workload:
    """One environment and the sizes of one iteration."""

    env: str
    num_envs: int
    num_steps: int
    epochs: int = 4
    minibatches: int = 4
    lr: float = 3e-4
    clip: float = 0.2
    ent_coef: float = 0.0
    tensors: bool = False
    """The environments are tensors, or compiled, rather than Python objects."""

    @property
    def rollout(self) -> int:
        """Environment steps of one iteration."""
        return self.num_envs * self.num_steps

    @property
    def minibatch(self) -> int:
        """Samples of one minibatch."""
        return self.rollout // self.minibatches


WORKLOADS = {
    "w1": Workload("CartPole-v1", 8, 128),
    "w1v": Workload("CartPole-v1", 8, 128),
    "w1t": Workload("CartPole-v1", 8, 128, tensors=True),
    "w2": Workload("CartPole-v1", 64, 128),
    "w3": Workload("Pendulum-v1", 1024, 32, tensors=True),
    "w3c": Workload("CartPole-v1", 1024, 32, tensors=True),
    "w4": Workload("HalfCheetah-v4", 8, 256, epochs=10, minibatches=32),
    "w5": Workload("PongNoFrameskip-v4", 8, 128, lr=2.5e-4, clip=0.1, ent_coef=0.01),
    "w7r": Workload("CartPole-v1", 64, 128),
}


def cartpole_without_velocities() -> Any:
    """One environment of w7r: its position and angle alone, so that a policy needs a memory."""
    import gymnasium
    import numpy as np

    seen = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    env = gymnasium.make("CartPole-v1", disable_env_checker=True)
    return gymnasium.wrappers.TransformObservation(env, lambda observation: observation[::2], seen)


@dataclass
class Run:
    """One call of a script: what was asked for, and how long it took.

    Call :meth:`tick` where each iteration starts, or :meth:`begin`, :meth:`warm` and :meth:`end` around the two
    stretches; then :meth:`report`.
    """

    peer: str
    name: str
    size: Workload
    iterations: int
    """Timed ones."""
    warm_up: int
    threads: int
    ticks: int = 0
    begun: float = 0.0
    warmed: float = 0.0
    ended: float = 0.0
    preempted: int = 0
    """How often the system took the processor away during the timed iterations: many times where others run too."""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Iterations with the warm-up."""
        return self.warm_up + self.iterations

    def tick(self) -> None:
        """An iteration starts."""
        if self.ticks == 0:
            self.begin()
        if self.ticks == self.warm_up:
            self.warm()
        self.ticks += 1

    def begin(self) -> None:
        """The first iteration starts."""
        self.begun = time.perf_counter()

    def warm(self) -> None:
        """The warm-up is over."""
        self.preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self.warmed = time.perf_counter()

    def end(self) -> None:
        """The last update is over."""
        self.ended = time.perf_counter()
        self.preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self.preempted

    def report(self, *packages: str) -> None:
        """Print the figures as one line of JSON."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print()  # whatever the library printed has ended its line
        self._print(
            steps=self.iterations * self.size.rollout,
            seconds=self.ended - self.warmed,
            first_s=self.warmed - self.begun,
            peak_rss_mb=peak / (2**20 if sys.platform == "darwin" else 2**10),
            versions={**{name: version(name) for name in packages}, "python": platform.python_version()},
            env=self.size.env,
            preempted=self.preempted,
            **self.notes,
        )

    def unsupported(self, reason: str) -> None:
        """Print why the workload cannot be done."""
        self._print(unsupported=reason)

    def _print(self, **figures: Any) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
        print(json.dumps({"peer": self.peer, "workload": self.name, **rounded}), flush=True)


def run_from_arguments(peer: str, arguments: Sequence[str] | None = None) -> Run:
    """Read the command line, and limit threads: call it before torch or JAX are imported.

    Also takes this folder off the path, where scripts have the names of the packages that they import.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    parser = argparse.ArgumentParser(description=f"Environment steps per second of {peer}, with training.")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w1")
    parser.add_argument("--steps", type=int, default=60_000, help="timed ones, rounded up to whole iterations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=4, help="iterations before the timed ones")
    given = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    size = WORKLOADS[given.workload]
    iterations = max(1, math.ceil(given.steps / size.rollout))
    return Run(peer, given.workload, size, iterations, given.warm_up, given.threads)


def tensor_environments() -> ModuleType:
    """``ppo_lightning.envs.classic_control``, without what the package's ``__init__`` imports."""
    folder = Path(__file__).resolve().parents[2] / "ppo_lightning"
    for name, place in (("ppo_lightning", folder), ("ppo_lightning.envs", folder / "envs")):
        module = ModuleType(name)
        module.__path__ = [str(place)]
        sys.modules[name] = module
    return importlib.import_module("ppo_lightning.envs.classic_control")
