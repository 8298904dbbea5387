"""What is wrong with a run is named, and what is well is left in peace."""

import csv
import json
import math
import re
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from probes import ActionMatters, ConstantReward, Faulty
from processes import fit as fit_here
from processes import forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_lightning import PPO, ActorCritic, PopArt, action_distribution
from ppo_lightning.callbacks import AdaptiveLearningRate, HealthMonitor, Stage, Stages, Thresholds
from ppo_lightning.cli import main
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear
from ppo_lightning.policy.moments import RunningMoments
from ppo_lightning.tools import health as module
from ppo_lightning.tools.diagnosis import METRICS, REMEDIES, IterationStats, RunStats, diagnose, inspect_rollout
from ppo_lightning.tools.health import LOWER_LR_ON

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs/health.md").read_text()

HEALTHY = IterationStats(1, 100.0, 0.02, 0.2, 0.9, -0.5, math.nan, 1.0, clipped_actions=0.1)
RUN = RunStats(0.4, True, True, HEALTHY, (20.0, 10 / 3), 0.03, 1.0, math.log(2))
T = Thresholds()


def verdict(*rows: IterationStats, run: RunStats = RUN, **thresholds) -> str | None:
    """Name of what is found in a window of the healthy row in which the last rows are others."""
    t = replace(T, **thresholds)
    window = [HEALTHY] * (t.window - len(rows)) + list(rows[-t.window :])
    symptom = diagnose(window, run, t)
    return None if symptom is None else symptom.name


def always(**values: float) -> list[IterationStats]:
    return [HEALTHY._replace(**values)] * 100


# --- what numbers say -------------------------------------------------------------------------------------------------

CASES = {
    "learning_rate_too_high": always(approx_kl=0.11),
    "clip_fraction_too_high": always(clip_fraction=0.6),
    "entropy_collapsed": always(entropy_loss=-0.001, ep_return=20.0),
    "std_collapsed": always(std=0.005, ep_return=20.0),
    "observation_constant": always(constant_observation=1.0, explained_variance=0.0),
    "actions_clipped": always(clipped_actions=0.99, ep_return=20.0),
    "critic_not_learning": always(explained_variance=0.1, value_size=10.0, value_error=9.5),
    "reward_too_large": always(explained_variance=0.1, value_size=2000.0, value_error=1900.0),
    "value_loss_exploding": always(explained_variance=-9.0, value_size=10.0, value_error=30.0, value_loss=900.0),
}


@pytest.mark.parametrize("name", CASES)
def test_each_number_out_of_range_is_named(name):
    assert verdict() is None
    assert verdict(*CASES[name]) == name


@pytest.mark.parametrize("name", CASES)
def test_one_iteration_out_of_range_is_no_finding(name):
    assert verdict(CASES[name][0]._replace(approx_kl=min(1e6, CASES[name][0].approx_kl * 1e9))) is None


def test_a_large_share_of_clipped_actions_is_a_finding_of_the_first_window_and_while_the_return_does_not_rise():
    rows, begins = always(clipped_actions=0.8), replace(RUN, first=HEALTHY._replace(clipped_actions=0.8))
    later = [row._replace(iteration=11) for row in rows]
    assert verdict(*rows) is None  # an update has led there, and the return rises
    assert verdict(*rows, run=begins) == "actions_clipped"
    assert verdict(*later, run=begins) is None
    assert verdict(*[row._replace(ep_return=20.0) for row in later], run=begins) == "actions_clipped"
    trained = replace(begins, first=begins.first._replace(iteration=100))
    assert verdict(*[row._replace(ep_return=20.0) for row in later], run=trained) is None


def test_clipped_actions_come_before_what_follows_from_them_unless_an_update_caused_them():
    critic = {"explained_variance": 0.1, "value_size": 10.0, "value_error": 9.5}
    rows = always(clipped_actions=1.0, ep_return=20.0, **critic)
    assert verdict(*rows) == "actions_clipped"
    moved = always(clipped_actions=1.0, ep_return=20.0, approx_kl=0.2)
    assert verdict(*moved) == "learning_rate_too_high"
    assert verdict(*moved, run=replace(RUN, first=moved[0])) == "actions_clipped"


def test_a_return_that_has_not_risen_by_half_of_the_run_has_stalled():
    rows = always(ep_return=24.9)
    assert verdict(*rows) is None
    assert verdict(*rows, run=replace(RUN, progress=0.5)) == "return_stalled"
    assert verdict(*always(ep_return=25.1), run=replace(RUN, progress=0.5)) is None
    assert verdict(*always(ep_return=25.1), run=replace(RUN, progress=0.5)) is None
    early = replace(RUN, progress=0.5, settled=False)  # the mean is of the first episodes still
    assert verdict(*rows, run=early) is None


