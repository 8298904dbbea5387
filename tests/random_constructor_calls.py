"""Random constructor calls: each ends in success or in one sentence, and what was made trains, is saved, loaded and acts.

python tests/random_constructor_calls.py --seed 0 --count 500
"""

import argparse
import collections
import inspect
import math
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Text, Tuple
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

from ppo_lightning import MLP, PPO, ActorCritic, EnvironmentFault, ImpalaCNN, InputError, Linear, NatureCNN, PopArt
from ppo_lightning import callbacks as all_callbacks
from ppo_lightning.spaces import MASK, without_mask

LIMIT_S = 120
"""Seconds after which a call counts as hung."""

REFUSALS = (InputError, EnvironmentFault, FloatingPointError)
"""What the command line prints as one sentence."""

SMALL = {
    "num_envs": 2,
    "num_steps": 8,
    "total_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 2,
    "num_eval_episodes": 2,
}


class Anything(gym.Env):
    """Random observations of any space; actions must be of the action space.

    Args:
        observation_space: of observations.
        action_space: of actions.
        masked: give a mask over discrete actions.
    """

    def __init__(self, observation_space: Any = None, action_space: Any = None, masked: bool = False) -> None:
        self.observation_space = Box(-1, 1, (3,)) if observation_space is None else observation_space
        self.action_space = Discrete(2) if action_space is None else action_space
        self.masked = masked

    def _info(self) -> dict[str, Any]:
        return {MASK: np.ones(int(self.action_space.n), bool)} if self.masked else {"lap": self.steps}  # pyright: ignore

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), self._info()

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, self._info()


