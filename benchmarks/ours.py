"""ppo_lightning on one workload, by the command that users type; called like the scripts in peers/.

    python benchmarks/ours.py --workload w1 --steps 60000 --threads 1 --warm-up 4 [--eager] [--plain] [--bare] [--parts]

--eager leaves the update uncompiled. --plain is the same loop without Lightning: the same rollouts, advantages, update
function, metrics and logger. --bare leaves HealthMonitor, RunReport and RunSummary out of Trainer.fit.
--parts adds up where the time goes.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
# Off with this folder, whose cuda.py torch would take for the package of that name.
others = [place for place in sys.path if Path(place).resolve() != HERE]
sys.path[:] = [str(HERE / "peers"), *others, str(HERE.parent)]

from common import Run, run_from_arguments  # noqa: E402  # pyright: ignore[reportMissingImports]

PACKAGES = ("ppo-lightning", "torch", "lightning", "gymnasium")


def watch(seconds: dict[str, float], owner: Any, name: str, part: str) -> None:
    """Add up what calls of a function or method take; calls inside are not told apart."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - started

    setattr(owner, name, timed)


def watch_parts(seconds: dict[str, float]) -> None:
    """Time the parts of an iteration; each is called at most once a step."""
    from lightning.pytorch.loggers import CSVLogger

    from ppo_lightning import PPO
    from ppo_lightning.envs import VectorEnvAdapter
    from ppo_lightning.rollout.dataset import RolloutDataset

    for name in ("step_async", "step_wait", "step_tensors"):
        watch(seconds, VectorEnvAdapter, name, "environment")
    watch(seconds, RolloutDataset, "collect", "collection")
    watch(seconds, PPO, "on_train_batch_start", "advantage")
    watch(seconds, PPO, "update", "update")
    watch(seconds, PPO, "metrics", "logging")
    watch(seconds, CSVLogger, "log_metrics", "logging")


def fit(run: Run, words: list[str], seconds: dict[str, float], *, bare: bool) -> None:
    """``ppo_lightning fit``, with a clock beside it."""
    from lightning import Callback

    from ppo_lightning import cli
    from ppo_lightning.callbacks import HealthMonitor, RunReport, RunSummary

    class Meter(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if bare:
                kept = [own for own in trainer.callbacks if not isinstance(own, HealthMonitor | RunReport | RunSummary)]
                trainer.callbacks = kept

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            run.tick()
            if run.ticks == run.warm_up + 1:
                seconds.clear()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            run.end()
            run.notes["compiled"] = pl_module.updater.compiled is not None
            run.notes["callbacks"] = [type(own).__name__ for own in trainer.callbacks]

    class Timed(cli.PPOCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Meter())  # pyright: ignore[reportAttributeAccessIssue]
            return trainer

        def after_fit(self) -> None:
            """No plot."""

    cli.PPOCLI = Timed
    cli.main(words)


def plain(run: Run, given: dict[str, Any], folder: str) -> None:
    """The same loop without Lightning."""
    from lightning.pytorch.loggers import CSVLogger

    from ppo_lightning import PPO

    model, logger = PPO(**given), CSVLogger(folder)
    optimizer = model.optimizer(model.parameters())
    while model.num_env_steps < model.total_steps:
        run.tick()
        logger.log_metrics(dict(model.learn(model.collect(), optimizer)), step=model.num_env_steps)
    run.end()
    logger.save()
    model.close_environments()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("eager", "plain", "bare", "parts"):
        parser.add_argument(f"--{flag}", action="store_true")
    own, rest = parser.parse_known_args()
    run = run_from_arguments("ppo_lightning", rest)
    config = HERE / f"{run.name}.yaml"
    given = yaml.safe_load(config.read_text())["model"]
    given |= {"total_steps": run.total * run.size.rollout, "compile": given.get("compile", False) and not own.eager}
    import torch

    torch.set_num_threads(run.threads)
    seconds: dict[str, float] = defaultdict(float)
    if own.parts:
        watch_parts(seconds)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if own.plain:
            plain(run, given, folder)
        else:
            flags = {
                "config": config,
                "model.total_steps": given["total_steps"],
                "model.compile": str(given["compile"]).lower(),
                "trainer.accelerator": "cpu",
                "trainer.enable_progress_bar": "false",
                "trainer.enable_checkpointing": "false",
                "trainer.enable_model_summary": "false",
                "trainer.limit_val_batches": 0,
                "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
                "trainer.logger.save_dir": folder,
            }
            fit(run, ["fit", *(f"--{name}={value}" for name, value in flags.items())], seconds, bare=own.bare)
    if own.parts:
        run.notes["parts_s"] = parts(seconds, run.ended - run.warmed)
    run.report(*PACKAGES)


def parts(seconds: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of each part of the timed iterations; of environments that are compiled with the policy, both in one."""
    known = {name: seconds[name] for name in ("environment", "advantage", "update", "logging")}
    known["policy"] = seconds["collection"] - seconds["environment"]
    known["Lightning and the rest"] = total - sum(known.values())
    return {name: round(value, 4) for name, value in known.items()}


if __name__ == "__main__":
    main()
