"""What users get wrong, and what other packages do: one sentence each, or the right thing."""

import inspect
import math
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from probes import Recall, Scripted, Spaces
from random_constructor_calls import outcomes
from test_masks import ByMethod, InInfo, InObservation
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, EnvironmentFault, InputError, Linear, NatureCNN, PopArt
from ppo_lightning.callbacks import (
    AdaptiveLearningRate,
    AsyncEvaluation,
    Curriculum,
    EvaluationVideo,
    HardwareMonitor,
    HealthMonitor,
    LastCheckpoint,
    Level,
    RolloutDetails,
    RunReport,
    Stage,
    Stages,
    Thresholds,
)
from ppo_lightning.policy import Policy
from ppo_lightning.policy.distributions import action_distribution
from ppo_lightning.spaces import flatten_spaces

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 64}


class Anything(gym.Env):
    """Random observations of any space; actions must be of the action space."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or Box(-1, 1, (3,), np.float32)
        self.action_space = action_space or Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, {}


class Layers(nn.Module):
    """A network whose layers are called actor and critic, as CleanRL's are: they are no halves of it."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.actor, self.critic = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, observation):
        hidden = self.shared(observation)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def test_layers_called_actor_and_critic_are_not_taken_for_methods(fit):
    model = PPO("CartPole-v1", policy=Layers, **SMALL)
    features = torch.randn(5, 4)
    assert_close(model.policy.actor(features), model.policy.network(features)[0])
    assert_close(model.policy.act(features, None).parameters, model.policy.network(features)[0])
    fit(model)


def test_halves_that_say_something_else_than_the_whole_are_refused():
    class Wrong(ActorCritic):
        def actor(self, observation):
            return super().actor(observation) + 1

    with pytest.raises(InputError, match="actor and critic must return what forward does"):
        PPO("CartPole-v1", policy=Wrong, **SMALL)


@pytest.mark.parametrize(
    "space", [Dict({"a.b": Box(-1, 1, (3,)), "a": Dict({"b": Discrete(3)})}), Dict({"": Discrete(2)})]
)
def test_parts_that_cannot_be_distinguished_are_refused(space):
    with pytest.raises(InputError, match="cannot be told apart"):
        flatten_spaces(space)


@pytest.mark.parametrize(
    "space", [Box(-1, 1, (), np.float32), Dict({"s": Box(-1, 1, (), np.float32), "keys": Discrete(2)})]
)
def test_numbers_without_a_shape_are_observations_too(fit, space):
    model = PPO(partial(Anything, space), normalize_observation=True, **SMALL)
    fit(model)
    assert model.predict(space.sample()) in (0, 1)


WHOLE = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


@pytest.mark.parametrize(
    "space",
    [
        *(Box(np.iinfo(dtype).min, np.iinfo(dtype).max, (3,), dtype) for dtype in WHOLE),
        Box(0, 9, (), np.uint16),
        Box(0, 1, (3,), bool),
        Box(-1, 1, (3,), np.float16),
        Box(-1, 1, (3,), np.dtype(">f4")),
        Dict({"near": Box(0, 9, (2,), np.uint32), "far": Box(0, 2**64 - 1, (2,), np.uint64)}),
    ],
)
def test_numbers_of_every_dtype_are_observations(fit, space, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="environment")
        model = PPO(partial(Anything, space), normalize_observation=True, **SMALL, num_eval_episodes=2)
        trainer = fit(model, limit_val_batches=1.0)
    seen = space.sample()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PPO.load_from_checkpoint(tmp_path / "a.ckpt", env=partial(Anything, space))
    assert loaded.predict(seen) == model.predict(seen)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.uint16, torch.int32), (np.uint32, torch.int64), (np.uint64, torch.float32)]
)
def test_large_unsigned_numbers_keep_their_values(dtype, kept):
    class Counts(Anything):
        def step(self, action):
            _, *rest = super().step(action)
            return np.array([0, 40_000, np.iinfo(dtype).max], dtype), *rest

    batch = PPO(partial(Counts, Box(0, np.iinfo(dtype).max, (3,), dtype)), **SMALL).rollouts.collect()
    row = batch["observation"][1, 0]
    assert row.dtype is kept
    assert row[:2].tolist() == [0, 40_000]
    assert float(row[2]) == pytest.approx(float(np.iinfo(dtype).max))