def test_a_fast_policy_that_learns_within_its_clip_range_is_no_finding():
    """Between one and two alerts of KL it depends: a return that rises and few clipped samples are no fault."""
    fast = always(approx_kl=0.08)
    assert verdict(*fast) is None
    assert verdict(*always(approx_kl=0.08, clip_fraction=0.35)) == "learning_rate_too_high"
    assert verdict(*always(approx_kl=0.08, ep_return=20.0)) == "learning_rate_too_high"


def test_a_critic_with_nothing_to_explain_is_no_finding():
    """CartPole at its ceiling: values of 50 are missed by 0.003, which is more than they vary."""
    assert verdict(*always(explained_variance=-1.5, value_size=50.0, value_error=0.003)) is None
    assert (
        verdict(*always(explained_variance=0.0, value_size=30.0, value_error=11.0)) is None
    )  # it knows the mean by now
    stuck = always(explained_variance=0.0, value_size=30.0, value_error=11.0, ep_return=20.0)
    assert verdict(*stuck) == "critic_not_learning"  # but nobody learns from it
    frozen = always(explained_variance=0.0, value_size=30.0, value_error=11.0, frozen_critic=1.0)
    assert verdict(*frozen, run=replace(RUN, warm=False)) == "critic_not_learning"
    assert verdict(*always(explained_variance=math.nan)) is None  # no rewards at all


def test_values_that_do_not_vary_and_are_missed_are_not_learnt():
    """Where the target does not vary the explained variance is NaN, which no file of JSON can hold."""
    rows = always(explained_variance=math.nan, value_size=50.0, value_error=50.0)
    symptom = diagnose(rows[: T.window], RUN, T)
    assert symptom is not None
    assert (symptom.name, symptom.value) == ("critic_not_learning", 0.0)


def test_a_policy_that_has_learnt_may_be_sure_of_itself():
    assert verdict(*always(entropy_loss=-1e-6)) is None
    assert verdict(*always(std=1e-6)) is None


def test_a_policy_that_an_update_broke_differs_from_one_that_never_explored():
    rows = always(entropy_loss=-1e-9, approx_kl=0.0, ep_return=9.0)
    assert verdict(*rows) == "entropy_collapsed"
    assert verdict(*rows, run=replace(RUN, worst_kl=5.0)) == "learning_rate_too_high"
    rows = always(std=1e-3, approx_kl=1e6, ep_return=9.0)
    assert verdict(*rows, run=replace(RUN, worst_kl=1e6)) == "learning_rate_too_high"
    assert verdict(*rows, run=replace(RUN, worst_kl=1e6, first=rows[0])) == "std_collapsed"


def test_the_critic_has_time_to_begin():
    rows, begins = CASES["critic_not_learning"], replace(RUN, warm=False)
    assert verdict(*rows, run=begins) is None
    assert verdict(*CASES["reward_too_large"], run=begins) == "reward_too_large"  # which time does not mend


EDGES = {
    "window": (40, [HEALTHY._replace(approx_kl=0.2)] * 5, "learning_rate_too_high", None),  # of ten, and of forty
    "clip_fraction": ((0.1, 0.15), always(approx_kl=0.06), None, "learning_rate_too_high"),
    "approx_kl_alert": (0.005, [], None, "learning_rate_too_high"),
    "clip_fraction_alert": (0.1, [], None, "clip_fraction_too_high"),
    "explained_variance_alert": (0.05, CASES["critic_not_learning"], "critic_not_learning", None),
    "value_error": ((0.25, 0.97), CASES["critic_not_learning"], "critic_not_learning", None),
    "value_size": (5.0, CASES["critic_not_learning"], "critic_not_learning", "reward_too_large"),
    "value_loss_growth": (1e3, CASES["value_loss_exploding"], "value_loss_exploding", "critic_not_learning"),
    "entropy": (0.001, CASES["entropy_collapsed"], "entropy_collapsed", None),
    "std": (0.001, CASES["std_collapsed"], "std_collapsed", None),
    "clipped_actions": ((0.75, 0.995), CASES["actions_clipped"], "actions_clipped", None),
    "rise": (50.0, always(entropy_loss=-1e-6), None, "entropy_collapsed"),
    "stall": (0.3, always(ep_return=20.0), None, "return_stalled"),
}
"""A threshold, a value of its own, and what is found before and after."""


@pytest.mark.parametrize("name", EDGES)
def test_every_threshold_counts(name):
    value, rows, before, after = EDGES[name]
    assert verdict(*rows) == before
    assert verdict(*rows, **{name: value}) == after


