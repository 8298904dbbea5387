"""``ppo-lightning enjoy``: watch a trained policy, in a window, or without a display as a video."""

import os
import sys
from pathlib import Path

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.tools.trained_policy import add_checkpoint, check_output, checkpoint_path, load
from ppo_lightning.tools.video import record_to, rendering_environment, run_episodes


def has_display() -> bool:
    """Whether a window can be opened."""
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))


def main(words: list[str]) -> None:
    """Run ``ppo-lightning enjoy``: show episodes, print each one's return."""
    parser = PlainParser(
        prog="ppo-lightning enjoy",
        description="Watch a checkpoint's policy in a window; without a display, or with --out, as a video.",
    )
    add = parser.add_argument
    add_checkpoint(parser)
    add("--episodes", type=int, default=1, help="how many (default: 1)")
    add("--stochastic", action="store_true", help="draw actions, instead of taking the most probable ones")
    add(
        "--out",
        type=Path,
        metavar="FILE.mp4",
        help="write a video there (default without a display: beside the checkpoint)",
    )
    add("--force", action="store_true", help="replace an existing file")
    with exit_on_user_error():
        given = parser.parse_args(words)
        if given.episodes < 1:
            raise InputError(f"--episodes must be 1 or more, got {given.episodes}")
        if given.out is not None and given.out.suffix != ".mp4":
            raise InputError(f"--out {given.out} is no video: give a name that ends in .mp4")
        checkpoint, deterministic = checkpoint_path(given), not given.stochastic
        file = given.out or (None if has_display() else checkpoint.with_suffix(".mp4"))
        if file is not None:
            check_output(file, force=given.force)
        model = load(given, checkpoint)
        if file is None:
            environments = rendering_environment(model, "human", lambda env: env)
            try:
                for number in range(given.episodes):
                    (episode,) = run_episodes(model, environments, deterministic=deterministic, skip=number).tolist()
                    print(_line(number, episode), flush=True)
            finally:
                environments.close()
        else:
            episodes = record_to(file.resolve(), model, episodes=given.episodes, deterministic=deterministic)
            print(f"video  {file}")
            for number, episode in enumerate(episodes.tolist()):
                print(_line(number, episode))


def _line(number: int, episode: list[float]) -> str:
    return f"episode {number + 1}: return {episode[0]:.2f} in {episode[1]:.0f} steps"