def test_bounds_of_unsigned_numbers_are_watched():
    class Outside(Anything):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.full(3, 11, np.uint16), {}

    with pytest.warns(UserWarning, match="outside of Box"):
        PPO(partial(Outside, Box(0, 10, (3,), np.uint16)), **SMALL).rollouts.collect()


@pytest.mark.parametrize(
    "space",
    [
        Discrete(np.int64(5), start=np.int64(-2)),
        Discrete(5, dtype=np.uint16),
        MultiDiscrete([3, 4], dtype=np.uint8),
        MultiDiscrete([3, 4], start=[5, 6], dtype=np.uint32),
        MultiDiscrete([3, 4], start=[5, 6], dtype=np.uint64),
        MultiDiscrete(np.array([200, 100], np.uint8), start=np.array([50, 100], np.uint8), dtype=np.uint8),
    ],
)
def test_choices_of_every_dtype_are_observations_and_actions(fit, space):
    model = PPO(partial(Anything, space, space), **SMALL)
    fit(model)
    assert space.contains(model.predict(space.sample()))


@pytest.mark.parametrize(
    "space", [Discrete(3, dtype=np.int32), MultiDiscrete([2, 3], dtype=np.int32), MultiBinary((2, 2))]
)
def test_actions_have_the_dtype_of_their_space(fit, space):
    model = PPO(partial(Anything, None, space), **SMALL)
    fit(model)
    assert model.action_space.contains(model.predict(np.zeros(3, np.float32)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_bounds_whose_distance_overflows_are_none(dtype):
    info = np.finfo(dtype)
    with pytest.raises(InputError, match="needs finite bounds"):
        action_distribution(Box(info.min, info.max, (2,), dtype), "tanh")
    wide = action_distribution(Box(-1e6, 1e6, (1,)), "beta")
    assert_close(wide.to_env_action(torch.tensor([[0.5], [1.0]])), torch.tensor([[0.0], [1e6]]))


# --- masks -------------------------------------------------------------------------------------------------------------


def test_the_method_action_masks_is_asked_in_vectors_of_ones_own():
    for mode in ("SameStep", "NextStep", "Disabled"):
        make = lambda num_envs, mode=mode: SyncVectorEnv([ByMethod] * num_envs, autoreset_mode=AutoresetMode(mode))  # noqa: E731
        batch = PPO(make, **SMALL).rollouts.collect()  # the environment asserts that its mask is kept
        assert (batch["action_mask"][batch["valid"]].sum(-1) == 1).all()


def test_the_method_is_not_asked_when_the_episode_is_over():
    class Strict(ByMethod):
        def action_masks(self):
            if self.steps == 3:
                raise RuntimeError("the game is over")
            return super().action_masks()

    PPO(Strict, **SMALL).rollouts.collect()

    class Failing(ByMethod):
        def action_masks(self):
            raise RuntimeError("no idea")

    with pytest.raises(
        EnvironmentFault, match="environment 0 raised RuntimeError in action_masks after reset: no idea"
    ):
        PPO(Failing, **SMALL).rollouts.collect()


def test_a_mask_that_would_be_taken_for_an_observation_is_refused():
    class Deep(InObservation):
        def __init__(self):
            super().__init__()
            self.observation_space = Dict({"agent": self.observation_space})

    with pytest.raises(InputError, match="action_mask within 'agent'"):
        PPO(Deep, **SMALL)


@pytest.mark.parametrize(
    "parts", [{"a": MultiBinary(3), "b": MultiBinary(2)}, {"x": MultiBinary(2), "b": MultiBinary(3)}]
)
def test_parts_of_a_mask_must_fit_part_by_part(parts):
    class Wrong(Anything):
        def __init__(self):
            super().__init__(
                Dict({"o": Box(-1, 1, (2,)), "action_mask": Dict(parts)}), Dict({"a": Discrete(2), "b": Discrete(3)})
            )

    with pytest.raises(InputError, match="has the parts"):
        PPO(Wrong, **SMALL)


def test_masks_of_tuples_and_lists(fit):
    class AsTuple(Spaces):
        def __init__(self, kind):
            super().__init__("flat", "tuple", masked=True)
            self.kind = kind

        def _see(self):
            observation, info = super()._see()
            flat = info["action_mask"]
            nested = (flat[:5], (flat[5:],))
            given = {"tuple": nested, "list": flat.tolist()}[self.kind]
            return observation, {"action_mask": given}

    for kind in ("tuple", "list"):
        model = PPO(partial(AsTuple, kind), **SMALL)
        fit(model)
        assert model.rollouts.collect()["action_mask"].shape == (16, 2, 7)


def test_a_mask_without_one_of_its_parts_is_one_sentence():
    class Partly(Spaces):
        def _see(self):
            observation, _ = super()._see()
            return observation, {"action_mask": {"tool": np.ones(3, np.int8)}}

    with pytest.raises(InputError, match="does not have the parts"):
        PPO(partial(Partly, "flat", "dict", True), **SMALL).rollouts.collect()


def test_predict_needs_the_mask_that_the_observation_has():
    with pytest.raises(InputError, match="without action_mask"):
        PPO(InObservation, **SMALL).predict({"observation": np.zeros(1, np.float32)})


# --- options that would do nothing, or not what is meant ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "betta"}, "distribution must be one of"),
        ({"entropy_weights": {"x": 2.0}}, "entropy_weights are for the parts"),
        ({"log_std_init": 5.0}, "must lie within log_std_range"),
        ({"hidden_sizes": 64}, "hidden_sizes must be 1 or more"),
        ({"hidden_sizes": (0,)}, "hidden_sizes must be 1 or more"),
        ({"critic_hidden_sizes": (0,)}, "critic_hidden_sizes must be 1 or more"),
        ({"critic_hidden_sizes": (8,), "shared": True}, "leave out critic_hidden_sizes"),
        ({"rnn": "lstm", "rnn_size": 0}, "rnn_size must be 1 or more"),
        ({"encoders": {"": lambda space: 7}}, "is a int: it must be a torch.nn.Module"),
        ({"encoders": {"": lambda space: nn.Linear(9, 9)}}, "the encoder Linear raised RuntimeError"),
        ({"encoders": {"": lambda space: nn.LSTM(4, 4)}}, "the encoder LSTM raised AttributeError"),
    ],
)
def test_options_of_the_network_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        PPO("CartPole-v1", policy=partial(ActorCritic, **options), **SMALL)