def test_every_threshold_and_finding_is_in_the_document():
    for name in [field.name for field in fields(Thresholds)] + list(REMEDIES):
        assert f"`{name}`" in DOCUMENT, name


def test_every_key_in_an_advice_is_an_option():
    known = {f"--model.{name}" for name in PPO.__init__.__annotations__}
    network = set(ActorCritic.__init__.__annotations__)
    for name, remedy in REMEDIES.items():
        advice = f"{remedy.advice} {remedy.other_advice}"
        for key in filter(None, [remedy.key, remedy.other_key, *re.findall(r"--model[\w.]*\w", advice)]):
            assert ".".join(key.split(".")[:2]) in known, name
            if "init_args" in key:
                assert key.split(".")[-1] in network, name


def test_thresholds_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="window must be 2 or more"):
        Thresholds(window=1)
    with pytest.raises(InputError, match="lr_factor must lie between 0 and 1"):
        Thresholds(lr_factor=2.0)
    with pytest.raises(InputError, match="clipped_actions must be two shares above 0 in ascending order"):
        Thresholds(clipped_actions=(0.9, 0.5))


# --- planted faults ---------------------------------------------------------------------------------------------------


def cartpole(lr: float = 1e-3, iterations: int = 12, **kwargs) -> PPO:
    """The config of the same name, shorter."""
    torch.manual_seed(0)
    settings = dict(num_steps=32, gamma=0.98, gae_lambda=0.8, update_epochs=10, num_minibatches=1)
    optimizer = partial(torch.optim.Adam, lr=lr, eps=1e-5, fused=True)
    return PPO("CartPole-v1", total_steps=256 * iterations, optimizer=optimizer, **{**settings, **kwargs})


def pendulum(lr: float = 1e-3, iterations: int = 12, env="Pendulum-v1", **kwargs) -> PPO:
    settings: dict = dict(num_envs=4, num_steps=64, gamma=0.9, update_epochs=4, num_minibatches=4)
    settings["optimizer"] = partial(torch.optim.Adam, lr=lr, eps=1e-5, fused=True)
    return PPO(env, total_steps=256 * iterations, **{**settings, **kwargs})


def frozen(model: PPO) -> PPO:
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("critic" not in name and "value" not in name)
    return model


def deterministic(observation_space, action_space):
    network = ActorCritic(observation_space, action_space)
    with torch.no_grad():
        network.action_head.bias.copy_(torch.tensor([30.0, -30.0]))
    return network


def large(env: gym.Env) -> gym.Env:
    return gym.wrappers.TransformReward(env, lambda reward: 1e4 * float(reward))


def blind(env: gym.Env) -> gym.Env:
    return gym.wrappers.TransformObservation(env, np.zeros_like, env.observation_space)


