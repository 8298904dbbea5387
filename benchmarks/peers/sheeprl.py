"""SheepRL's PPO by its command line: Lightning Fabric, Hydra, Gymnasium's sync vector; no logger, no checkpoints."""

import sys
import tempfile
import warnings
from typing import Any

from common import ADAM_EPS, GAE_LAMBDA, GAMMA, HIDDEN, MAX_GRAD_NORM, VF_COEF, run_from_arguments


def main() -> None:
    run = run_from_arguments("sheeprl")
    size = run.size
    if run.name not in {"w1", "w2", "w4"}:
        reasons = {
            "w5": "Its settings for Atari are other networks than these.",
            "w7r": "Its recurrent PPO is not set up.",
        }
        run.unsupported(reasons.get(run.name, "It has no tensor envs."))
        return
    warnings.filterwarnings("ignore")
    import torch
    from sheeprl import cli
    from sheeprl.algos.ppo import ppo

    torch.set_num_threads(run.threads)
    annealed = ppo.anneal

    def anneal(*args: Any) -> None:
        """What each iteration begins with."""
        run.tick()
        annealed(*args)

    ppo.anneal = anneal
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "exp": "ppo",
            "log_root": folder,
            "hydra.run.dir": folder,
            "num_threads": run.threads,
            "env.id": size.env,
            "env.num_envs": size.num_envs,
            "env.sync_env": True,
            "env.capture_video": False,
            "env.wrapper.render_mode": "null",
            "+env.wrapper.disable_env_checker": True,
            "algo.total_steps": run.total * size.rollout,
            "algo.rollout_steps": size.num_steps,
            "algo.update_epochs": size.epochs,
            "algo.per_rank_batch_size": size.minibatch,
            "algo.gamma": GAMMA,
            "algo.gae_lambda": GAE_LAMBDA,
            "algo.clip_coef": size.clip,
            "algo.vf_coef": VF_COEF,
            "algo.ent_coef": size.ent_coef,
            "algo.max_grad_norm": MAX_GRAD_NORM,
            "algo.normalize_advantages": True,
            "algo.optimizer.lr": size.lr,
            "algo.optimizer.eps": ADAM_EPS,
            "algo.dense_units": HIDDEN[0],
            "algo.mlp_layers": len(HIDDEN),
            "algo.encoder.mlp_layers": 0,  # actor and critic share nothing
            "algo.compile.enabled": run.name != "w4",  # the player's step: a few per cent faster, but not there
            "algo.compile.mode": "default",
            "algo.run_test": False,
            "buffer.memmap": False,
            "buffer.from_numpy": True,
            "checkpoint.every": 0,
            "checkpoint.save_last": False,
            "metric.log_level": 0,
            "metric.disable_timer": True,
        }
        sys.argv = ["sheeprl", *(f"{key}={value}" for key, value in settings.items())]
        cli.run()
        run.end()
    run.report("sheeprl", "torch", "lightning", "gymnasium", "numpy")


if __name__ == "__main__":
    main()