def test_what_makes_no_network_is_refused():
    class Named(Layers):
        distribution = "normal"

    for policy, message in (
        ("ActorCritic", "policy must be a callable"),
        (nn.Linear(2, 2), "policy must be a callable"),
        (lambda *spaces: 3, "made a int"),
        (lambda *spaces: nn.Tanh(), "parameters to learn"),
        (Named, "has a distribution that is a str"),
    ):
        with pytest.raises(InputError, match=message):
            Policy(Box(-1, 1, (4,)), Discrete(2), policy, normalize_observation=False)


@pytest.mark.parametrize("value", [0.001, {"gamma": 1.0}, "yes"])
def test_popart_takes_popart(value):
    with pytest.raises(InputError, match="popart takes PopArt"):
        PPO("CartPole-v1", popart=value, **SMALL)


# --- types: what no parameter takes, and what each takes ------------------------------------------------------------------

HYPERPARAMETERS = [name for name in inspect.signature(PPO).parameters if name != "env"]
NUMBERS = ("num_steps", "gamma", "clip_range", "ent_coef", "vf_coef", "max_grad_norm", "env_timeout_s", "total_steps")


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("value", ["false", "0.1", b"1", object, {1: 2}, {"x": object()}, [[]], 1j, nn.Linear(1, 1)])
def test_each_hyperparameter_refuses_values_of_other_types(name, value):
    with pytest.raises(InputError) as caught:
        PPO("CartPole-v1", **{**SMALL, name: value})
    assert name in str(caught.value) or "CartPole-v1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.1", True, [0.5], math.nan, -1, {"start": "1"}, np.array([0.5]), 10**400])
