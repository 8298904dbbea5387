"""Stable-Baselines3 on the settings of one of our configs, beside our own runs of it in results/learning.csv.

    python -m benchmarks.same_settings --task walker2d --seeds 1 2 3 4 5

What both have in common is taken from the config; Stable-Baselines3's VecNormalize stands for normalize_observation and
normalize_reward. A run is a row of results/same_settings.csv, from which the table is printed.
"""

import argparse
import importlib.metadata
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import yaml

from benchmarks import learning_report as report
from benchmarks.learning_tasks import RESULTS, Row, Task, append, current, load_suite, read_rows
from benchmarks.learning_tasks import ROWS as LEARNING_ROWS

ROWS = RESULTS / "same_settings.csv"
COLUMNS = ("task", "seed", "settings", "library", "train", "seconds")


def settings(task: Task) -> dict[str, Any]:
    """Arguments of Stable-Baselines3's PPO for a task's config, and the number of environments.

    Raises:
        ValueError: the config has something that this comparison does not translate.
    """
    model = dict(yaml.safe_load(task.path.read_text())["model"])
    model = {**model, **{name.removeprefix("model."): value for name, value in task.all_flags.items()}}
    num_envs, num_steps = model.pop("num_envs", 8), model.pop("num_steps", 128)
    policy = model.pop("policy", {}).get("init_args", {})
    for name in ("env", "total_steps", "compile"):
        model.pop(name, None)
    found = {
        "num_envs": num_envs,
        "n_steps": num_steps,
        "batch_size": num_envs * num_steps // model.pop("num_minibatches", 4),
        "n_epochs": model.pop("update_epochs", 4),
        "gamma": model.pop("gamma", 0.99),
        "gae_lambda": model.pop("gae_lambda", 0.95),
        "log_std_init": policy.pop("log_std_init", 0.0),
        "norm_obs": model.pop("normalize_observation", False),
        "norm_reward": model.pop("normalize_reward", False),
    }
    if model or policy:
        raise ValueError(f"{task.path.name}: no translation of {', '.join([*model, *policy])}")
    return found


def train(task: Task, seed: int) -> Row:
    """One run of Stable-Baselines3: the mean return of the last 100 training episodes."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    options = settings(task)
    envs = make_vec_env(task.env or "", options.pop("num_envs"), seed=seed)
    norm = {name: options.pop(name) for name in ("norm_obs", "norm_reward")}
    envs = VecNormalize(envs, **norm, gamma=options["gamma"])
    kwargs = {"log_std_init": options.pop("log_std_init")}
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=lambda left: 3e-4 * left,
        policy_kwargs=kwargs,
        seed=seed,
        device="cpu",
        **options,
    )
    started = time.perf_counter()
    model.learn(task.steps)
    returns = [episode["r"] for episode in model.ep_info_buffer or []]
    own = {"task": task.name, "seed": seed, "settings": task.settings}
    library = f"stable-baselines3 {importlib.metadata.version('stable-baselines3')}"
    seconds = round(time.perf_counter() - started)
    return {**own, "library": library, "train": f"{statistics.fmean(returns):.6g}", "seconds": seconds}


def table(tasks: list[Task]) -> str:
    """Markdown: both libraries on each task that has rows of both."""
    ours, theirs = read_rows(RESULTS / LEARNING_ROWS), read_rows(ROWS)
    lines = ["| task | ppo_lightning | Stable-Baselines3 | ours is higher |", "|---|---|---|---|"]
    for task in tasks:
        both = [[row["train"] for row in current(rows, task)] for rows in (ours, theirs)]
        if all(both):
            cells = []
            for found in map(report.summarize, both):
                cells.append(f"{report.number(found.mean)} ({found.interval_text}; {found.count} seeds)")
            better = report.probability_of_improvement([(both[0], both[1])])
            cells.append("{:.2f} ({:.2f} – {:.2f})".format(*better))
            lines.append(f"| {task.env or task.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    tasks = load_suite().tasks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="walker2d", choices=sorted(tasks))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    options = parser.parse_args()
    task = tasks[options.task]
    settings(task)
    known = {row["seed"] for row in current(read_rows(ROWS), task)}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(train, task, seed) for seed in options.seeds if seed not in known]:
            row = future.result()
            append(ROWS, COLUMNS, row)
            print(row, flush=True)
    print(table(list(tasks.values())))


if __name__ == "__main__":
    main()
