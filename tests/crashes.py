"""Environments in which one of several goes wrong, once: the one whose seed is ``FIRST_SEED`` plus its index."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

FIRST_SEED = 100


class Unpicklable(Exception):  # noqa: N818 - the name says what it is for
    """Holds a lock, and takes two arguments, so that it survives no pickle."""

    def __init__(self, text: str, lock: Any) -> None:
        super().__init__(text)
        self.lock = lock


class Crash(gym.Env):
    """Episodes of five steps that are cut; what is seen is the number of the step.

    Args:
        fault: what goes wrong.
        index: in which environment.
        at: in which of all its steps, from 1; of a fault in reset, in the next reset from there on.
        slow: seconds that a step of the other environments takes when ``at`` has come.
        marks: file that gets the time of each construction, and of the fault.
        nested: observations are a Dict.
        errors: file that gets the error stream of a worker process.
    """

    REWARDS: ClassVar = {"nan reward": np.nan, "inf reward": np.inf, "-inf reward": -np.inf, "none reward": None}
    VALUES: ClassVar = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 1e300, "outside": 11.0}

    def __init__(
        self,
        fault: str,
        index: int = 1,
        at: int = 3,
        slow: float = 0.0,
        marks: str | Path | None = None,
        nested: bool = False,
        errors: Path | None = None,
    ) -> None:
        if errors is not None and multiprocessing.parent_process() is not None:
            os.dup2(os.open(errors, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
        self.fault, self.index, self.at, self.slow, self.marks, self.nested = fault, index, at, slow, marks, nested
        dtype = np.float64 if fault.startswith("huge") else np.float32
        bound = 1e301 if fault.startswith("huge") else 10.0
        box = Box(-bound, bound, (2,), dtype)
        self.observation_space = Dict({"place": box, "speed": box}) if nested else box
        self.action_space = Discrete(2)
        self.dtype, self.mine, self.total, self.steps = dtype, False, 0, 0
        if fault == "init" and len(self.mark()) == at:
            raise ValueError("no licence")

    def mark(self) -> list[str]:
        path = Path(str(self.marks))
        with path.open("a") as file:
            file.write(f"{time.time()}\n")
        return path.read_text().split()

    def see(self, value: Any = None) -> Any:
        first = np.full(2, self.steps if value is None else value, self.dtype)
        return {"place": np.full(2, self.steps, self.dtype), "speed": first} if self.nested else first

    def happen(self) -> None:
        if self.marks is not None:
            self.mark()
        match self.fault:
            case "raise" | "raise in reset":
                raise ZeroDivisionError("the pole is at infinity")
            case "unpicklable":
                raise Unpicklable("the lock is held", threading.Lock())
            case "exit":
                raise SystemExit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "_exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)

    def explode(self) -> None:
        raise Unpicklable("the lock is held", threading.Lock())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.mine = seed == FIRST_SEED + self.index
        if self.mine and self.fault == "raise in reset" and self.total >= self.at:
            self.happen()
        self.steps = 0
        return self.see(), {}

    def step(self, action: Any):
        self.total += 1
        self.steps += 1
        observation, reward, truncated, info = self.see(), 1.0, self.steps >= 5, {}
        if self.total != self.at:
            return observation, reward, False, truncated, info
        if not self.mine:
            time.sleep(self.slow)
            return observation, reward, False, truncated, info
        if self.fault != "raise in reset":
            self.happen()
        name, _, place = self.fault.partition(" ")
        if self.fault in self.REWARDS:
            reward = self.REWARDS[self.fault]
        elif name in self.VALUES:
            observation, truncated = self.see(self.VALUES[name]), truncated or place == "final"
        elif self.fault == "shape":
            observation = np.zeros(4, np.float32)
        elif self.fault == "dtype":
            observation = np.zeros(2, np.float64)
        elif self.fault == "scalar":
            observation = np.float32(7)
        elif self.fault == "integer":
            observation = np.zeros(2, np.int64)
        elif self.fault == "missing":
            observation = {"place": np.zeros(2, np.float32)}
        elif self.fault == "info":
            info = {"lock": threading.Lock()}
        return observation, reward, False, truncated, info


def native(num_envs: int = 2, **kwargs: Any) -> SyncVectorEnv:
    """A vector that its user made, whose resets are asked for."""
    return SyncVectorEnv([lambda: Crash(**kwargs)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