def test_a_number_is_finite_and_no_bool_string_or_list(name, value):
    with pytest.raises(InputError, match=f"^{name}"):
        PPO("CartPole-v1", **{**SMALL, name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize_reward": "false"}, "normalize_reward must be true or false, got 'false'"),
        ({"eval_deterministic": 1}, "eval_deterministic must be true or false, got 1"),
        ({"num_envs": True}, "num_envs must be a whole number of 1 or more, got True"),
        ({"gamma": None}, "gamma must lie between 0 and 1, got None"),
        ({"gamma": "0.9"}, r"gamma must lie between 0 and 1, got '0.9' \(str\)"),
        ({"vf_coef": math.inf}, "vf_coef must be zero or more and finite, got inf"),
        ({"env_timeout_s": math.inf}, r"env_timeout_s must be more than 0 and at most 1,000,000 \(seconds\), got inf"),
        ({"wrappers": gym.wrappers.TimeLimit}, "wrappers must be a list of callables, got <class"),
        ({"info_keys": "lap"}, "info_keys must be a list of strings, got 'lap'"),
        ({"env_kwargs": [1]}, r"env_kwargs must be a dictionary with strings as keys or null, got \[1\]"),
        ({"clip_range": {"start": "x"}}, "clip_range: start of Linear must be finite, got 'x'"),
        ({"popart": True}, "popart takes PopArt.* or null, got True"),
        ({"optimizer": "Adam"}, "optimizer must be a callable, got 'Adam'"),
        ({"lr_scheduler": 3}, "lr_scheduler must be a callable or null, got 3"),
        (
            {"vectorization": "x" * 1000},
            "vectorization must be one of sync, async or vector_entry_point, got 'x{90,99}…",
        ),
        ({"total_steps": 2**63}, "total_steps must be less than 2⁶³"),
        ({"num_steps": 10**14}, "num_steps · num_envs = .* needs .* GB of memory"),
        ({"update_epochs": 10**14}, "update_epochs = .* needs .* GB of memory"),
        ({"num_eval_episodes": 10**14}, "num_eval_episodes = .* needs .* GB of memory"),
    ],
)
def test_messages_name_the_parameter_what_is_allowed_and_what_was_given(options, message):
    with pytest.raises(InputError, match=message):
        PPO("CartPole-v1", **{**SMALL, **options})


def test_rollouts_beyond_the_memory_of_the_machine_are_refused_before_environments_are_made():
    model = PPO("CartPole-v1", num_envs=10**9, num_steps=1000)
    with pytest.raises(InputError, match="GB of memory"):
        model.collect()


def test_a_whole_float_is_a_whole_number(fit):
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 1e3, "num_steps": 16.0})
    assert (model.total_steps, model.num_steps, model.hparams["total_steps"]) == (1000, 16, 1000)
    assert type(model.num_steps) is type(model.hparams["total_steps"]) is int


def test_numpy_and_torch_scalars_become_plain_numbers_that_checkpoints_hold(fit, tmp_path):
    class Pole(CartPoleEnv):
        def __init__(self, length, forces):
            assert type(length) is float
            assert [type(force) for force in forces["list"]] == [float, int]
            super().__init__()

    scalars = {
        "gamma": np.float32(0.5), "num_steps": np.int64(16), "normalize_reward": np.bool_(True),
        "vf_coef": torch.tensor(0.25), "max_grad_norm": np.array(0.75), "clip_range": Linear(np.float64(0.5), np.float16(0.25)),
        "popart": PopArt(np.float32(0.5)), "info_keys": [np.str_("lap")], "vectorization": np.str_("sync"),
        "total_steps": np.float64(64.0), "sequence_length": None, "eval_interval": np.uint8(3),
        "env_kwargs": {"length": np.float32(0.5), "forces": {"list": (np.float64(0.5), np.int32(1))}},
    }  # fmt: skip
    model = PPO(Pole, **{"num_envs": np.int32(2), **scalars})
    fit(model).save_checkpoint(tmp_path / "scalars.ckpt")
    held = torch.load(tmp_path / "scalars.ckpt", weights_only=True)["hyper_parameters"]
    assert (held["gamma"], held["num_steps"], held["normalize_reward"]) == (0.5, 16, True)
    assert held["clip_range"] == {"start": 0.5, "end": 0.25}
    assert held["env_kwargs"] == {"length": 0.5, "forces": {"list": (0.5, 1)}}
    again = PPO.load_from_checkpoint(tmp_path / "scalars.ckpt", env=Pole)
    assert (again.gamma, again.updater.max_grad_norm, again.vf_coef) == (0.5, 0.75, 0.25)


