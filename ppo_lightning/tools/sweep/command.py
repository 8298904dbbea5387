"""``python -m ppo_lightning sweep``."""

import difflib
import signal
import sys
from types import FrameType
from typing import NoReturn

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.tools.sweep.objective import DIRECTIONS
from ppo_lightning.tools.sweep.search import sweep


def main(words: list[str]) -> None:
    """Run a sweep; user errors are one sentence, with exit status 1."""
    parser = PlainParser(
        prog="ppo-lightning sweep",
        description="Search for hyperparameters with Optuna. All other options, such as --model.total_steps 50000, are "
        "those of fit. The same command resumes a sweep that was stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, action="append", help="config that fit takes; later ones override it, as with fit")
    add("--space", required=True, help="YAML: key of the config: [value, …] or {distribution, min, max}")
    add("--trials", type=int, default=20, help="of the study in total (default: 20)")
    add("--objective", nargs="+", default=["score"], choices=DIRECTIONS, help="one, or several for a Pareto front")
    add("--metric", default="eval/mean_reward", help="that score and threshold refer to (default: eval/mean_reward)")
    add("--threshold", type=float, help="value of the metric at which a run stops; steps_to needs it")
    add("--sampler", choices=("tpe", "random", "cmaes"), default="tpe", help="(default: tpe)")
    add("--pruner", choices=("median", "none"), help="(default: median with one objective)")
    add("--seeds", type=int, default=1, help="runs of each trial, of which the mean counts (default: 1)")
    add("--workers", type=int, default=1, help="trials at once (default: 1)")
    add("--seed", type=int, default=0, help="of the sampler and the runs (default: 0)")
    add("--study", help="name (default: the config's)")
    add("--storage", help="database URL, or a file.journal that machines share (default: in the folder)")
    add("--folder", help="of results (default: sweeps/STUDY)")
    with exit_on_user_error():
        given, flags = parser.parse_known_args(words)
        _check_spelling(flags, [action.option_strings[-1] for action in parser._actions])
        given.config, flags = given.config[0], [*(f"--config={file}" for file in given.config[1:]), *flags]
        before = signal.signal(signal.SIGTERM, _exit)
        try:
            sweep(**vars(given), flags=flags)
        except KeyboardInterrupt:
            print("\nstopped: the same command resumes", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        finally:
            signal.signal(signal.SIGTERM, before)


def _check_spelling(flags: list[str], options: list[str]) -> None:
    """Check the options of the sweep, before ``fit`` suggests keys of its own for a misspelt one.

    Raises:
        InputError: an argument is nearly an option of the sweep; those of ``fit`` have dots, or are --seed_everything.
    """
    for flag in flags:
        name = flag.partition("=")[0]
        near = difflib.get_close_matches(name, options, 1, cutoff=0.75)
        if name.startswith("--") and "." not in name and near:
            raise InputError(f"sweep has no option {name}: did you mean {near[0]}?")


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
