"""Environment steps per second, with training, beside Stable-Baselines3 and beside the same loop without Lightning.

    python benchmarks/speed.py [--workload cartpole] [--repeats 5] [--steps 60000]

cartpole: CartPole-v1, 8 sync environments × 128 steps, 4 epochs × 4 minibatches, 64-64 tanh, one thread.
pong: Pong, 8 environments × 128 steps, 4 × 4, Nature CNN, two threads; configs/atari.yaml as it stands beside CnnPolicy.

The contestants take turns; the table gives medians. The plain loop calls the same rollout, advantage, update, metrics
and logger, with plain autograd and optimiser in place of Lightning's, so that its distance from ``Trainer.fit`` is
Lightning's share.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from gymnasium import Space
from lightning.pytorch.loggers import CSVLogger

from ppo_lightning import PPO, ActorCritic, Linear

WARM_UP = 4  # iterations


class TimedPPO(PPO):
    """Times iterations after the warm-up, by hooks that are called anyway."""

    def on_train_epoch_start(self) -> None:
        """Start after the warm-up."""
        if self.current_epoch == WARM_UP:
            self.started = time.perf_counter()

    def on_train_end(self) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.started


def make(workload: str, total_steps: int) -> TimedPPO:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "num_envs": 8,
        "num_steps": 128,
        "update_epochs": 4,
        "num_minibatches": 4,
        "total_steps": total_steps,
    }
    if workload == "cartpole":
        return TimedPPO("CartPole-v1", **size)
    config = yaml.safe_load((Path(__file__).parent.parent / "configs" / "atari.yaml").read_text())["model"]
    given = {name: config[name] for name in ("env", "env_kwargs", "clip_reward", "ent_coef")}
    return TimedPPO(**given, **size, clip_range=Linear(**config["clip_range"]), policy=shared_network)


def shared_network(observation_space: Space, action_space: Space) -> ActorCritic:
    return ActorCritic(observation_space, action_space, shared=True)


def fit(workload: str, steps: int, folder: str) -> float:
    """Seconds that ``Trainer.fit`` takes; bar, checkpoints and evaluation off."""
    model = make(workload, steps)
    lightning.Trainer(
        accelerator="cpu",
        precision="32-true" if workload == "cartpole" else "bf16-mixed",
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model)
    return model.seconds


def plain(workload: str, steps: int, folder: str) -> float:
    """Seconds of the same loop without Lightning."""
    model, logger = make(workload, steps), CSVLogger(folder)
    optimizer = model.optimizer(model.policy.parameters())
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    def descend(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        model.clip_gradients_by_norm()
        optimizer.step()

    started = 0.0
    while model.num_env_steps < steps:
        if int(model.iterations) == WARM_UP:
            started = time.perf_counter()
        batch = model.rollouts.collect()
        model.on_train_batch_start(batch, 0)
        begun = time.perf_counter()
        model.anneal(optimizer)
        update = model.update(batch, descend)
        model.count(batch, update.epochs)
        logger.log_metrics({**model.metrics(batch, update, time.perf_counter() - begun)}, step=model.num_env_steps)
    logger.save()
    seconds = time.perf_counter() - started
    model.close_environments()
    return seconds


def stable_baselines3(workload: str, steps: int, folder: str) -> float:
    """Seconds of Stable-Baselines3's PPO with the same environment, network and hyperparameters."""
    from stable_baselines3 import PPO as SB3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import VecFrameStack

    class Mark(BaseCallback):
        started = 0.0
        rollouts = 0

        def _on_rollout_start(self) -> None:
            if self.rollouts == WARM_UP:
                self.started = time.perf_counter()
            self.rollouts += 1

        def _on_step(self) -> bool:
            return True

    size: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "device": "cpu"}
    if workload == "cartpole":
        model = SB3("MlpPolicy", make_vec_env("CartPole-v1", 8), **size)
    else:
        import ale_py  # registers the games

        env = VecFrameStack(make_atari_env(f"{ale_py.__name__}:PongNoFrameskip-v4", 8), 4)
        model = SB3("CnnPolicy", env, learning_rate=2.5e-4, clip_range=0.1, ent_coef=0.01, **size)
    model.set_logger(configure(folder, ["csv"]))
    mark = Mark()
    model.learn(steps, callback=mark)
    return time.perf_counter() - mark.started


CONTESTANTS: dict[str, Callable[[str, int, str], float]] = {
    "ppo_lightning, Trainer.fit": fit,
    "the same loop without Lightning": plain,
    "Stable-Baselines3": stable_baselines3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["cartpole", "pong"], default="cartpole")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="environment steps of each run (60,000; pong 12,288)")
    options = parser.parse_args()
    options.steps = options.steps or (60_000 if options.workload == "cartpole" else 12_288)
    torch.set_num_threads(1 if options.workload == "cartpole" else 2)
    contestants = dict(CONTESTANTS)
    if options.workload == "pong":  # the plain loop knows no autocast
        del contestants["the same loop without Lightning"]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    iteration = 8 * 128
    timed = -(-options.steps // iteration) * iteration - WARM_UP * iteration
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for name, run in contestants.items():
                rates[name].append(timed / run(options.workload, options.steps, folder))
    medians = [statistics.median(values) for values in rates.values()]
    ours, peer = medians[0], medians[-1]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "gymnasium", "stable_baselines3"))
    print(f"{packages}, Python {platform.python_version()}, {options.repeats} repeats of {options.steps:,} steps\n")
    print("| | environment steps per second | of which slowest – fastest |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} – {max(values):,.0f} |")
    print(f"\nTrainer.fit / Stable-Baselines3: {ours / peer:.2f}")
    if options.workload == "pong":
        return
    shares, loop = [b / a - 1 for a, b in zip(*list(rates.values())[:2], strict=True)], medians[1]
    print(f"Lightning's share of the time: {loop / ours - 1:.1%} (by repeat: {', '.join(f'{s:.1%}' for s in shares)})")


if __name__ == "__main__":
    main()