# --- what factories return -----------------------------------------------------------------------------------------------

OTHER = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: None, "optimizer returned None: it must return a torch.optim.Optimizer"),
        (lambda params: torch.optim.SGD, "optimizer returned <class"),
        (lambda: None, r"optimizer\(parameters\) raised TypeError: "),
        (lambda params: torch.optim.SGD(OTHER.parameters(), 0.1), "SGD over parameters that are not the model's"),
        (torch.optim.LBFGS, "optimizer LBFGS needs sparse gradients or several losses per step"),
        (torch.optim.SparseAdam, "optimizer SparseAdam needs sparse gradients"),
        (partial(torch.optim.Adam, lr=math.inf), "Adam has the learning rate inf"),
        (partial(torch.optim.Adam, lr="fast"), r"optimizer\(parameters\) raised TypeError"),
        (
            partial(torch.optim.Adam, rate=1),
            r"optimizer\(parameters\) raised TypeError: .*unexpected keyword argument 'rate'",
        ),
    ],
)
def test_what_optimizer_returns_is_checked_at_construction(optimizer, message):
    with pytest.raises(InputError, match=message):
        PPO("CartPole-v1", optimizer=optimizer, **SMALL)


@pytest.mark.parametrize(
    ("lr_scheduler", "message"),
    [
        (lambda optimizer: None, "lr_scheduler returned None: it must return a torch.optim.lr_scheduler.LRScheduler"),
        (lambda optimizer: optimizer, "lr_scheduler returned Adam"),
        (lambda optimizer: schedulers.StepLR, "lr_scheduler returned <class"),
        (schedulers.StepLR, r"lr_scheduler\(optimizer\) raised TypeError: "),
        (partial(schedulers.StepLR, step_size=0), r"lr_scheduler\(optimizer\) raised ZeroDivisionError"),
        (partial(schedulers.ExponentialLR, gamma=math.nan), "ExponentialLR gives the learning rate nan"),
        (schedulers.ReduceLROnPlateau, "ReduceLROnPlateau waits for a metric"),
        (lambda _: schedulers.StepLR(torch.optim.SGD(OTHER.parameters()), 1), "a scheduler of another optimizer"),
    ],
)
def test_what_lr_scheduler_returns_is_checked_at_construction(lr_scheduler, message):
    with pytest.raises(InputError, match=message):
        PPO("CartPole-v1", lr_scheduler=lr_scheduler, **SMALL)


def test_a_scheduler_that_ends_before_the_run_is_refused_before_training(fit):
    short = partial(schedulers.OneCycleLR, max_lr=1e-3, total_steps=1)
    with pytest.raises(InputError, match="lr_scheduler OneCycleLR ends after 1 steps, and the run has 2 iterations"):
        fit(PPO("CartPole-v1", lr_scheduler=short, **SMALL))
    fit(PPO("CartPole-v1", lr_scheduler=partial(short, total_steps=2), **SMALL))