class Network(nn.Module):
    """A network for any flat observation, perhaps with outputs of a wrong size.

    Args:
        observation_space: of observations.
        action_space: of actions.
        extra: outputs beyond those that two actions need.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, extra: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3 + extra)

    def forward(self, observation):
        output = self.layer(observation)
        return output[:, 1:], output[:, 0]


OBSERVATIONS = [
    lambda: Box(-1, 1, (3,)), lambda: Box(-1, 1, ()), lambda: Box(-math.inf, math.inf, (2, 2), np.float64),
    lambda: Box(0, 255, (3, 12, 12), np.uint8), lambda: Box(0, 255, (40, 40, 3), np.uint8), lambda: Box(0, 1, (3, 9, 9)),
    lambda: Box(0, 2**16 - 1, (3,), np.uint16), lambda: Box(0, 9, (2,), np.uint32), lambda: Box(-5, 5, (3,), np.int8),
    lambda: Box(0, 1, (3,), np.float16), lambda: Box(0, 2**40, (2,), np.int64), lambda: Box(-1, 1, (0,)),
    lambda: Discrete(5), lambda: Discrete(5, start=-2), lambda: Discrete(1), lambda: MultiDiscrete([2, 3]),
    lambda: MultiDiscrete([[2, 3], [4, 5]]), lambda: MultiBinary(3), lambda: MultiBinary((2, 2)),
    lambda: Dict({"camera": Box(0, 255, (12, 12), np.uint8), "state": Box(-1, 1, (3,)), "mode": Discrete(3)}),
    lambda: Dict({"a": Tuple((Discrete(2), Box(-1, 1, (2,)))), "b": Dict({"c": MultiBinary(2)})}),
    lambda: Dict({"state": Box(-1, 1, (3,)), MASK: MultiBinary(2)}), lambda: Tuple((Box(-1, 1, (3,)), Discrete(4))),
    lambda: Dict({}), lambda: Tuple(()), lambda: Text(5), lambda: Sequence(Discrete(2)),
    lambda: Dict({"a": Text(3)}), lambda: None, lambda: "Box", lambda: (3,),
]  # fmt: skip
ACTIONS = [
    lambda: Discrete(2), lambda: Discrete(3, start=1), lambda: Discrete(1), lambda: Box(-1, 1, (2,)),
    lambda: Box(-1, 1, ()), lambda: Box(-2, 3, (2, 2), np.float64), lambda: Box(-math.inf, math.inf, (1,)),
    lambda: Box(0, 5, (2,), np.int32), lambda: Box(-1, 1, (0,)), lambda: MultiDiscrete([3, 2]), lambda: MultiBinary(3),
    lambda: Dict({"move": Box(-1, 1, (2,)), "tool": Discrete(3)}), lambda: Dict({"a": Discrete(2), "b": MultiBinary(2)}),
    lambda: Tuple((Discrete(2), Tuple((Box(0, 1, (1,)), Discrete(2))))), lambda: Dict({}), lambda: Text(4), lambda: 2,
]  # fmt: skip

WRONG: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: 2, lambda: -1, lambda: 3.0, lambda: 10**30,
    lambda: 10**400, lambda: 2**62, lambda: 0.5, lambda: -0.5, lambda: 1e-8, lambda: 1e300, lambda: math.inf,
    lambda: -math.inf, lambda: math.nan, lambda: "", lambda: "false", lambda: "0.1", lambda: "8", lambda: "x" * 1000,
    lambda: b"1", lambda: [], lambda: [1], lambda: ["a"], lambda: [None], lambda: (), lambda: (1, 2), lambda: (0.1, "b"),
    lambda: {}, lambda: {"start": 0.1}, lambda: {"start": 0.1, "end": None}, lambda: {"beta": "x"}, lambda: {"a": 1},
    lambda: {1: 2}, lambda: {"a": {"b": [np.float32(1)]}}, set, object, lambda: object, lambda: int, lambda: print,
    lambda: len, lambda: lambda: None, lambda: lambda *args, **kwargs: None, lambda: lambda *args, **kwargs: args,
    lambda: Exception, lambda: Exception("x"), lambda: np.float32(0.5), lambda: np.int64(2), lambda: np.bool_(False),
    lambda: np.str_("sync"), lambda: np.float64("nan"), lambda: np.array(0.5), lambda: np.array([0.5]),
    lambda: np.zeros((2, 2)),
    lambda: np.datetime64("2020"), lambda: torch.tensor(0.5), lambda: torch.tensor([1, 2]), lambda: torch.float32,
    lambda: torch.tensor(0.5, requires_grad=True), lambda: nn.Linear(1, 1), lambda: nn.Linear, lambda: Linear(0.1),
    lambda: Linear, lambda: PopArt(), lambda: PopArt, lambda: 1j, lambda: range(3), lambda: Decimal("0.5"),
    lambda: Fraction(1, 2), lambda: Path("x"), lambda: gym.make("CartPole-v1"), lambda: gym.Env, lambda: Box(-1, 1, (3,)),
    lambda: PPO, lambda: Adam, lambda: Adam([nn.Parameter(torch.zeros(1))]), lambda: gym.spec("CartPole-v1"),
    lambda: ActorCritic, lambda: iter([]), lambda: partial(int), lambda: type, lambda: ..., lambda: sys, lambda: slice(1),
]  # fmt: skip
"""Values that suit few parameters, or none; each made when it is used."""

GOOD: dict[str, list[Callable[[], Any]]] = {
    "env_kwargs": [dict, lambda: None, lambda: {"max_episode_steps": np.int64(5)}, lambda: {"unknown": 1}],
    "wrappers": [
        tuple, list, lambda: [partial(gym.wrappers.TimeLimit, max_episode_steps=4)], lambda: [gym.wrappers.TimeLimit],
        lambda: [lambda env: None], lambda: [lambda env: 3], lambda: [lambda env: env], lambda: [gym.Env], lambda: [print],
        lambda: [gym.wrappers.FlattenObservation], lambda: [gym.wrappers.NormalizeReward], lambda: [gym.wrappers.ClipAction],
    ],
    "num_envs": [lambda: 1, lambda: 2, lambda: 3, lambda: np.int8(2)],
    "vectorization": [lambda: "sync", lambda: "async", lambda: "vector_entry_point"],
    "num_workers": [lambda: 1, lambda: 2],
    "num_steps": [lambda: 1, lambda: 4, lambda: 7, lambda: 16.0, lambda: np.int64(16)],
    "total_steps": [lambda: 1, lambda: 64, lambda: 6.4e1, lambda: np.float32(40)],
    "normalize_observation": [lambda: True, lambda: np.bool_(True)],
    "normalize_reward": [lambda: True],
    "clip_reward": [lambda: True, lambda: np.bool_(True)],
    "popart": [PopArt, lambda: {"beta": 0.5}, lambda: {}, lambda: PopArt(np.float32(0.1))],
    "gamma": [lambda: 0, lambda: 1, lambda: 0.9, lambda: np.float32(0.99), lambda: torch.tensor(0.5)],
    "gae_lambda": [lambda: 0.0, lambda: 1.0, lambda: np.float64(0.95)],
    "update_epochs": [lambda: 1, lambda: 3],
    "num_minibatches": [lambda: 1, lambda: 3, lambda: 10**6, lambda: 16],
    "gradient_accumulation_steps": [lambda: 2, lambda: 3, lambda: 2**62],
    "sequence_length": [lambda: None, lambda: 2, lambda: 4, lambda: 8, lambda: 3],
    "clip_range": [lambda: Linear(0.2, 0.1), lambda: {"start": 0.3, "end": 0.1}, lambda: np.float32(0.2), lambda: 0],
    "clip_range_vf": [lambda: 0.2, lambda: None, lambda: math.inf, lambda: np.float32(0.1)],
    "normalize_advantage": [lambda: False, lambda: "all_ranks", lambda: np.bool_(True)],
    "ent_coef": [lambda: 0.01, lambda: Linear(np.float32(0.1)), lambda: {"start": 0.1}],
    "vf_coef": [lambda: 0, lambda: 1.0],
    "max_grad_norm": [lambda: None, lambda: 0.5, lambda: math.inf],
    "non_finite": [lambda: "skip", lambda: "raise", lambda: np.str_("skip")],
    "target_kl": [lambda: 0.01, lambda: None, lambda: 1e-9],
    "optimizer": [
        lambda: Adam, lambda: partial(SGD, lr=0.01), lambda: partial(AdamW, lr=torch.tensor(1e-3)), lambda: RMSprop,
        lambda: partial(Adam, lr=-1), lambda: partial(Adam, lr=math.nan), lambda: partial(Adam, rate=1),
        lambda: torch.optim.LBFGS, lambda: torch.optim.SparseAdam,
        lambda: lambda params: SGD, lambda: lambda: None, lambda: torch.optim.Adagrad,
        lambda: lambda params: SGD(nn.Linear(1, 1).parameters(), 0.1), lambda: lambda params: SGD([*params][:2], 0.1),
        lambda: lambda params: SGD([{"params": [one]} for one in params], 0.1), lambda: torch.optim.Muon,
    ],
    "lr_scheduler": [
        lambda: None, lambda: partial(StepLR, step_size=1), lambda: StepLR, lambda: ReduceLROnPlateau, lambda: ConstantLR,
        lambda: partial(CosineAnnealingLR, T_max=2), lambda: partial(OneCycleLR, max_lr=0.1, total_steps=1),
        lambda: partial(OneCycleLR, max_lr=0.1, total_steps=99), lambda: lambda optimizer: optimizer,
        lambda: lambda optimizer: StepLR(SGD(nn.Linear(1, 1).parameters(), 0.1), 1), lambda: lambda optimizer: StepLR,
    ],
    "eval_interval": [lambda: None, lambda: 1, lambda: 2**40],
    "num_eval_episodes": [lambda: 1, lambda: 3],
    "eval_deterministic": [lambda: False, lambda: np.bool_(False)],
    "max_env_restarts": [lambda: 0, lambda: 2, lambda: np.int64(1)],
    "info_keys": [lambda: ["lap"], tuple, lambda: ["none"], lambda: [np.str_("lap")]],
    "metric_names": [lambda: "sb3", lambda: "cleanrl", lambda: "apexrl"],
    "env_timeout_s": [lambda: 30, lambda: np.float32(30)],
    "compile": [lambda: False, lambda: True, lambda: "auto"],
}  # fmt: skip

NETWORK: dict[str, list[Callable[[], Any]]] = {
    "critic_hidden_sizes": [lambda: None, lambda: [8], lambda: (), lambda: (0,), lambda: 8],
    "hidden_sizes": [lambda: [8], lambda: (), lambda: (8, np.int64(8)), lambda: (0,), lambda: 8, lambda: [10**12]],
    "activation": [lambda: nn.ReLU, lambda: nn.ReLU(), lambda: nn.Linear, lambda: nn.Module, lambda: nn.Identity],
    "layer_norm": [lambda: True, lambda: "false"],
    "image_encoder": [
        lambda: NatureCNN, lambda: partial(ImpalaCNN, depths=(4,), features=8), lambda: MLP, lambda: nn.Linear,
        lambda: partial(NatureCNN, features="x"), lambda: partial(ImpalaCNN, depths=4), lambda: partial(MLP, hidden_sizes=None),
    ],
    "encoders": [lambda: {"": MLP}, lambda: {"state": partial(MLP, hidden_sizes=(4,))}, lambda: {"camera": ImpalaCNN}],
    "rnn": [lambda: "lstm", lambda: "gru", lambda: "rnn"],
    "rnn_size": [lambda: 4, lambda: np.int64(4)],
    "shared": [lambda: True],
    "actor_keys": [lambda: ["state"], lambda: "state", lambda: ["a"], list],
    "critic_keys": [lambda: ["state"], lambda: ["b", "a"]],
    "distribution": [lambda: "normal", lambda: "tanh", lambda: "beta", lambda: "gsde", lambda: "cauchy"],
    "log_std_init": [lambda: -1, lambda: np.float32(0.5), lambda: 5.0],
    "log_std_range": [lambda: (-1, 1), lambda: [-5.0, np.float64(1)], lambda: (1, -1), lambda: (0, 0)],
    "state_dependent_std": [lambda: True],
    "sde_sample_freq": [lambda: 1, lambda: 8],
    "entropy_weights": [lambda: {"tool": 0.5}, lambda: {"z": 1.0}, lambda: {"a": np.float32(2)}],
}  # fmt: skip

VALUES = [
    getattr(all_callbacks, name)
    for name in (
        "AdaptiveLearningRate", "AsyncEvaluation", "BestCheckpoint", "Curriculum", "Dashboard", "EvaluationVideo",
        "HardwareMonitor", "HealthMonitor", "LastCheckpoint", "Level", "RolloutDetails", "RunReport", "Stage", "Stages",
        "StepProgressBar", "Thresholds",
    )
] + [Linear, PopArt]  # fmt: skip
"""What takes no environment."""


def drawn(draw: random.Random, good: list[Callable[[], Any]], wrong: float) -> Any:
    """A value of a parameter, of a share ``wrong`` any value."""
    return draw.choice(WRONG if draw.random() < wrong or not good else good)()


def options_of(draw: random.Random, good: dict[str, list[Callable[[], Any]]]) -> dict[str, Any]:
    """Values of a few parameters; most calls have one wrong one at most."""
    wrong = draw.choice([0.0, 0.0, 0.0, 0.4])
    names = draw.sample(sorted(good), draw.randint(0, 3))
    return {name: drawn(draw, good[name], wrong) for name in names}


def environment(draw: random.Random) -> Any:
    """An id, a callable, a vector, or something else."""
    kind = draw.random()
    if kind < 0.3:
        return draw.choice(["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
    if kind < 0.9:
        is_plain = draw.random() < 0.5
        spaces = (
            draw.choice(OBSERVATIONS[: 11 if is_plain else None])(),
            draw.choice(ACTIONS[: 6 if is_plain else None])(),
        )
        return partial(Anything, *spaces, masked=isinstance(spaces[1], Discrete) and draw.random() < 0.2)
    named = ["", " ", "CartPole", "CartPole-v1\n", "nothing:At-v0", "os.getcwd", "gymnasium.Env", "..", ":", "\0"]
    vector = lambda: gym.make_vec("CartPole-v1", 2)  # noqa: E731
    return draw.choice([*WRONG, vector, lambda: vector, *(partial(str, name) for name in named)])()


def call(draw: random.Random) -> tuple[str, Callable[[], Any]]:
    """A random call: its text, and what makes it."""
    if draw.random() < 0.2:
        kind = draw.choice(VALUES)
        parameters = inspect.signature(kind).parameters.values()
        asked = [one for one in parameters if one.default is one.empty or draw.random() < 0.5]
        asked = [one for one in asked if one.kind is one.POSITIONAL_OR_KEYWORD]
        given = {one.name: draw.choice(WRONG)() for one in asked}
        return f"{kind.__name__}({given})", partial(kind, **given)
    given = {**SMALL, **options_of(draw, GOOD)}
    policy = draw.random()
    if policy < 0.4:
        given["policy"] = partial(ActorCritic, **options_of(draw, NETWORK))
    elif policy < 0.5:
        given["policy"] = draw.choice([Network, partial(Network, extra=1), *(draw.choice(WRONG)() for _ in range(4))])
    env = environment(draw)
    return f"PPO({env!r}, {given})", partial(PPO, env, **given)


def is_quick(model: PPO) -> bool:
    """Whether two iterations and an evaluation take no longer than a moment."""
    sizes = model.num_steps * model.num_envs * model.updater.update_epochs <= 500 and model.num_eval_episodes <= 5
    return sizes and not model.updater.compilation.enabled and model.env_factory.vectorization != "async"


def used(model: PPO, again: dict[str, Any], folder: Path) -> None:
    """Train, save, load and act."""
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=2,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model)
    path = folder / "model.ckpt"
    trainer.save_checkpoint(path)
    loaded = PPO.load_from_checkpoint(path, **again)
    space = loaded.observation_space
    observation, state = space.sample(), None
    if space is not without_mask(space):
        observation[MASK] = np.ones_like(observation[MASK])
    for _ in range(2):
        action = loaded.predict(observation, state=state)
        if loaded.policy.state_size:
            action, state = action
        assert loaded.action_space.contains(action), action
    if not isinstance(model.env_factory.env, gym.vector.VectorEnv):
        loaded.evaluate(2)
    loaded.close_environments()


def outcome(draw: random.Random, trains: float = 1.0) -> tuple[str, str]:
    """Make a random call, and of a share ``trains`` of what it made use it: a word for how it ended, and the text of it."""
    text, make = call(draw)
    trained = draw.random() < trains
    try:
        with tempfile.TemporaryDirectory() as folder, alarm():
            made = make()
            if isinstance(made, PPO):
                if trained and is_quick(made):
                    again = {
                        name: value for name, value in make.keywords.items() if name in made.hyperparameters.unsaved
                    }
                    used(made, {"env": make.args[0], **again}, Path(folder))
                    return "trained", text
                made.close_environments()
            return "made", text
    except REFUSALS as error:
        said = str(error)
        if isinstance(error, InputError) and ("\n" in said or not said):
            return "failed", f"{text}\nits message is not one line: {said!r}"
        return "refused", f"{text}\n{said}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "failed", f"{text}\n{traceback.format_exc()}"


@contextmanager
def alarm() -> Iterator[None]:
    """Raise where what is within takes too long; a timer that ran before runs on."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no end after {LIMIT_S} s")

    handler, (before, _) = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, handler)


def outcomes(seed: int, count: int, trains: float = 1.0) -> dict[str, list[str]]:
    """How ``count`` calls ended: texts by word."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for index in range(count):
        torch.manual_seed(index)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            word, text = outcome(random.Random(f"{seed} {index}"), trains)
        found[word].append(f"call {index}: {text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--shows", default="failed", help="print calls that end so: failed, refused, made or trained")
    chosen = parser.parse_args()
    disable_possible_user_warnings()
    found = outcomes(chosen.seed, chosen.count)
    for text in found[chosen.shows]:
        print(text, end="\n\n")
    print({word: len(texts) for word, texts in sorted(found.items())})
    sys.exit(bool(found["failed"]))


if __name__ == "__main__":
    main()
