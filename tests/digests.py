"""Digests of short runs, to compare before and after a change that must not change a number.

    python tests/digests.py --write before.json             # at the commit before
    python tests/digests.py --compare before.json           # after; names each run that differs, and in what
    python tests/digests.py --compare before.json --only lstm compiled

Each run has three iterations. Its digests cover parameters, buffers, optimizer state and all logged metrics but times. They
are comparable on one machine only, since processors round differently.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from probes import Dials, DiscreteWorld, Scripted, Spaces  # noqa: E402
from processes import forked  # noqa: E402

from ppo_lightning import PPO, ActorCritic, Linear  # noqa: E402

TIMES = ("time/", "hardware/")
"""Beginnings of the names of metrics that are wall-clock times, or depend on them."""

COMMON: dict[str, Any] = {
    "num_envs": 4,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 2,
    "total_steps": 3 * 128,
}


def actor_critic(**options: Any) -> Callable[..., nn.Module]:
    return partial(ActorCritic, hidden_sizes=(16, 16), **options)


def scripted(mode: AutoresetMode) -> Callable[[int], SyncVectorEnv]:
    return lambda num_envs: SyncVectorEnv([Scripted] * num_envs, autoreset_mode=mode)


def spaces(observation: str, action: str, **options: Any) -> Callable[[], Spaces]:
    return lambda: Spaces(observation, action, **options)


class Frozen(ActorCritic):
    """The first layer of the actor does not learn."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given, hidden_sizes=(16, 16))
        next(self.actor_trunk.parameters()).requires_grad_(False)


CARTPOLE, PENDULUM = {"env": "CartPole-v1"}, {"env": "Pendulum-v1"}
NORMALIZED = {"normalize_observation": True, "normalize_reward": True}
RNN: dict[str, Any] = {"policy": actor_critic(rnn="lstm", rnn_size=8), "sequence_length": 16}

RUNS: dict[str, dict[str, Any]] = {
    "discrete": CARTPOLE,
    "continuous": PENDULUM,
    "tanh": {**PENDULUM, "policy": actor_critic(distribution="tanh")},
    "beta": {**PENDULUM, "policy": actor_critic(distribution="beta")},
    "gsde": {**PENDULUM, "policy": actor_critic(distribution="gsde", sde_sample_freq=8)},
    "state_dependent_std": {**PENDULUM, "policy": actor_critic(state_dependent_std=True, log_std_init=-1.0)},
    "multi_discrete": {"env": Dials},
    "multi_binary": {"env": spaces("flat", "multi_binary")},
    "dict_actions": {"env": spaces("flat", "dict"), "ent_coef": 0.01},
    "tuple_actions": {"env": spaces("flat", "tuple")},
    "masked": {"env": spaces("flat", "discrete", masked=True), "ent_coef": 0.01},
    "masked_multi_discrete": {"env": spaces("flat", "multi_discrete", masked=True)},
    "discrete_observations": {"env": DiscreteWorld},
    "image": {"env": spaces("image", "discrete"), "num_steps": 8, "total_steps": 3 * 32},
    "dict_observations": {"env": spaces("both", "discrete"), "num_steps": 8, "total_steps": 3 * 32, **NORMALIZED},
    "shared_trunk": {**CARTPOLE, "policy": actor_critic(shared=True)},
    "lstm": {**CARTPOLE, **RNN},
    "gru_normalized": {**PENDULUM, **NORMALIZED, "policy": actor_critic(rnn="gru", rnn_size=8)},
    "next_step": {"env": scripted(AutoresetMode.NEXT_STEP), **NORMALIZED},
    "same_step": {"env": scripted(AutoresetMode.SAME_STEP), **NORMALIZED},
    "disabled": {"env": scripted(AutoresetMode.DISABLED), **NORMALIZED},
    "async": {**CARTPOLE, "vectorization": "async"},
    "tensors": {"env": "ppo_lightning.envs.classic_control.CartPole"},
    "normalized": {**PENDULUM, **NORMALIZED, "clip_reward": True},
    "popart": {**PENDULUM, "popart": {"beta": 0.01}},
    "target_kl": {**PENDULUM, "target_kl": 1e-4, "update_epochs": 8},
    "clip_range_vf": {**PENDULUM, "clip_range_vf": 0.1, "clip_range": Linear(0.3, 0.1), "ent_coef": Linear(0.01, 0.0)},
    "accumulation": {**PENDULUM, "gradient_accumulation_steps": 3},
    "all_advantages": {**CARTPOLE, "normalize_advantage": "all_ranks", "max_grad_norm": None},
    "raw_advantages": {**CARTPOLE, "normalize_advantage": False, "vf_coef": 1.0, "gamma": 0.9, "gae_lambda": 1.0},
    "uneven_minibatches": {**CARTPOLE, "num_minibatches": 3},
    "scheduler": {
        **CARTPOLE,
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    },
    "frozen": {**CARTPOLE, "policy": Frozen},
}
"""Keywords of PPO, beside those in ``COMMON``."""