@pytest.mark.parametrize("env", ["CartPole-v1", CartPoleEnv])
@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (lambda env: None, "among wrappers returned None: it must return a gymnasium.Env"),
        (lambda env: "env", "among wrappers returned 'env'"),
        (lambda: None, "raised TypeError: .*check env, env_kwargs and wrappers"),
        (gym.wrappers.TimeLimit, "raised TypeError: .*check env, env_kwargs and wrappers"),
    ],
)
def test_what_wrappers_return_is_checked_at_construction(env, wrapper, message):
    with pytest.raises(InputError, match=message):
        PPO(env, wrappers=[wrapper], **SMALL)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: None, "made a NoneType: it must return a gymnasium.vector.VectorEnv or a gymnasium.Env"),
        (gym.Env, "Env has no observation_space: set it, to a gymnasium.Space"),
        (VectorEnv, "VectorEnv has no single_observation_space: set it"),
        ("CartPole-v1\n", "there is no environment 'CartPole-v1"),
        (["CartPole-v1"], "env must be a Gymnasium id"),
        (np.zeros((2, 2)), "env must be a Gymnasium id"),
    ],
)
def test_what_makes_no_environment_is_refused(env, message):
    with pytest.raises(InputError, match=message) as caught:
        PPO(env, **SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda observation_space: None, r"policy\(observation_space, action_space\) raised TypeError: "),
        (partial(ActorCritic, hidden=(8,)), r"ActorCritic has no parameter hidden: did you mean hidden_sizes\?"),
        (partial(ActorCritic, memory_size=8), "ActorCritic has no parameter memory_size: it is called rnn_size"),
        (
            partial(ActorCritic, hidden_sizes=(10**12,)),
            r"policy\(observation_space, action_space\) raised RuntimeError: .*",
        ),
        (partial(ActorCritic, layer_norm="false"), r"layer_norm must be true or false, got 'false' \(str\)"),
        (partial(ActorCritic, activation=nn.Tanh()), "activation must be a subclass of Module, got Tanh"),
        (partial(ActorCritic, activation=nn.Linear), r"policy\(observation_space, action_space\) raised TypeError"),
        (partial(ActorCritic, hidden_sizes=(1.5,)), "hidden_sizes must be 1 or more"),
        (partial(ActorCritic, log_std_init=None), "log_std_init must be finite, got None"),
        (partial(ActorCritic, log_std_range=(1,)), "log_std_range must be finite"),
        (
            partial(ActorCritic, encoders={"": 3}),
            "encoders must be a dictionary with strings as keys and callables as values",
        ),
        (partial(ActorCritic, actor_keys="state"), "actor_keys must be a list of strings or null, got 'state'"),
        (partial(ActorCritic, rnn="lstm", rnn_size=True), "rnn_size must be 1 or more, got True"),
        (partial(ActorCritic, entropy_weights={"a": "1"}), "entropy_weights must be a dictionary"),
    ],
)
def test_what_policy_takes_and_returns_is_checked_at_construction(policy, message):
    with pytest.raises(InputError, match=message) as caught:
        PPO("CartPole-v1", policy=policy, **SMALL)
    assert "\n" not in str(caught.value)


def test_a_network_whose_outputs_depend_on_no_parameter_is_refused_before_training(fit):
    class Constant(nn.Module):
        def __init__(self, observation_space, action_space):
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, observation):
            return torch.zeros(len(observation), 2), torch.zeros(len(observation))

    with pytest.raises(InputError, match="the outputs of the network Constant depend on none of its parameters"):
        fit(PPO("CartPole-v1", policy=Constant, **SMALL))


