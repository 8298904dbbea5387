"""One run of learning.py, in a process of its own: train by ``fit``, evaluate 100 episodes, write both as JSON.

python benchmarks/one_run.py result.json --config configs/cartpole.yaml --seed_everything 1
"""

import json
import statistics
import sys
import time
from pathlib import Path

from ppo_lightning.cli import main


def run(result: Path, flags: list[str]) -> None:
    """Train with the flags of ``fit``, and write what came out."""
    started = time.perf_counter()
    model = main(["fit", *flags]).model
    seconds = time.perf_counter() - started
    episodes = [episode[0] for episode in model.rollouts.episodes.ep_info_buffer]
    evaluation = model.evaluate(num_episodes=100, deterministic=True, purpose="test")
    contents = {
        "train": statistics.fmean(episodes),
        "eval": evaluation["eval/mean_reward"],
        "steps": model.num_env_steps,
        "seconds": seconds,
    }
    result.write_text(json.dumps(contents))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