COMPILED = ("discrete", "continuous", "masked", "normalized", "clip_range_vf", "target_kl", "accumulation", "tensors")
"""Runs that are made with ``compile=True`` as well."""
RANKS = ("discrete", "normalized", "all_advantages", "target_kl")
"""Runs that are made on two ranks as well."""
RESUMED = ("discrete", "normalized", "lstm", "popart", "next_step")
"""Runs that are made once more, stopped after two iterations and resumed."""


class Record(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(TIMES)}
        self.rows.append((step, dict(sorted(kept.items()))))


def train(options: dict[str, Any], *, ranks: int = 1, resume: bool = False) -> dict[str, str]:
    """Digests of a run of three iterations."""
    loggers = [Record()]
    lightning.seed_everything(7, verbose=False)
    model, trainer = PPO(**{**COMMON, **options}), trainer_of(loggers[-1], ranks, 2 if resume else -1)
    trainer.fit(model)
    if resume:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "two.ckpt")
            trainer.save_checkpoint(place)
            model, trainer = PPO(**{**COMMON, **options}), trainer_of(loggers[-1], ranks, -1)
            trainer.fit(model, ckpt_path=place)
    (optimizer,) = trainer.optimizers
    return {
        "parameters": digest(model.parameters()),
        "buffers": digest(model.buffers()),
        "optimizer": digest(
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ),
        "metrics": hashlib.sha256(json.dumps(loggers[-1].rows).encode()).hexdigest()[:16],
    }


def trainer_of(logger: Record, ranks: int, max_epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=logger,
        max_epochs=max_epochs,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def digest(tensors: Iterable[Tensor]) -> str:
    """Of all values, whatever the tensors' names and order."""
    each = sorted(hashlib.sha256(one.detach().contiguous().numpy().tobytes()).digest() for one in tensors)
    return hashlib.sha256(b"".join(each)).hexdigest()[:16]


def every_run() -> dict[str, Callable[[], dict[str, str]]]:
    runs: dict[str, Callable[[], dict[str, str]]] = {name: partial(train, RUNS[name]) for name in RUNS}
    runs |= {f"{name}, compiled": partial(train, {**RUNS[name], "compile": True}) for name in COMPILED}
    runs |= {f"{name}, 2 ranks": partial(of_two_ranks, RUNS[name]) for name in RANKS}
    runs |= {f"{name}, resumed": partial(train, RUNS[name], resume=True) for name in RESUMED}
    return runs


def of_two_ranks(options: dict[str, Any]) -> dict[str, str]:
    whole = {**options, "total_steps": 2 * COMMON["total_steps"]}
    first, second = forked(lambda rank: train(whole, ranks=2))
    if isinstance(first, str):
        raise RuntimeError(first)
    return {**first, "parameters of rank 1": second["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file to keep the digests in")
    parser.add_argument("--compare", type=Path, help="file to compare them with; status 1 if any differs")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name contains one of these")
    given = parser.parse_args()
    before = json.loads(given.compare.read_text()) if given.compare else {}
    write = given.write and given.write.absolute()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, run in every_run().items():
            if not any(part in name for part in given.only):
                continue
            found[name] = run()
            known = before.get(name, {})
            changed = [key for key, value in found[name].items() if before and known.get(key) != value]
            differ += bool(changed)
            print(f"{name}: {', '.join(changed) + ' differ' if changed else 'equal' if before else 'made'}", flush=True)
        os.chdir("/")
    print(f"{len(found)} runs, {differ} differ" if before else f"{len(found)} runs")
    if write:
        write.write_text(json.dumps(found, indent=1))
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