# --- the other constructors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear("0.1"), r"start of Linear must be finite, got '0.1' \(str\)"),
        (lambda: Linear(math.inf), "start of Linear must be finite, got inf"),
        (lambda: PopArt(None), "popart.beta must lie between 0 and 1, got None"),
        (lambda: LastCheckpoint(minutes="5"), "LastCheckpoint: minutes must be more than 0"),
        (
            lambda: LastCheckpoint(every_n_epochs=0),
            "LastCheckpoint: every_n_epochs must be a whole number of 1 or more",
        ),
        (lambda: HealthMonitor(act="false"), "HealthMonitor: act must be true or false"),
        (lambda: HealthMonitor(thresholds={}), "HealthMonitor: thresholds must be a Thresholds or null, got {}"),
        (lambda: Thresholds(approx_kl=0.1), "HealthMonitor: thresholds.approx_kl must be 2 numbers, got 0.1"),
        (lambda: AsyncEvaluation(every=True), "AsyncEvaluation: every must be more than 0"),
        (lambda: AsyncEvaluation(deterministic="no"), "AsyncEvaluation: deterministic must be true, false or null"),
        (lambda: AsyncEvaluation(timeout_s=math.inf), "AsyncEvaluation: timeout_s must be more than 0 and at most"),
        (lambda: Curriculum(Level()), "Curriculum: levels must be a list of Level objects"),
        (lambda: Curriculum([Level]), "Curriculum: levels must be a list of Level objects"),
        (lambda: Level(attributes=3), "attributes of a Curriculum's Level must be a dictionary"),
        (
            lambda: Level(from_steps=-1),
            "from_steps of a Curriculum's Level must be a whole number of 0 or more, got -1",
        ),
        (lambda: Level(metric="x", at_least="1"), "at_least of a Curriculum's Level must be finite"),
        (lambda: Stages([Stage]), "Stages: stages must be a list of Stage objects"),
        (lambda: Stage(from_share="x"), "from_share of a Stage must lie between 0 and 1"),
        (lambda: Stage(freeze=[3]), r"freeze of a Stage must be a list of strings, got \[3\]"),
        (lambda: Stage(learning_rate="1e-3"), "learning_rate of a Stage takes a number, start and end or null"),
        (lambda: AdaptiveLearningRate(desired_kl="x"), "AdaptiveLearningRate: desired_kl must be finite"),
        (lambda: EvaluationVideo(folder=3), "EvaluationVideo: folder must be a string, a Path or null, got 3"),
        (lambda: EvaluationVideo(fps="30"), "EvaluationVideo: fps must be 1 or more, got '30'"),
        (lambda: HardwareMonitor(interval_s=None), "HardwareMonitor: interval_s must be 0 or more seconds, got None"),
        (lambda: RunReport(enabled=1), "RunReport: enabled must be true or false, got 1"),
        (lambda: RolloutDetails("x"), "RolloutDetails: observation_names must be a list of strings or null"),
        (
            lambda: NatureCNN(Box(0, 255, (36, 36), np.uint8), features="x"),
            "features of NatureCNN must be a whole number",
        ),
    ],
)
def test_values_and_callbacks_check_their_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_random_constructor_calls_end_in_success_or_one_sentence():
    found = outcomes(seed=1, count=25, trains=0.3)
    assert not found["failed"], "\n\n".join(found["failed"])


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(fit, tmp_path):
    def save(**options):
        fit_options = {**SMALL, **options}
        fit(PPO("Pendulum-v1", **fit_options)).save_checkpoint(tmp_path / "saved.ckpt")
        return tmp_path / "saved.ckpt"

    return save


def test_a_checkpoint_of_another_distribution_or_network_is_refused(saved, fit):
    path = saved(policy=partial(ActorCritic, distribution="tanh"))
    with pytest.raises(InputError, match="distribution SquashedGaussian against DiagonalGaussian"):
        PPO.load_from_checkpoint(path, policy=ActorCritic)
    other = partial(ActorCritic, distribution="tanh", layer_norm=True)
    with pytest.raises(InputError, match=r"another policy .*not in the file"):
        fit(PPO("Pendulum-v1", policy=other, **SMALL), ckpt_path=path)
    wide = partial(ActorCritic, distribution="tanh", hidden_sizes=(8, 64))
    with pytest.raises(InputError, match=r"another policy .*\(64,\) against \(8,\)"):
        PPO.load_from_checkpoint(path, policy=wide)


def test_a_checkpoint_with_popart_is_not_one_without(saved):
    path = saved(popart=PopArt())
    assert PPO.load_from_checkpoint(path).policy.value_normalizer is not None
    with pytest.raises(InputError, match="only in the file"):
        PPO.load_from_checkpoint(path, popart=None)


def test_what_is_given_again_may_be_the_default(saved):
    path = saved(policy=partial(ActorCritic))
    assert isinstance(PPO.load_from_checkpoint(path, policy=ActorCritic).policy.network, ActorCritic)


# --- other packages ----------------------------------------------------------------------------------------------------


def test_atari_vectors_given_as_instances_keep_their_own_autoreset_mode():
    from ale_py.vector_env import AtariVectorEnv

    options = {"autoreset_mode": "SameStep", "life_loss_info": True, "reward_clipping": False}
    first = AtariVectorEnv("breakout", 2, **options)
    AtariVectorEnv("pong", 1, autoreset_mode="NextStep")  # writes into the dictionary that both share
    for env in (first, RecordEpisodeStatistics(AtariVectorEnv("breakout", 2, **options))):
        model = PPO(env, num_steps=300, num_envs=2)
        model.seed = 0
        batch = model.rollouts.collect()
        assert model.rollouts.environments.mode is AutoresetMode.SAME_STEP
        assert batch["terminated"].sum() > 2 * len(model.rollouts.episodes.finished)