narrow = partial(ActorCritic, log_std_init=-8.0)
FAULTS = {
    "learning rate of cartpole": ("learning_rate_too_high", partial(cartpole, lr=0.1)),
    "learning rate of pendulum": ("learning_rate_too_high", partial(pendulum, lr=0.1)),
    "critic of cartpole": ("critic_not_learning", lambda: frozen(cartpole(iterations=16, update_epochs=4))),
    "critic of pendulum": ("critic_not_learning", lambda: frozen(pendulum(iterations=16))),
    "entropy of cartpole": ("entropy_collapsed", partial(cartpole, policy=deterministic)),
    "entropy of pendulum": ("std_collapsed", partial(pendulum, policy=narrow)),
    "reward of cartpole": ("reward_too_large", partial(cartpole, wrappers=[large])),
    "reward of pendulum": ("reward_too_large", partial(pendulum, wrappers=[large])),
    "observation of cartpole": ("observation_constant", partial(cartpole, wrappers=[blind])),
    "observation of pendulum": ("observation_constant", partial(pendulum, wrappers=[blind])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_nothing_else(fit, tmp_path, capsys, fault):
    name, make = FAULTS[fault]
    trainer = fit(make(), logger=CSVLogger(tmp_path))
    written = json.loads((Path(trainer.log_dir) / "health.json").read_text())
    assert [finding["name"] for finding in written["findings"]] == [name]
    (finding,) = written["findings"]
    assert finding["until_step"] is None
    assert finding["key"] == REMEDIES[name].key
    said = capsys.readouterr().out
    assert said.count(f"health: {name}, found at step {finding['since_step']:,}") == 1
    assert finding["key"] in said
    assert ("frozen (requires_grad is false), policy.network.critic_trunk" in finding["evidence"]) == (
        "critic" in fault
    )


def without_critic(parameters):
    parameters = list(parameters)
    return torch.optim.Adam(parameters[: len(parameters) // 2], lr=1e-3)


def fixed_critic(observation_space, action_space):
    network = ActorCritic(observation_space, action_space)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("critic" not in name and "value" not in name)
    return network


STILL = {
    "no weight": partial(cartpole, vf_coef=0.0, update_epochs=4, iterations=14),
    "not optimised": partial(pendulum, optimizer=without_critic, iterations=14),
    "frozen from the start": partial(pendulum, policy=fixed_critic, iterations=14),
}


@pytest.mark.parametrize("why", STILL)
def test_a_critic_that_does_not_change_is_named_at_once(fit, why):
    """One that learns badly is given time."""
    watch = monitor(fit(STILL[why]()))
    (finding,) = watch.findings
    assert finding["name"] == "critic_not_learning"
    assert "its parameters do not change" in finding["evidence"]
    assert finding["since_iteration"] <= 12


class Far(gym.Env):
    """Rewards each joint for an action in the middle of its bounds."""

    def __init__(self, low: float = 100.0, high: float = 200.0, joints: int = 1) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2,))
        self.action_space = gym.spaces.Box(low, high, (joints,))
        self.middle, self.half = (low + high) / 2, (high - low) / 2

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = -float(np.abs(action - self.middle).max() / self.half)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), reward, False, self.steps >= 8, {}


CLIPPED = {
    "bounds far from 0": (Far, ActorCritic),
    "bounds close to 0": (partial(Far, -0.1, 0.1), ActorCritic),
    "six joints": (partial(Far, -1.0, 1.0, 6), ActorCritic),
    "gsde": (Far, partial(ActorCritic, distribution="gsde")),
}


@pytest.mark.parametrize("case", CLIPPED)
def test_actions_that_the_bounds_clip_are_named_before_the_critic(fit, case):
    env, policy = CLIPPED[case]
    trainer = fit(PPO(env, policy=policy, num_envs=4, num_steps=16, total_steps=64 * 12, update_epochs=1))
    (finding,) = monitor(trainer).findings
    assert (finding["name"], finding["since_iteration"]) == ("actions_clipped", 10)
    assert re.search(r"clip \d+% of the actions", finding["evidence"])
    for cure in ("distribution tanh or beta", "RescaleAction", "log_std_init"):
        assert cure in finding["advice"]


CURED = {
    "tanh": partial(PPO, Far, policy=partial(ActorCritic, distribution="tanh")),
    "beta": partial(PPO, Far, policy=partial(ActorCritic, distribution="beta")),
    "RescaleAction": partial(
        PPO, Far, wrappers=[partial(gym.wrappers.RescaleAction, min_action=np.float32(-1), max_action=np.float32(1))]
    ),
    "log_std_init": partial(PPO, partial(Far, -1.0, 1.0, 6), policy=partial(ActorCritic, log_std_init=-2.0)),
}


@pytest.mark.parametrize("cure", CURED)
def test_what_is_advised_for_clipped_actions_silences_the_finding(fit, cure):
    model = CURED[cure](num_envs=4, num_steps=16, total_steps=64 * 12, update_epochs=1)
    assert monitor(fit(model)).findings == []


class OwnNetwork(torch.nn.Module):
    """A network that has no parameter of ActorCritic's."""

    def __init__(self, observation_space, action_space, log_std: float = 0.0) -> None:
        super().__init__()
        self.distribution = action_distribution(action_space)
        self.layer = torch.nn.Linear(observation_space.shape[0], self.distribution.num_parameters + 1)
        with torch.no_grad():
            self.layer.bias[self.distribution.num_parameters // 2 : -1] = log_std

    def forward(self, observation):
        parameters, value = self.layer(observation).split([self.distribution.num_parameters, 1], -1)
        return parameters, value.squeeze(-1)


class Narrow(ActorCritic):
    """An ActorCritic whose standard deviation cannot be set."""

    def __init__(self, observation_space, action_space) -> None:
        super().__init__(observation_space, action_space, log_std_init=-8.0)


class Sharp(ActorCritic):
    """A Beta distribution of next to no width; keywords of ActorCritic can be set."""

    def __init__(self, *spaces, **kwargs) -> None:
        super().__init__(*spaces, distribution="beta", **kwargs)
        for layer in self.action_head.modules():
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.constant_(layer.bias, 1e5)


OTHERS = {
    "std_collapsed": partial(pendulum, policy=partial(OwnNetwork, log_std=-8.0)),
    "actions_clipped": partial(pendulum, env=Far, policy=OwnNetwork),
    "critic_not_learning": partial(pendulum, policy=OwnNetwork, vf_coef=0.0, iterations=80, update_epochs=1),
}


def test_no_standard_deviation_to_begin_with_is_advised_for_a_beta_distribution(fit):
    (finding,) = (one for one in monitor(fit(pendulum(policy=Sharp))).findings if one["name"] == "std_collapsed")
    assert finding["key"] == "--model.ent_coef"
    assert "log_std_init" not in finding["advice"]


@pytest.mark.parametrize("name", OTHERS)
def test_no_parameter_of_actor_critic_is_advised_for_another_network(fit, name):
    findings = {finding["name"]: finding for finding in monitor(fit(OTHERS[name]())).findings}
    finding = findings[name]
    for parameter in ActorCritic.__init__.__annotations__:
        assert not re.search(rf"\b{parameter}\b", f"{finding['key']} {finding['advice']}")
    assert finding["key"] == REMEDIES[name].other_key
    assert "network" in finding["advice"]


def test_no_parameter_is_advised_that_a_subclass_of_actor_critic_does_not_take(fit):
    (finding,) = monitor(fit(pendulum(policy=Narrow))).findings
    assert (finding["name"], finding["key"]) == ("std_collapsed", "--model.ent_coef")


# --- healthy runs -----------------------------------------------------------------------------------------------------


def findings_of(config: str, *flags: str) -> list[dict]:
    main(
        f"fit --config {ROOT}/configs/{config}.yaml --trainer.accelerator cpu --trainer.enable_progress_bar false "
        "--trainer.enable_model_summary false --trainer.limit_val_batches 0".split()
        + list(flags)
    )
    written = json.loads(Path("lightning_logs/version_0/health.json").read_text())
    assert written["iterations"] >= T.window
    return written["findings"]


CONFIGS = (
    "cartpole",
    "pendulum",
    "mountain_car_continuous",
    "acrobot",
    "masked",
    "multi_discrete",
    "cartpole_tensors",
)


SHORT_RUNS = {
    "cartpole": partial(PPO, "CartPole-v1", num_envs=4, num_steps=16, total_steps=64 * 12),
    "cartpole, other settings": partial(cartpole, iterations=20, update_epochs=4),
    "pendulum": partial(pendulum, num_minibatches=8),
    "pendulum, normalised": partial(
        pendulum, iterations=20, num_minibatches=8, normalize_reward=True, normalize_observation=True
    ),
    "acrobot": partial(PPO, "Acrobot-v1", num_envs=4, num_steps=32, total_steps=128 * 12),
    "mountain car": partial(PPO, "MountainCarContinuous-v0", num_envs=4, num_steps=64, total_steps=256 * 12),
}


@pytest.mark.parametrize("run", SHORT_RUNS)
def test_a_run_too_short_to_learn_is_no_fault(fit, run):
    """Critic and return begin with nothing, which many say that they cannot learn."""
    watch = monitor(fit(SHORT_RUNS[run]()))
    assert watch.iterations >= T.window
    assert watch.findings == []


@pytest.mark.parametrize(("config", "iterations"), [("cartpole", 20), ("masked", 10)])
def test_a_healthy_run_begins_in_peace(config, iterations):
    assert findings_of(config, f"--trainer.max_epochs={iterations}", "--seed_everything=1") == []


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_healthy_run_is_left_in_peace(config, seed):
    assert findings_of(config, f"--seed_everything={seed}", "--model.compile=false") == []


# --- in a run ---------------------------------------------------------------------------------------------------------


class Planted(HealthMonitor):
    """Sees other numbers than there are."""

    def __init__(self, numbers, **kwargs) -> None:
        super().__init__(**kwargs)
        self.numbers = numbers

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in self.numbers(pl_module).items()}
        )
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def small(iterations: int = 8, **kwargs) -> PPO:
    torch.manual_seed(0)
    return PPO(ActionMatters, num_envs=2, num_steps=8, total_steps=16 * iterations, update_epochs=1, **kwargs)


