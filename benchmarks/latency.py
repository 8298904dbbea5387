"""Microseconds per action, one observation at a time, of the ways to act with a trained policy.

    python -m benchmarks.latency

A network of 64-64 on HalfCheetah's shapes with normalised observations, and an LSTM; Stable-Baselines3's ``predict`` beside it.
One thread; the median of rounds that take turns.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnxruntime
import stable_baselines3
import torch
from gymnasium.spaces import Box

from ppo_lightning import PPO, ActorCritic

ROUNDS, CALLS = 15, 400


class Shapes(gymnasium.Env):
    """HalfCheetah's spaces, without a simulator."""

    observation_space = Box(-np.inf, np.inf, (17,), np.float64)
    action_space = Box(-1.0, 1.0, (6,), np.float32)


def ways(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    observation = np.random.default_rng(0).standard_normal(17)
    row = observation[None].astype(np.float32)
    found: dict[str, Callable[[], Any]] = {}
    for name, options in {"64-64": {}, "64-64 and LSTM-64": {"rnn": "lstm"}}.items():
        model = PPO(Shapes, policy=partial(ActorCritic, **options), normalize_observation=True)
        model.eval()
        state = np.zeros((1, model.policy.state_size), np.float32)
        given = {"observation": row, "state": state} if options else {"observation": row}
        model.export(folder / f"{name}.onnx")
        model.export(folder / f"{name}.pt2")
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", threads)
        program: Any = torch.export.load(folder / f"{name}.pt2").module()
        tensors = [torch.from_numpy(value) for value in given.values()]
        found |= {
            f"{name}: predict": partial(model.predict, observation),
            f"{name}: model(tensor)": torch.no_grad()(partial(model, *tensors)),
            f"{name}: .onnx by onnxruntime": partial(session.run, None, given),
            f"{name}: .pt2 by torch.export": torch.no_grad()(partial(program, *tensors)),
        }
    found["64-64: Stable-Baselines3's predict"] = partial(
        stable_baselines3.PPO("MlpPolicy", Shapes(), device="cpu").predict, observation, deterministic=True
    )
    return found


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds per call, the median of rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.perf_counter() - started) / CALLS)
    return {name: 1e6 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(ways(Path(folder)))
    print("| policy and way | µs per action |\n|---|---|")
    for name, microseconds in found.items():
        print(f"| {name} | {microseconds:.0f} |")
    print(f"\ntorch {torch.__version__}, onnxruntime {onnxruntime.__version__}, one thread")


if __name__ == "__main__":
    main()