def test_games_that_restart_with_each_life_are_refused():
    options = {"game": "breakout", "episodic_life": True, "reward_clipping": False}
    model = PPO("ale_py.vector_env.AtariVectorEnv", options, num_envs=2, num_steps=400)
    model.seed = 0
    with pytest.raises(EnvironmentFault, match="give life_loss_info: true"):
        model.rollouts.collect()
    model.close_environments()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_env": 2}, "PPO has no parameter num_env: did you mean num_envs?"),
        ({"zzz": 2}, "PPO has no parameter zzz"),
    ],
)
def test_a_parameter_that_does_not_exist_is_named_with_the_nearest(options, message):
    with pytest.raises(InputError) as caught:
        PPO("CartPole-v1", **options)
    assert str(caught.value) == message
    with pytest.raises(InputError, match="PPO: missing a required argument: 'env'"):
        PPO()


def test_predict_says_that_an_episode_starts():
    class Initial(nn.Module):
        """Its state begins at 5, not at 0."""

        state_size = 1

        def __init__(self, observation_space, action_space):
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, observation, state, start):
            states = []
            for fresh in start:
                state = torch.where(fresh[:, None], torch.full_like(state, 5.0), state + 1)
                states.append(state)
            values = torch.stack(states)[..., 0]
            return torch.stack([values - 5.5, 5.5 - values], -1), values, state

    model = PPO(Recall, policy=Initial, num_minibatches=1, **SMALL)
    action, state = model.predict(np.zeros(2, np.float32))
    assert (action, state) == (1, 5.0)
    action, state = model.predict(np.zeros(2, np.float32), state=state)
    assert (action, state) == (0, 6.0)


def test_final_observations_survive_an_environment_that_writes_over_them():
    class Reusing(Scripted):
        buffer = None

        def see(self, value):
            if self.buffer is None:
                self.buffer = np.zeros(1, np.float32)
            self.buffer[:] = value
            return self.buffer

    same, own = (PPO(env, **SMALL) for env in (Reusing, Scripted))
    batches = []
    for model in (same, own):
        model.seed = 0
        model.policy.load_state_dict(same.policy.state_dict())
        batches.append(model.rollouts.collect())
    assert_close(batches[0]["next_state_value"], batches[1]["next_state_value"])


def test_info_masks_and_tuples_of_observations_together(fit):
    class Both(InInfo):
        def __init__(self):
            super().__init__()
            self.observation_space = Tuple((self.observation_space, Discrete(4)))

        def see(self):
            return super().see(), self.steps

    model = PPO(Both, normalize_observation=True, **SMALL)
    fit(model)
    assert model.evaluate(2)["eval/mean_reward"] == 3


def test_a_mask_may_be_left_out_where_all_episodes_are_over():
    class Silent(InInfo):
        def info(self):
            return super().info() if self.steps < 3 else {}

    for mode in ("NextStep", "SameStep", "Disabled"):
        make = lambda num_envs, mode=mode: SyncVectorEnv([Silent] * num_envs, autoreset_mode=AutoresetMode(mode))  # noqa: E731
        batch = PPO(make, **{**SMALL, "num_envs": 1}).rollouts.collect()
        assert (batch["action_mask"][batch["valid"]].sum(-1) == 1).all()


def test_encoders_may_be_for_what_the_critic_alone_sees(fit):
    """A part that the actor does not see, and images that it does not see."""
    from ppo_lightning import MLP, ImpalaCNN

    small = partial(ImpalaCNN, depths=(4,), features=8)
    for options in ({"encoders": {"camera": small, "state": MLP}}, {"image_encoder": small}):
        network = partial(ActorCritic, actor_keys=["state"], **options)
        model = PPO(partial(Spaces, "both"), policy=network, **SMALL)
        fit(model)
        assert ImpalaCNN in map(type, model.policy.network.critic_trunk.encoders)
