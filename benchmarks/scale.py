"""How cost per step changes with the number of environments, the network and the rollout; and what memory is held.

    python benchmarks/scale.py [--minutes 0]

CartPole as tensors, compiled, one thread. --minutes N also trains for N minutes and prints resident memory once a minute.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

# Off with this folder, whose cuda.py torch would take for the package of that name.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

import lightning  # noqa: E402
import torch  # noqa: E402

from ppo_lightning import PPO, ActorCritic  # noqa: E402
from ppo_lightning.envs.classic_control import CartPole  # noqa: E402

BASE = {"num_envs": 64, "num_steps": 128, "width": 64}
SCALES = {
    "num_envs": (1, 4, 16, 64, 256, 1024, 4096, 16384),
    "num_steps": (16, 32, 128, 512, 2048),
    "width": (16, 64, 256),
}


class Clock(lightning.Callback):
    """When each iteration began; memory once a minute."""

    def __init__(self, minutes: float = 0.0) -> None:
        self.times: list[float] = []
        self.minutes, self.resident = minutes, []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the time, and end in time."""
        self.times.append(time.perf_counter())
        passed = self.times[-1] - self.times[0]
        if self.minutes and passed > 60 * (len(self.resident) + 1) * min(1.0, self.minutes / 5):
            self.resident.append(resident())
            print(
                f"{passed / 60:.1f} minutes, {pl_module.num_env_steps:,} steps: {self.resident[-1]:.1f} MB", flush=True
            )
        if self.minutes and passed > 60 * self.minutes:
            trainer.should_stop = True


def resident() -> float:
    """Memory of this process, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(num_envs: int, num_steps: int, width: int, iterations: int, minutes: float = 0.0) -> tuple[PPO, Clock]:
    torch.manual_seed(0)
    model = PPO(
        CartPole,
        num_envs=num_envs,
        num_steps=num_steps,
        total_steps=iterations * num_steps * num_envs,
        policy=partial(ActorCritic, hidden_sizes=(width, width)),
        compile=True,
    )
    clock = Clock(minutes)
    lightning.Trainer(
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model)
    return model, clock


def held(model: PPO) -> tuple[int, int]:
    """Bytes of a rollout's storage, and of the numbers that a rollout is made of."""
    model.seed = 0
    batch = model.rollouts.collect()
    collector: Any = model.rollouts.collector
    storage = [collector.observations, collector.final_observations, *collector.fields.values()]
    numbers = sum(leaf[: model.num_steps].numel() * leaf.element_size() for leaf in storage)
    assert batch.numel() == model.num_steps * model.num_envs
    return sum(leaf.untyped_storage().nbytes() for leaf in storage), numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--memory-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"base: {BASE}; torch {torch.__version__}\n")
    print("| | | µs per environment step | storage / its numbers |\n|---|---|---|---|")
    for name, values in ({} if options.memory_only else SCALES).items():
        for value in values:
            size = {**BASE, name: value}
            rollout = size["num_envs"] * size["num_steps"]
            model, clock = train(**size, iterations=max(8, min(60, 400_000 // rollout)))
            steps = sorted(after - before for before, after in zip(clock.times[3:], clock.times[4:], strict=False))
            storage, numbers = held(model)
            cost = steps[len(steps) // 2] / rollout * 1e6
            print(f"| {name} | {value:,} | {cost:.2f} | {storage / numbers:.2f} |", flush=True)
            torch._dynamo.reset()
    if options.minutes:
        train(**BASE, iterations=10**7, minutes=options.minutes)


if __name__ == "__main__":
    main()
