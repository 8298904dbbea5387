"""Where a CUDA device is at hand: thousands of environments on it, eager and captured, beside rsl_rl.

    python benchmarks/cuda.py [--num_envs 4096 16384] [--iterations 100]

Pendulum as tensors on the device, 32 steps, 4 epochs × 4 minibatches, 64-64 tanh. First it is checked that eager and captured
training end alike; then steps per second of both, and of rsl_rl where it can be imported (pip install rsl-rl-lib).
"""

import argparse
import importlib.util
import logging
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

from ppo_lightning import PPO  # noqa: E402
from ppo_lightning.envs.classic_control import Pendulum  # noqa: E402

WARM_UP, STEPS = 8, 32


def ours(num_envs: int, iterations: int, *, compile: bool) -> tuple[float, torch.Tensor]:
    """Steps per second after the warm-up, and the parameters that were learnt."""
    lightning.seed_everything(1, verbose=False)
    model = PPO(
        partial(Pendulum, device="cuda"),
        num_envs=num_envs,
        num_steps=STEPS,
        total_steps=(WARM_UP + iterations) * STEPS * num_envs,
        compile=compile,
    )
    times: list[float] = []

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer = lightning.Trainer(
        accelerator="cuda",
        devices=1,
        callbacks=[Clock()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model)
    learnt = torch.cat([parameter.detach().flatten().cpu() for parameter in model.policy.parameters()])
    timed = times[WARM_UP:]
    return (len(timed) - 1) * STEPS * num_envs / (timed[-1] - timed[0]), learnt


def rsl_rl(num_envs: int, iterations: int) -> float:
    """Steps per second of rsl_rl on the same environments."""
    from rsl_rl.env import VecEnv  # pyright: ignore[reportMissingImports]
    from rsl_rl.runners import OnPolicyRunner  # pyright: ignore[reportMissingImports]
    from tensordict import TensorDict

    vector = Pendulum(num_envs, device="cuda")

    class Adapter(VecEnv):
        def __init__(self) -> None:
            self.num_envs, self.num_actions, self.max_episode_length = num_envs, 1, 200
            self.device, self.cfg = "cuda", {}
            self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device="cuda")
            self.observation = TensorDict({"policy": vector.reset(seed=1)[0]}, [num_envs])

        def get_observations(self) -> Any:
            return self.observation

        def step(self, actions: torch.Tensor) -> Any:
            seen, reward, terminated, truncated, _ = vector.step(actions)
            self.observation = TensorDict({"policy": seen}, [num_envs])
            return self.observation, reward, terminated | truncated, {"time_outs": truncated}

    network = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "tanh"}
    settings = {
        "num_steps_per_env": STEPS,
        "save_interval": 10**9,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**network, "distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"}},
        "critic": network,
        "algorithm": {"class_name": "PPO", "num_learning_epochs": 4, "num_mini_batches": 4, "learning_rate": 3e-4},
    }
    runner = OnPolicyRunner(Adapter(), settings, log_dir=None, device="cuda")
    runner.learn(WARM_UP)
    torch.cuda.synchronize()
    started = time.perf_counter()
    runner.learn(iterations)
    torch.cuda.synchronize()
    return iterations * STEPS * num_envs / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_envs", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--iterations", type=int, default=100)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here; benchmarks/run.py measures on the CPU")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    (_, eager), (_, captured) = (ours(256, 10, compile=compile) for compile in (False, True))
    print(f"eager and captured parameters after 18 iterations differ by {(eager - captured).abs().max():.1e} at most")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| environments | captured | eager | rsl_rl |\n|---|---|---|---|")
    for num_envs in options.num_envs:
        rates = [ours(num_envs, options.iterations, compile=compile)[0] for compile in (True, False)]
        if importlib.util.find_spec("rsl_rl") is not None:
            rates.append(rsl_rl(num_envs, options.iterations))
        print(f"| {num_envs:,} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