SHORT = Thresholds(window=2)


def kl(value: float):
    return lambda model: {"train/approx_kl": value, "train/clip_fraction": 0.2, "train/explained_variance": 1.0}


def monitor(trainer) -> HealthMonitor:
    (found,) = [callback for callback in trainer.callbacks if isinstance(callback, HealthMonitor)]
    return found


def test_every_run_has_one_and_ones_own_takes_its_place(fit):
    assert type(monitor(fit(small(1)))) is HealthMonitor
    own = HealthMonitor(thresholds=SHORT)
    assert monitor(fit(small(1), callbacks=[own])) is own


def test_training_is_the_same_with_and_without(fit, monkeypatch):
    watched = cartpole(lr=0.1)
    fit(watched)
    monkeypatch.setattr("ppo_lightning.callbacks.has_tools", lambda: False)
    alone = cartpole(lr=0.1)
    trainer = fit(alone)
    assert not any(isinstance(callback, HealthMonitor) for callback in trainer.callbacks)
    for ours, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_rollouts_are_looked_at_only_where_the_critic_explains_little(fit, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "inspect_rollout", lambda batch: looks.append(batch) or {})
    fit(small(4), callbacks=[Planted(kl(0.02))])
    assert looks == []
    fit(small(4), callbacks=[Planted(lambda model: {**kl(0.02)(model), "train/explained_variance": 0.2})])
    assert len(looks) == 1  # every third, of four


