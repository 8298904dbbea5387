"""Train configs over several seeds and compare their final training return with published ones.

    python benchmarks/learning.py acrobot pendulum --seeds 1 2 3

Every run is ``python -m ppo_lightning fit``, in a folder of its own below ``--root``; a run that is there already is
not repeated. The figure of a run is the mean return over its last 100 training episodes.
"""

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

EXTRA = {
    "half_cheetah": ["--model.env", "HalfCheetah-v4"],  # the version that published figures used
    "hopper": ["--model.env", "Hopper-v4"],
    "walker2d": ["--model.env", "Walker2d-v4"],
}
PUBLISHED = {
    "cartpole": 500.0,
    "acrobot": -80.0,
    "pendulum": -193.0,
    "lunar_lander": 256.0,
    "half_cheetah": 1443.0,
    "hopper": 2383.0,
    "walker2d": 2288.0,
}
"""Stable-Baselines3 with rl-zoo's settings (first four) and CleanRL (MuJoCo v4), by the same measure."""


def train(config: str, seed: int, root: Path, flags: list[str]) -> float:
    run = root / config / f"seed_{seed}"
    done = run / "done"
    if not done.exists():
        command = [sys.executable, "-m", "ppo_lightning", "fit", "--config", f"configs/{config}.yaml"]
        command += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(run)]
        command += [
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.limit_val_batches",
            "0",
            *EXTRA.get(config, []),
        ]
        run.parent.mkdir(parents=True, exist_ok=True)
        with run.with_suffix(".log").open("w") as log:
            subprocess.run(command + flags, check=True, stdout=log, stderr=subprocess.STDOUT)
        done.touch()
    newest = max(run.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open(newline="") as lines:
        returns = [row["rollout/ep_rew_mean"] for row in csv.DictReader(lines) if row.get("rollout/ep_rew_mean")]
    return float(returns[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "configs", nargs="*", default=["cartpole", "acrobot", "pendulum", "lunar_lander", "half_cheetah"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--root", type=Path, default=Path("lightning_logs/learning"))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to fit")
    options = parser.parse_args()
    print("| config | published | mean | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " |")
    print("|---|---|---|" + "---|" * len(options.seeds))
    for config in options.configs:
        returns = [train(config, seed, options.root, options.flags) for seed in options.seeds]
        cells = [f"{PUBLISHED[config]:.0f}" if config in PUBLISHED else "–", f"{statistics.mean(returns):.1f}"]
        print(f"| {config} | " + " | ".join(cells + [f"{value:.1f}" for value in returns]) + " |", flush=True)


if __name__ == "__main__":
    main()
