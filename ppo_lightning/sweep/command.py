"""``python -m ppo_lightning sweep``."""

import argparse
import signal
import sys
from types import FrameType
from typing import NoReturn

from ppo_lightning.errors import said_in_one_sentence
from ppo_lightning.sweep.search import sweep
from ppo_lightning.sweep.trials import DIRECTIONS


def main(words: list[str]) -> None:
    """Run a sweep; what the user can mend is said in one sentence, with exit status 1."""
    parser = argparse.ArgumentParser(
        prog="ppo-lightning sweep",
        description="Search for hyperparameters with Optuna. All other options, such as --model.total_steps 50000, are "
        "those of fit. The same command goes on with a sweep that was stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, action="append", help="config that fit takes; further ones change it, as with fit")
    add("--space", required=True, help="YAML: key of the config: [value, …] or {distribution, min, max}")
    add("--trials", type=int, default=20, help="of the study in all (default: 20)")
    add("--objective", nargs="+", default=["score"], choices=DIRECTIONS, help="one, or several for a Pareto front")
    add("--metric", default="eval/mean_reward", help="what score and threshold mean (default: eval/mean_reward)")
    add("--threshold", type=float, help="of the metric, at which a run ends; steps_to needs it")
    add("--sampler", choices=("tpe", "random", "cmaes"), default="tpe", help="(default: tpe)")
    add("--pruner", choices=("median", "none"), help="(default: median where there is one objective)")
    add("--seeds", type=int, default=1, help="runs of each trial, whose mean counts (default: 1)")
    add("--workers", type=int, default=1, help="trials at once (default: 1)")
    add("--seed", type=int, default=0, help="of proposals and runs (default: 0)")
    add("--study", help="name (default: the config's)")
    add("--storage", help="URL of a database, or a file.journal that machines share (default: in the folder)")
    add("--folder", help="of results (default: sweeps/STUDY)")
    given, flags = parser.parse_known_args(words)
    given.config, flags = given.config[0], [*(f"--config={file}" for file in given.config[1:]), *flags]
    signal.signal(signal.SIGTERM, _leave)
    with said_in_one_sentence():
        try:
            sweep(**vars(given), flags=flags)
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
