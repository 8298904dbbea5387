"""Two processes against one: HalfCheetah-v4 with the same work for each, every process on a core of its own.

    python benchmarks/ddp.py [--iterations 20] [--rounds 3] [--collectives]

Environment steps per second with training (w4.yaml with normalisation, one thread, no evaluations), after five iterations
of warm-up; one and two processes take turns. --collectives counts, instead, what one iteration sends.
"""

import argparse
import logging
import os
import socket
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

# Off with this folder, whose cuda.py torch would take for the package of that name.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]

import lightning  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from torch import multiprocessing  # noqa: E402
from torch.profiler import profile  # noqa: E402

from ppo_lightning import PPO  # noqa: E402

CONFIG = Path(__file__).resolve().parent / "w4.yaml"
WARM_UP = 5


class Meter(lightning.Callback):
    """When each iteration began; the collectives of the last one, where they are asked for."""

    def __init__(self, iterations: int, collectives: bool) -> None:
        self.iterations, self.collectives = iterations, collectives
        self.times: list[float] = []
        self.sent: Counter[str] = Counter()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the time; record the last iteration."""
        self.times.append(time.perf_counter())
        if self.collectives and len(self.times) == WARM_UP + self.iterations:
            self.recorder = profile()
            self.recorder.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the time; count."""
        self.times.append(time.perf_counter())
        if self.collectives:
            self.recorder.stop()
            self.sent.update(e.name for e in self.recorder.events() or () if e.name.startswith("gloo:"))


def train(rank: int, world_size: int, port: int, compile: bool, options: argparse.Namespace, results: Any) -> None:
    """One process of a run; the first tells steps per second over all, or what it sent."""
    if world_size > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in {**place, "LOCAL_RANK": rank}.items()})
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lightning.seed_everything(0, verbose=False)
    given = {**yaml.safe_load(CONFIG.read_text())["model"], "total_steps": 10**9, "compile": compile}
    model = PPO(**given, normalize_observation=True, normalize_reward=True)
    meter = Meter(options.iterations, options.collectives)
    lightning.Trainer(
        accelerator="cpu",
        strategy="ddp" if world_size > 1 else "auto",
        devices=world_size,
        max_epochs=WARM_UP + options.iterations,
        callbacks=[meter],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model)
    if rank == 0:
        steps = options.iterations * model.num_steps * model.num_envs * world_size
        results.put(dict(meter.sent) if options.collectives else steps / (meter.times[-1] - meter.times[WARM_UP]))


def measure(world_size: int, compile: bool, options: argparse.Namespace) -> Any:
    """What the first process of a run told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=train, args=(rank, world_size, port, compile, options, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            sys.exit(f"a process ended with {process.exitcode}")
    return results.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--collectives", action="store_true")
    parser.add_argument("--eager-only", action="store_true")
    options = parser.parse_args()
    kinds = (False,) if options.eager_only else (False, True)
    if options.collectives:
        for compile in kinds:
            print("compiled" if compile else "eager", measure(2, compile, options), flush=True)
        return
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores\n")
    print("| | one process | two | ratio, slowest – fastest |\n|---|---|---|---|")
    for compile in kinds:
        rows = [[measure(world_size, compile, options) for world_size in (1, 2)] for _ in range(options.rounds)]
        one, two = (statistics.median(column) for column in zip(*rows, strict=True))
        ratios = sorted(both / alone for alone, both in rows)
        name = "compiled" if compile else "eager"
        print(f"| {name} | {one:,.0f} | {two:,.0f} | {two / one:.2f}, {ratios[0]:.2f} – {ratios[-1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