def test_a_finding_ends_and_may_come_back_and_is_reported_once(fit, capsys):
    def numbers(model):
        return kl(1.0 if model.policy_version in (1, 2, 9, 10) else 0.02)(model)

    watch = Planted(numbers, thresholds=SHORT)
    fit(small(8), callbacks=[watch])
    (finding,) = watch.findings
    # Iteration 2 ends a window of two; in 3 one of two is out of range still; two quiet ones later it is over.
    assert (finding["since_step"], finding["since_iteration"], finding["until_step"]) == (32, 2, 80)
    assert watch.alerts == []
    assert capsys.readouterr().out.count("found at step") == 1

    watch = Planted(numbers, thresholds=SHORT)
    fit(small(10), callbacks=[watch])
    assert [finding["until_step"] for finding in watch.findings] == [None]
    assert "from step 32 on" in watch.diagnosis
    assert capsys.readouterr().out.count("found at step") == 1


def test_the_run_folder_tensorboard_and_loggers_are_printed(fit, tmp_path):
    board, rows = TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "rows")
    watch = Planted(lambda model: kl(1.0 if model.policy_version < 4 else 0.02)(model), thresholds=SHORT)
    trainer = fit(small(8), callbacks=[watch], logger=[board, rows])
    written = json.loads((Path(trainer.log_dir) / "health.json").read_text())
    assert written == json.loads(json.dumps(watch.report()))
    assert written.keys() == {"findings", "acts", "thresholds", "steps", "iterations"}
    assert written["findings"][0].keys() >= {"name", "since_step", "value", "healthy", "advice", "key"}
    assert written["thresholds"]["window"] == 2
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("health/alerts")] == [(32, 1.0), (96, 0.0)]
    assert b"learning_rate_too_high" in events.Tensors("health/text_summary")[0].tensor_proto.string_val[0]
    with open(Path(rows.log_dir) / "metrics.csv", newline="") as lines:
        marked = [row for row in csv.DictReader(lines) if row["health/alerts"]]
    assert [(row["step"], float(row["health/alerts"])) for row in marked] == [("32", 1.0), ("96", 0.0)]


def test_without_loggers_there_is_no_file(fit, tmp_path):
    fit(small(2))
    assert not list(tmp_path.rglob("health.json"))


def test_the_critic_is_judged_by_iterations_with_rewards(fit, monkeypatch):
    """Where rewards are rare, the first that is found is none that the critic had to know."""
    monkeypatch.setattr(module, "inspect_rollout", lambda batch: {"value_size": 10.0, "value_error": 10.0})

    def numbers(model):
        return {
            "train/explained_variance": 0.0,
            "rollout/reward_max": float(model.policy_version > 6),
            "rollout/reward_min": 0.0,
            "train/value_loss": float(model.policy_version > 6),  # which was 0, and does not explode
        }

    watch = Planted(numbers, thresholds=replace(SHORT, warmup_iterations=2))
    fit(small(12), callbacks=[watch])
    (finding,) = watch.findings
    assert (finding["name"], finding["since_iteration"]) == ("critic_not_learning", 10)


def test_a_folder_that_cannot_be_written_costs_the_file_alone(fit, tmp_path, monkeypatch):
    def fails(path, data):
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_atomically", fails)
    model = small(4)
    with pytest.warns(UserWarning, match=r"health.json could not be written into .*no space left"):
        fit(model, logger=CSVLogger(tmp_path))
    assert model.policy_version == 4


def test_steps_left_out_are_a_finding(fit):
    model = small(3, non_finite="skip")
    calls = []

    def once(gradient):
        calls.append(1)
        return gradient * torch.nan if len(calls) == 2 else gradient

    model.policy.network.value_head.bias.register_hook(once)
    (finding,) = monitor(fit(model)).findings
    assert (finding["name"], finding["value"], finding["since_iteration"]) == ("non_finite", 1.0, 1)


def test_a_run_that_ends_by_a_gradient_leaves_its_finding(fit, tmp_path):
    model = small(3)
    next(model.policy.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    board = TensorBoardLogger(tmp_path)
    with pytest.raises(FloatingPointError):
        fit(model, logger=board)
    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [event.value for event in events.Scalars("health/alerts")] == [1.0]
    (file,) = tmp_path.rglob("health.json")
    (finding,) = json.loads(file.read_text())["findings"]
    assert finding["name"] == "non_finite"
    assert "the gradient's norm is nan" in finding["evidence"]


def test_another_error_is_no_finding(fit, tmp_path):
    with pytest.raises(Exception, match="the pole is at infinity"):
        fit(PPO(partial(Faulty, "raise"), num_envs=1, num_steps=8, total_steps=64), logger=CSVLogger(tmp_path))
    (file,) = tmp_path.rglob("health.json")
    assert json.loads(file.read_text())["findings"] == []


def test_another_model_begins_with_a_clean_record(fit):
    watch = Planted(kl(1.0), thresholds=SHORT)
    fit(small(2), callbacks=[watch])
    assert len(watch.findings) == 1
    watch.numbers = kl(0.02)
    fit(small(2), callbacks=[watch])
    assert watch.findings == []


def test_constant_rewards_are_learnt_in_peace(fit):
    model = PPO(ConstantReward, num_envs=2, num_steps=32, total_steps=64 * 12, wrappers=[])
    names = [finding["name"] for finding in monitor(fit(model)).findings]
    assert names == ["observation_constant"]  # which they are


# --- what it does -----------------------------------------------------------------------------------------------------


def test_it_halves_the_learning_rate_within_bounds_and_gives_back_what_it_was_given(fit, capsys):
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            rates.append(pl_module.learning_rate / (1 - (pl_module.num_env_steps - 16) / pl_module.total_steps))

    watch = Planted(kl(1.0), act=True, thresholds=replace(SHORT, lowest_lr=0.25))
    model = small(10)
    fit(model, callbacks=[watch, Rates()])
    torch.testing.assert_close(torch.tensor(rates) / 3e-4, torch.tensor([1.0, 1.0, 0.5, 0.5] + [0.25] * 6))
    assert [(act["iteration"], act["key"], act["factor"]) for act in watch.acts] == [
        (2, "--model.optimizer.lr", 0.5),
        (4, "--model.optimizer.lr", 0.5),
    ]
    assert "optimizer.lr is 0.00015 from step 32 on, since learning_rate_too_high" in capsys.readouterr().out


def test_it_only_looks_unless_it_is_asked_to_act(fit):
    watch = Planted(kl(1.0), thresholds=SHORT)
    fit(small(4), callbacks=[watch])
    assert watch.findings
    assert watch.acts == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.0, [(0.001, 0.001), (0.002, 0.002), (0.004, 0.004)]),
        (Linear(0.01, 0.0), [(0.02, 0.0), (0.04, 0.0)]),
        (0.5, []),
    ],
)
def test_it_doubles_ent_coef_within_bounds(fit, given, expected):
    used = []

    class Coefficients(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            line = pl_module.schedules["ent_coef"]
            if line != used[-1:] and (line.start, line.end) not in used:
                used.append((line.start, line.end))

    def numbers(model):
        return {**kl(0.02)(model), "train/entropy_loss": -1e-6}

    watch = Planted(numbers, act=True, thresholds=replace(SHORT, highest_ent_coef=0.05))
    model = small(7, ent_coef=given)
    before = model.schedules["ent_coef"]
    fit(model, callbacks=[watch, Coefficients()])
    assert used == [(before.start, before.end), *expected]
    assert len(watch.acts) == len(expected)
    assert model.schedules["ent_coef"] == before
    assert [act["to"] for act in watch.acts] == [start for start, _ in expected]


def test_a_run_that_was_stopped_acts_as_if_it_never_was(fit, tmp_path):
    """Rows of the window, findings and acts are in the checkpoint: the weights are the same to the bit."""

    def numbers(model):
        return {**kl(1.0)(model), "train/entropy_loss": -1e-6 if model.policy_version > 4 else -0.6}

    def watch():
        return HealthWatch(numbers, act=True, thresholds=replace(SHORT, window=3))

    settings = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path, version=0)}
    whole, stopped, resumed = (small(12, ent_coef=0.01) for _ in range(3))
    first = watch()
    fit(whole, callbacks=[first])
    trainer = fit(stopped, callbacks=[watch()], max_epochs=5, **settings)
    second = watch()
    fit(resumed, callbacks=[second], ckpt_path=Path(trainer.log_dir) / "checkpoints/last.ckpt", **settings)
    assert second.report() == first.report()
    assert len(first.acts) > 2
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert resumed.learning_rate == whole.learning_rate


class HealthWatch(Planted):
    """Under one name in a checkpoint, whoever makes it."""


def test_a_second_fit_resumes_with_what_was_changed(fit):
    watch, model = Planted(kl(1.0), act=True, thresholds=replace(SHORT, lowest_lr=0.5)), small(8)
    fit(model, callbacks=[watch], max_epochs=4)
    model.total_steps = 16 * 12
    fit(model, callbacks=[watch])
    assert len(watch.acts) == 1
    assert model.learning_rate == pytest.approx(3e-4 * 0.5 / 12)


@pytest.mark.parametrize("name", ["lr_scheduler", "AdaptiveLearningRate", "Stages"])
def test_acting_beside_what_sets_the_same_is_refused(fit, name):
    """It would say that it has changed what the other has changed back."""
    scheduler = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0) if name == "lr_scheduler" else None
    others = {
        "AdaptiveLearningRate": [AdaptiveLearningRate()],
        "Stages": [Stages([Stage(ent_coef=0.1)])],
    }
    model = small(2, lr_scheduler=scheduler)
    with pytest.raises(InputError, match=f"act would change the learning rate or ent_coef, which {name} sets"):
        fit(model, callbacks=[HealthMonitor(act=True), *others.get(name, [])])
    fit(model, callbacks=[HealthMonitor(), *others.get(name, [])])


def test_all_processes_act_alike(tmp_path):
    def train(rank: int):
        watch = Planted(kl(1.0), act=True, thresholds=SHORT)
        model = small(12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_here(model, strategy="ddp", devices=2, callbacks=[watch])
        return watch.acts, [parameter.detach().tolist() for parameter in model.parameters()], model.learning_rate

    first, second = forked(train)
    assert first == second
    assert len(first[0]) >= 2


def test_it_is_set_in_yaml(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    Path("health.yaml").write_text(block)
    main(
        f"fit --config {ROOT}/configs/cartpole.yaml --config health.yaml --trainer.accelerator cpu --trainer.max_epochs 6 "
        "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.limit_val_batches 0 "
        "--model.optimizer.lr 0.1".split()
    )
    written = json.loads(Path("lightning_logs/version_0/health.json").read_text())
    assert written["thresholds"]["window"] == 5
    assert [act["key"] for act in written["acts"]] == ["--model.optimizer.lr"]


def test_every_number_it_needs_is_logged(fit):
    logged = fit(pendulum(iterations=1)).callback_metrics
    assert set(METRICS) - logged.keys() <= {"rollout/ep_rew_mean"}  # no episode has ended
    assert set(LOWER_LR_ON) <= REMEDIES.keys()


def test_values_are_judged_as_the_loss_has_them():
    """With PopArt large rewards are no reason for alarm."""
    looks = []
    options = {"num_envs": 2, "num_steps": 32, "num_minibatches": 1, "env_kwargs": {"max_episode_steps": 20}}
    for popart in (None, PopArt()):
        model = PPO("Pendulum-v1", popart=popart, **options)
        model.seed = 1
        rollout = model.collect()
        rollout["reward"] *= 1e4
        rollout["value_target"] *= 1e4
        normalizer = model.policy.value_normalizer
        if normalizer is not None:
            normalizer.merge(RunningMoments.batch_moments(rollout["value_target"].flatten())[None])
        looks.append(inspect_rollout(rollout) if normalizer is None else inspect_rollout(rollout, normalizer.normalize))
    plain, normalized = looks
    assert plain["value_size"] > 1000
    assert normalized["value_size"] < 100


@pytest.mark.parametrize("levels", [1, 2])
def test_a_level_of_a_curriculum_is_judged_by_its_own_iterations(fit, levels):
    """A policy that is certain by then, with lower returns, has not collapsed."""

    def numbers(model):
        begun = model.policy_version > 4
        model.schedule_metrics["curriculum/stage"] = 2.0 if begun and levels == 2 else 1.0
        entropy, returned = (1e-4, -100.0) if begun else (0.5, 0.0)
        return {**kl(0.02)(model), "train/entropy_loss": -entropy, "rollout/ep_rew_mean": returned}

    watch = Planted(numbers, thresholds=SHORT)
    fit(small(8), callbacks=[watch])
    assert [finding["name"] for finding in watch.findings] == ([] if levels == 2 else ["entropy_collapsed"])
