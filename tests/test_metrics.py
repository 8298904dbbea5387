"""What is logged: numbers against their definitions, other systems' names, what environments say, and events."""

import copy
import csv
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import DictInfoToList
from lightning.pytorch.loggers import CSVLogger
from processes import fit as fit_in_process
from processes import forked
from torch.testing import assert_close

from ppo_lightning import PPO
from ppo_lightning.algorithm.loss import Objective, normalize_advantages
from ppo_lightning.algorithm.minibatches import map_samples
from ppo_lightning.algorithm.update import UpdateResult
from ppo_lightning.callbacks import PPOCallback, RolloutDetails
from ppo_lightning.callbacks.events import EVENTS
from ppo_lightning.cli import main
from ppo_lightning.envs import EnvFactory, RestartBudget, VectorEnvAdapter
from ppo_lightning.errors import InputError
from ppo_lightning.metric_names import TABLES, from_names, to_names
from ppo_lightning.metrics import iteration_metrics
from ppo_lightning.policy import ActorCritic
from ppo_lightning.rollout.episodes import EpisodeStatistics

SMALL = {"env": "CartPole-v1", "num_envs": 4, "num_steps": 16, "total_steps": 4 * 64}


class Talks(gym.Env):
    """Three steps per episode; says what its reward is made of, and how it went."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)
    made = 0

    def __init__(self):
        Talks.made += 1
        self.number, self.episode = Talks.made, 0

    def get_state(self):
        return {"steps": self.steps, "episode": self.episode}

    def set_state(self, state):
        self.steps, self.episode = state["steps"], state["episode"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episode = 0, self.episode + 1
        return np.zeros(1, np.float32), {"log": {"/height": 1000.0}}

    def step(self, action):
        self.steps += 1
        done = self.steps == 3
        parts = {"forward": float(self.steps), "control": -0.5}
        info = {"reward_components": parts, "log": {"/height": float(self.number)}, "power": 2.0, "note": "a text"}
        if done:
            info |= {"is_success": self.episode % 2 == 0, "fail": self.episode % 2 == 1}
        return np.zeros(1, np.float32), sum(parts.values()), done, False, info


def vector(mode):
    return lambda num_envs: SyncVectorEnv([Talks] * num_envs, autoreset_mode=mode)


def trained(fit, seen, **options):
    model = PPO(**{**SMALL, **options})
    fit(model, callbacks=[PPOCallback(on_iteration_end=lambda trainer, module, metrics: seen.append(metrics))])
    return model


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_environments_say_is_averaged_over_steps_and_over_whole_episodes(fit, mode):
    """Rollouts of 4 steps cut episodes of 3: sums go on from one rollout to the next, resets never count."""
    Talks.made, seen = 0, []
    trained(
        fit, seen, env=vector(mode), num_envs=2, num_steps=4, total_steps=48, info_keys=["power"], num_minibatches=1
    )
    for metrics in seen:
        assert metrics["reward_components/forward"] == 6.0
        assert metrics["reward_components/control"] == -1.5
        assert metrics["reward/control"] == -0.5
        assert metrics["env/height"] <= Talks.made  # a reset says 1000
        assert metrics["env/power"] == 2.0
        assert "env/note" not in metrics
    total = sum(metrics["rollout/episodes"] for metrics in seen)
    assert sum(metrics["rollout/successes"] + metrics["rollout/failures"] for metrics in seen) == total > 10
    assert seen[-1]["rollout/success_rate"] + seen[-1]["rollout/fail_rate"] == 1.0


def test_worker_processes_say_the_same(fit):
    values = []
    for vectorization in ("sync", "async"):
        Talks.made, seen = 0, []
        torch.manual_seed(0)
        trained(fit, seen, env=Talks, num_envs=2, num_steps=4, total_steps=32, vectorization=vectorization)
        names = [name for name in seen[0] if name.startswith("reward")]
        values.append([[metrics[name] for name in names] for metrics in seen])
    assert values[0] == values[1]


def test_a_resumed_run_continues_the_sums(fit, tmp_path):
    """Nothing of an episode that is cut by the end of a run is lost to reward_components."""
    whole, second = [], []
    options = {"env": Talks, "num_envs": 2, "num_steps": 4, "num_minibatches": 1, "total_steps": 32}
    trained(fit, whole, **options)
    model = PPO(**options)
    fit(model, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(
        PPO(**options),
        ckpt_path=tmp_path / "half.ckpt",
        callbacks=[PPOCallback(on_iteration_end=lambda trainer, module, metrics: second.append(metrics))],
    )
    for one, other in zip(whole[2:], second, strict=True):
        for part in ("forward", "control"):
            assert one[f"reward_components/{part}"] == other[f"reward_components/{part}"]


def test_evaluations_say_it_too():
    statistics = PPO(Talks, num_envs=2, num_steps=4, num_minibatches=1, info_keys=["power"]).evaluate(4)
    assert statistics["eval/reward_components/forward"] == 6.0
    assert statistics["eval/env/power"] == 2.0
    assert statistics["eval/fail_rate"] == 0.5


def test_two_processes_merge_what_either_has_heard():
    def says(rank):
        class Says(Talks):
            def step(self, action):
                *others, info = super().step(action)
                return *others, {**info, "log": {f"only_{rank}": 1.0 + rank}}

        seen = []
        model = PPO(Says, num_envs=2, num_steps=6, num_minibatches=1, total_steps=48)
        fit_in_process(
            model,
            strategy="ddp",
            devices=2,
            callbacks=[PPOCallback(on_iteration_end=lambda trainer, module, metrics: seen.append(metrics))],
        )
        return seen

    first, second = forked(says)
    for one, other in zip(first, second, strict=True):
        assert one["env/only_0"] == other["env/only_0"] == 1.0
        assert one["env/only_1"] == other["env/only_1"] == 2.0
        assert one["rollout/episodes"] == other["rollout/episodes"] == 8
        assert one["rollout/reward_max"] == other["rollout/reward_max"] == 2.5
        assert one["rollout/value_mean"] == other["rollout/value_mean"]


class Odd(Talks):
    """Says things that are no numbers, and NumPy's own; a step is lost where ``lives`` says so."""

    lives = ()
    both = False

    def step(self, action):
        observation, reward, done, _, _ = super().step(action)
        info = {
            "reward_components": {"sometimes": np.nan if self.steps == 2 else 1.0, "words": "many"},
            "log": {"upright": np.bool_(self.steps < 3), "small": np.float16(1.0), "nothing": None, "never": np.nan},
            "failure": "fell" if done else None,
            "success": np.bool_(done),
        }
        if self.lives:
            info["life_lost"] = self.steps in self.lives
        return observation, reward, done, done and self.both, info


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_is_no_number_is_left_out_and_numpys_bools_count(fit, mode):
    seen = []
    trained(fit, seen, env=lambda num_envs: SyncVectorEnv([Odd] * num_envs, autoreset_mode=mode), num_steps=12 * 4)
    metrics = seen[-1]
    assert metrics["reward/sometimes"] == 1.0
    assert metrics["reward_components/sometimes"] == 2.0
    assert metrics["env/upright"] == pytest.approx(2 / 3)
    assert metrics["rollout/success_rate"] == 1.0
    silent = {"reward/words", "reward_components/words", "env/nothing", "env/never", "rollout/fail_rate"}
    assert silent.isdisjoint(metrics)


def test_numbers_of_few_bits_are_added_up_exactly(fit):
    seen = []
    trained(fit, seen, env=Odd, num_steps=3000, num_envs=1, total_steps=3000)
    assert seen[0]["env/small"] == 1.0  # added up as float16 they end at 2048


@pytest.mark.parametrize(("lives", "both"), [((1, 2, 3), False), ((), True)])
def test_an_episode_ends_once_whatever_else_is_terminal(fit, lives, both):
    """A lost life ends no episode; one that is terminal in its last step is not cut."""
    seen = []
    env = type("Lives", (Odd,), {"lives": lives, "both": both})
    trained(fit, seen, env=env, num_envs=2, num_steps=30, total_steps=60, num_minibatches=1)
    counted = [seen[0][f"rollout/{name}"] for name in ("episodes", "terminated", "truncated")]
    assert counted == [20, 20, 0]


class Says(gym.Env):
    """Four steps per episode; ``infos`` are those of environment ``index`` at its steps."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def __init__(self, infos, index=0):
        self.infos, self.index = infos, index

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if seed is not None:
            self.index = seed % 2
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        own = self.infos[self.index]
        info = own[self.steps % len(own)]
        return np.zeros(1, np.float32), 1.0, self.steps == 4, False, info


def told(infos, mode, **options):
    """What a rollout of two environments logs, and its episodes."""
    if mode == "async":
        env, options["vectorization"] = partial(Says, infos), "async"
    elif mode == "sync":
        env = partial(Says, infos)
    else:
        env = lambda num_envs: SyncVectorEnv([partial(Says, infos)] * num_envs, autoreset_mode=mode)  # noqa: E731
    model = PPO(env, num_envs=2, num_steps=10, num_minibatches=1, **options)
    model.seed = 0
    try:
        while model.environment_seed() % 2:
            model.seed += 1
        model.rollouts.collect()
    finally:
        model.close_environments()
    return model.rollouts


MODES = ["sync", "async", *AutoresetMode]


@pytest.mark.parametrize("mode", MODES)
def test_numbers_of_environments_are_averaged_whatever_their_types(mode):
    """Gymnasium makes an array of the first environment's type, which would cut 0.25 to 0."""
    infos = (
        [{"rewards": {"a": 0}, "log": {"b": True, "c": np.uint8(1)}, "power": 1}],
        [{"rewards": {"a": 0.5}, "log": {"b": 0.5, "c": -2.0}, "power": np.float32(0.5)}],
    )
    sums = told(infos, mode, info_keys=["power"]).info_sums
    means = {name: total / number for name, (total, number) in sums.items()}
    assert means["reward/a"] == 0.25
    assert means["reward_components/a"] == 1.0
    assert means["env/b"] == means["env/power"] == 0.75
    assert means["env/c"] == -0.5


CYCLE: dict = {"a": 1.0}
CYCLE["self"] = CYCLE
ANYTHING = [
    ([{"hit": None}], [{"hit": 3}]),
    ([{"hit": 3}, {"hit": None}, {"hit": "text"}], [{"hit": 2.5}, {}, {"hit": [1, 2]}]),
    ([{"hit": np.zeros(2)}, {"hit": np.zeros((2, 2))}], [{"hit": np.zeros(3)}, {"hit": True}]),
    ([{"hit": {"a": 1}}, {"hit": 2}, {"hit": {"a": {"b": 1}}}], [{"hit": {"a": "x", "c": None}}, {"hit": {}}]),
    ([{3: 1, None: 2, (1, 2): 3, "_hit": "x", "hit": 1}], [{"hit": 1, "_hit": 7, b"bytes": 1}]),
    ([{"hit": [[1], [2, 3]]}, {"hit": {1, 2}}], [{"hit": "a long text" * 100}, {"hit": object}]),
    ([{"hit": 10**30, "log": {"x": 10**400}}], [{"hit": 1j, "log": {"x": np.complex128(1j), 5: 1.0}}]),
    ([{"log": 1, "rewards": None, "metrics": "x"}], [{"log": {"a": None}, "rewards": {"b": "x"}, "metrics": {}}]),
    ([{"final_info": 3, "final_obs": "x", "_final_obs": 5}], [{"final_info": {"is_success": 1}, "final_obs": None}]),
    ([{"is_success": None, "life_lost": None}], [{"is_success": "yes", "life_lost": 0}]),
    ([{"is_success": [], "life_lost": np.zeros(3)}], [{"is_success": np.zeros(2), "life_lost": [False]}]),
    ([{"hit": torch.zeros(2, requires_grad=True)}], [{"hit": torch.zeros((), dtype=torch.bfloat16)}]),
    ([{"log": {"t": torch.ones(1)}, "hit": np.array(["a", "bc"])}], [{"log": {"t": 1}, "hit": np.array(["long text"])}]),
    ([{"hit": CYCLE}], [{"hit": np.datetime64("2020-01-01")}]),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_whatever_info_holds_training_continues(mode):
    together = tuple([{} for _ in range(4)] for _ in range(2))
    for number, both in enumerate(ANYTHING):
        for own, infos in zip(together, both, strict=True):
            for step, info in enumerate(own):
                info.update(
                    {
                        f"{key}{number}" if key == "hit" else key: value
                        for key, value in infos[step % len(infos)].items()
                    }
                )
        if mode != "async":
            assert len(told(both, mode).episodes.finished) == 4
    rollouts = told(together, mode)
    assert len(rollouts.episodes.finished) == 4
    assert rollouts.info_sums["env/t"][0] == rollouts.info_sums["env/t"][1] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("yes", [np.array([True]), np.array([[1.0]]), torch.tensor([True]), [1], np.bool_(True), 1])
def test_a_success_counts_in_whatever_it_comes(mode, yes):
    if mode == "async" and not isinstance(yes, np.ndarray):
        pytest.skip("worker processes are slow to start")
    infos = ([{"is_success": yes}], [{"is_success": None, "success": False}])
    assert sorted(told(infos, mode).episodes.finished[:, 2].tolist()) == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", MODES)
def test_evaluations_average_metrics_at_the_end_of_the_episodes_that_count(mode, tmp_path):
    """EmbodiChain's ``eval/metrics/progress`` of t / 4 is 1, not its mean over steps; in training it is that mean."""
    own = [
        {"metrics": {"progress": step / 4, "early": 5.0 if step == 1 else None}, "log": {"height": step}}
        for step in (4, 1, 2, 3)
    ]
    other = [{"metrics": {"progress": 2 * info["metrics"]["progress"]}} for info in own]  # ``infos[steps % 4]``
    env = partial(Says, (own, other))
    options: dict = {"env": env, "vectorization": "async"} if mode == "async" else {"env": env}
    if mode not in ("async", "sync"):
        options["env"] = lambda num_envs: SyncVectorEnv([env] * num_envs, autoreset_mode=mode)
    model = PPO(**options, num_envs=2, num_steps=8, num_minibatches=1)
    model.seed = 0
    while model.evaluation_seed() % 2:
        model.seed += 1
    for num_episodes, progress in [(2, 1.5), (3, 4 / 3)]:  # of three the first environment runs two
        statistics = model.evaluate(num_episodes)
        assert statistics["eval/env/progress"] == pytest.approx(progress)
        assert statistics["eval/env/height"] == 2.5
        assert "eval/env/early" not in statistics
    model.close_environments()
    sums = told((own, other), mode).info_sums
    steps = [1, 2, 3, 4] * 2 + ([] if mode is AutoresetMode.NEXT_STEP else [1, 2])  # two of whose ten rows are resets
    assert sums["env/progress"][0] / sums["env/progress"][1] == pytest.approx(1.5 * np.mean(steps) / 4)
    assert sums["env/early"] == (5.0 * steps.count(1), steps.count(1))


class Listed(VectorEnv):
    """A vector of its own, whose info is what ``info`` gives for its N environments."""

    def __init__(self, num_envs, info, tensors):
        self.inner, self.info, self.num_envs = Native(num_envs, tensors), info, num_envs
        for name in (
            "metadata",
            "single_observation_space",
            "single_action_space",
            "observation_space",
            "action_space",
        ):
            setattr(self, name, getattr(self.inner, name))

    def reset(self, *, seed=None, options=None):
        return self.inner.reset(seed=seed)[0], self.info({})

    def step(self, actions):
        *others, info = self.inner.step(actions)
        return *others, self.info({"final_obs": info["final_obs"]})


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(
    "info",
    [
        lambda info: {**info, "success": True, "log": {"x": [1.0] * 4, 3: None}},
        lambda info: {**info, "success": [[True]] * 4, "log": {"x": np.ones((4, 1)), "_x": "mine"}, "final_info": None},
        lambda info: {**info, "success": torch.ones(4, 1), "log": {"x": torch.ones(1).bfloat16(), "y": "text"}, "_success": 3},
        lambda info: {**info, "success": [True, 1, 1.0, np.ones(1)], "log": {"x": [1, None, "a", [1, 2]], "z": torch.ones(7)}},
    ],
)  # fmt: skip
def test_whatever_the_info_of_a_vector_of_ones_own_holds(fit, info, tensors):
    seen = []
    statistics = trained(fit, seen, env=partial(Listed, info=info, tensors=tensors)).evaluate(4)
    assert seen[-1]["rollout/success_rate"] == seen[-1]["env/x"] == 1.0
    assert statistics["eval/success_rate"] == statistics["eval/env/x"] == 1.0


def test_a_vector_may_give_an_info_for_each_environment():
    infos = ([{"log": {"x": 1}}], [{"log": {"x": 2.5}}])

    def env(num_envs):
        return DictInfoToList(SyncVectorEnv([partial(Says, infos)] * num_envs))

    model = PPO(env, num_envs=2, num_steps=8, num_minibatches=1)
    model.rollouts.collect()
    total, number = model.rollouts.info_sums["env/x"]
    assert total / number == pytest.approx(1.75)


class Native(VectorEnv):
    """A vector of its own, of arrays or of tensors, that resets in the same step and has no ``final_info``."""

    def __init__(self, num_envs, tensors):
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = Paced.observation_space, Talks.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.given = (lambda tensor: tensor.clone()) if tensors else (lambda tensor: tensor.numpy().copy())
        self.steps = torch.zeros(num_envs)

    def get_state(self):
        return {"steps": self.steps.clone()}

    def set_state(self, state):
        self.steps = state["steps"].clone()

    def reset(self, *, seed=None, options=None):
        self.steps.zero_()
        return self.given(self.steps[:, None]), {}

    def step(self, actions):
        self.steps += 1
        done = self.steps == 3
        info = {
            "final_obs": self.given(self.steps[:, None]),
            "reward_components": {"forward": self.given(self.steps)},
            "success": self.given(done & (torch.arange(self.num_envs) % 2 == 0)),
            "log": {"mean": 0.5},
        }
        reward = self.given(self.steps)
        self.steps[done] = 0
        return self.given(self.steps[:, None]), reward, self.given(done), self.given(torch.zeros_like(done)), info


@pytest.mark.parametrize("tensors", [False, True])
def test_a_vector_of_ones_own_says_as_much_in_training_and_in_evaluations(fit, tensors):
    seen = []
    model = trained(fit, seen, env=partial(Native, tensors=tensors))
    statistics = model.evaluate(4)
    assert seen[-1]["rollout/success_rate"] == statistics["eval/success_rate"] == 0.5
    assert seen[-1]["reward_components/forward"] == statistics["eval/reward_components/forward"] == 6.0
    assert seen[-1]["env/mean"] == statistics["eval/env/mean"] == 0.5


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("memory", [None, "gru"])
def test_sums_continue_in_every_kind_of_vector(fit, tmp_path, tensors, memory):
    whole, second = [], []
    options = {
        "env": partial(Native, tensors=tensors), "num_envs": 2, "num_steps": 4, "num_minibatches": 1, "total_steps": 32,
        "policy": partial(ActorCritic, rnn=memory),
    }  # fmt: skip
    trained(fit, whole, **options)
    fit(PPO(**options), max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(
        PPO(**options),
        ckpt_path=tmp_path / "half.ckpt",
        callbacks=[PPOCallback(on_iteration_end=lambda trainer, module, metrics: second.append(metrics))],
    )
    name = "reward_components/forward"
    assert [metrics[name] for metrics in whole[2:]] == [metrics[name] for metrics in second] == [6.0, 6.0]


@pytest.mark.filterwarnings("ignore:the worker process of environment")
def test_lost_workers_lose_no_sums():
    """Their episodes have ended: what they were made of counts, as do the steps before."""
    factory = EnvFactory(Talks, vectorization="async", restarts=True)
    envs = VectorEnvAdapter(factory, 2, 60.0, restarts=RestartBudget(1))
    envs.reset(0)
    envs.step(np.zeros(2, np.int64))
    envs.env.processes[0].kill()
    assert envs.step(np.zeros(2, np.int64)).truncated.all()
    sums = envs.pop_info()
    assert sums["reward/forward"] == sums["reward_components/forward"] == (2.0, 2.0)
    assert envs.info_accumulator.state() == {}
    envs.close()


class Paced(gym.Env):
    """Episodes of ``pace`` steps whose rewards tell them apart."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, pace):
        self.pace, self.told = pace, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.full(1, self.pace, np.float32), {}

    def step(self, action):
        self.steps, self.told = self.steps + 1, self.told + 1
        done, cut = self.steps == self.pace, self.steps == 4
        return np.full(1, self.steps, np.float32), 0.1 * self.told * self.pace, done, cut and not done, {}


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_two_processes_log_what_one_would_of_both_rollouts(mode):
    """Also where one has more steps than the other, since it resets less often; and of more episodes than are kept."""
    options = {
        "num_envs": 2, "num_steps": 300, "num_minibatches": 1, "update_epochs": 1, "normalize_advantage": "all_ranks",
        "total_steps": 1, "ent_coef": 0.01,
    }  # fmt: skip

    def env(num_envs, rank):
        return SyncVectorEnv([partial(Paced, 2 + 3 * rank)] * num_envs, autoreset_mode=mode)

    def run(rank):
        torch.manual_seed(0)
        kept = {}

        def keep(trainer, module, rollout):
            kept["rollout"] = rollout.exclude("policy_version").clone()
            kept["policy"] = copy.deepcopy(module.policy.state_dict())

        watch = PPOCallback(
            on_update_start=keep, on_iteration_end=lambda trainer, module, metrics: kept.update(metrics=metrics)
        )
        model = PPO(partial(env, rank=rank), **options)
        trainer = fit_in_process(model, strategy="ddp", devices=2, callbacks=[RolloutDetails(["pace"]), watch])
        kept["details"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
        episodes = model.rollouts.episodes
        kept["learnt"] = model.policy.state_dict()
        return {**kept, "window": list(episodes.ep_info_buffer), "finished": episodes.finished, "steps": episodes.steps}

    first, second = forked(run)
    both = torch.cat([first["rollout"], second["rollout"]], 1)
    one = PPO(partial(env, rank=0), **options)
    one.policy.load_state_dict(first["policy"])
    # In one process advantages of both rollouts are normalised together, where samples are.
    with torch.no_grad():
        samples = one.training_samples(both)
        if "valid" in samples:
            samples = map_samples(lambda leaf: leaf[samples["valid"]], samples)
        samples["advantage"] = normalize_advantages(samples["advantage"])
        losses = Objective(one.policy, one.loss)(samples, one.coefficients)
    table = torch.stack(list(losses.values()))[None]
    update = UpdateResult(tuple(losses), table, torch.zeros(0, 3), one.coefficients, 1, 1, False)
    finished = torch.cat([first["finished"], second["finished"]])
    episodes = EpisodeStatistics()
    episodes.finished = finished
    one.policy.load_state_dict(first["learnt"])
    with torch.no_grad():
        metrics = iteration_metrics(both, update, one.policy, episodes, 0, lambda row: row)
    for name, value in metrics.items():
        if name in first["metrics"]:
            assert first["metrics"][name] == second["metrics"][name], name
            assert first["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    counted = both[both["valid"]].double()
    expected = {
        "obs_raw_mean/pace": counted["observation"].mean(),
        "obs_raw_std/pace": counted["observation"].std(correction=0),
        "obs_raw/max": counted["observation"].max(),
        "obs_raw/min": counted["observation"].min(),
        "advantage/std": counted["advantage"].std(correction=0),
        "returns/mean": counted["value_target"].mean(),
    }
    for name, value in expected.items():
        assert first["details"][name] == second["details"][name] == pytest.approx(value.item()), name
    order = torch.cat([first["steps"], second["steps"]]).argsort(stable=True)
    last = finished[order][-100:]
    assert len(last) == 100 < min(len(first["finished"]), len(second["finished"]))
    assert repr(first["window"]) == repr(second["window"])
    assert_close(torch.tensor(first["window"], dtype=torch.float64), last, equal_nan=True)
    assert first["metrics"]["rollout/ep_rew_mean"] == pytest.approx(last[:, 0].mean().item())


@pytest.mark.parametrize("compile", [False, True])
def test_norms_are_those_of_the_halves_of_the_gradient(fit, compile):
    torch.manual_seed(0)
    seen, rollouts = [], []

    class Watches(PPOCallback):
        def on_update_start(self, trainer, pl_module, rollout):
            rollouts.append(pl_module.training_samples(rollout))
            policy, samples = pl_module.policy, dict(rollouts[-1])
            samples["advantage"] = normalize_advantages(samples["advantage"])
            losses = Objective(policy, pl_module.loss)(samples, pl_module.coefficients)
            gradients = torch.autograd.grad(losses["loss"], list(policy.parameters()))
            network = policy.network
            for name, own in {"actor": (network.actor_trunk, network.action_head), "critic": ()}.items():
                ids = {id(p) for part in own for p in part.parameters()}
                chosen = [
                    g
                    for p, g in zip(policy.parameters(), gradients, strict=True)
                    if (id(p) in ids) == (name == "actor")
                ]
                expected.setdefault(name, []).append(torch.cat([g.flatten() for g in chosen]).norm().item())

        def on_iteration_end(self, trainer, pl_module, metrics):
            seen.append(metrics)

    expected = {}
    model = PPO(**{**SMALL, "num_minibatches": 1, "update_epochs": 1, "total_steps": 64}, compile=compile)
    fit(model, callbacks=[Watches()])
    assert seen[0]["train/actor_grad_norm"] == pytest.approx(expected["actor"][0], rel=1e-4)
    assert seen[0]["train/critic_grad_norm"] == pytest.approx(expected["critic"][0], rel=1e-4)
    both = seen[0]["train/actor_grad_norm"] ** 2 + seen[0]["train/critic_grad_norm"] ** 2
    assert seen[0]["train/grad_norm"] == pytest.approx(both**0.5, rel=1e-4)


def test_a_shared_trunk_belongs_to_both_halves():
    halves = PPO(**SMALL, policy=partial(ActorCritic, shared=True)).policy.actor_critic_masks
    assert halves.sum(0).max() == 2
    assert halves.sum(0).min() == 1
    apart = PPO(**SMALL).policy.actor_critic_masks
    assert (apart.sum(0) == 1).all()


def test_rollout_statistics_are_those_of_the_rollout(fit):
    rollouts, seen = [], []

    class Watches(PPOCallback):
        def on_update_end(self, trainer, pl_module, update):
            updates.append(update)

        def on_rollout_end(self, trainer, pl_module, rollout):
            rollouts.append(rollout.clone())

        def on_iteration_end(self, trainer, pl_module, metrics):
            seen.append(metrics)

    updates = []
    model = PPO("Pendulum-v1", num_envs=3, num_steps=250, total_steps=1500, target_kl=1e-5)
    fit(model, callbacks=[Watches()])
    for rollout, metrics, update in zip(rollouts, seen, updates, strict=True):
        reward = rollout["reward"].double()
        assert metrics["rollout/reward_mean"] == pytest.approx(reward.mean().item())
        assert metrics["rollout/reward_std"] == pytest.approx(reward.std(correction=0).item())
        assert metrics["rollout/reward_min"] == reward.min().item()
        assert metrics["rollout/reward_max"] == reward.max().item()
        assert metrics["rollout/value_mean"] == pytest.approx(rollout["state_value"].mean().item(), rel=1e-5, abs=1e-6)
        assert metrics["rollout/truncated"] == rollout["truncated"].sum() == metrics["rollout/episodes"]
        assert metrics["rollout/terminated"] == 0
        assert metrics["train/early_stopped"] == update.stopped == (len(update.grad_norms) < len(update.losses))
        assert metrics["train/old_approx_kl"] == pytest.approx(update.column("old_approx_kl").mean().item())
        assert metrics["time/iteration"] >= metrics["time/collect"] + metrics["time/update"]
    assert updates[0].stopped
    returns = [episode[0] for episode in model.rollouts.episodes.ep_info_buffer]
    assert seen[-1]["rollout/ep_rew_min"] == min(returns) < np.mean(returns) < max(returns)
    assert seen[-1]["rollout/ep_rew_max"] == max(returns)
    assert seen[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(returns))


def test_events_come_in_order_to_methods_and_functions(fit):
    told = []
    functions = {event: lambda *given, event=event: told.append((event, len(given))) for event in EVENTS}
    fit(PPO(**{**SMALL, "total_steps": 128}), callbacks=[PPOCallback(**functions)])
    once = [
        ("on_iteration_start", 2),
        ("on_rollout_start", 2),
        ("on_rollout_end", 3),
        ("on_update_start", 3),
        ("on_update_end", 3),
        ("on_iteration_end", 3),
    ]
    assert told == 2 * once
    assert sorted(EVENTS) == sorted(name for name, _ in once)


def test_what_a_callback_raises_ends_the_run(fit):
    def fails(trainer, module, rollout):
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        fit(PPO(**SMALL), callbacks=[PPOCallback(on_update_start=fails)])
    with pytest.raises(TypeError, match="on_rollout"):
        PPOCallback(on_rollout=fails)


def test_a_rollout_may_be_changed_before_it_is_learnt_from(fit):
    def nothing_to_learn(trainer, module, rollout):
        rollout["advantage"].zero_()
        rollout["value_target"].copy_(rollout["state_value"])

    torch.manual_seed(0)
    model = PPO(**SMALL)
    before = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
    fit(model, callbacks=[PPOCallback(on_update_start=nothing_to_learn)])
    after = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
    assert_close(after, before, atol=5e-4, rtol=0)  # what is learnt from the rollout as it was moves some by 1e-2


SYSTEMS = {
    "sb3": """rollout/ep_len_mean rollout/ep_rew_mean rollout/success_rate time/fps time/iterations time/total_timesteps
        time/time_elapsed train/approx_kl train/clip_fraction train/clip_range train/clip_range_vf train/entropy_loss
        train/explained_variance train/learning_rate train/loss train/n_updates train/policy_gradient_loss train/std
        train/value_loss eval/mean_reward eval/mean_ep_length eval/success_rate""",
    "cleanrl": """charts/episodic_return charts/episodic_length charts/SPS charts/learning_rate losses/value_loss
        losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac
        losses/explained_variance""",
    "leanrl": """charts/SPS charts/learning_rate charts/terminated_count charts/truncated_count charts/eval_time
        losses/value_loss losses/policy_loss losses/entropy losses/approx_kl losses/old_approx_kl losses/clipfrac
        losses/explained_variance losses/grad_norm rollout/ep_return_mean rollout/rewards_mean rollout/rewards_max
        reward/forward reward/success_count reward/fail_count obs_raw/mean_avg obs_raw/std_avg obs_raw/min obs_raw/max
        obs_rms_mean/height obs_rms_std/height reward_norm/return_rms_var reward_norm/return_rms_std
        reward_norm/return_rms_mean reward_norm/return_rms_count reward_norm/normalized_reward_mean
        reward_norm/normalized_reward_std popart/mu popart/sigma rollout/success_rate rollout/fail_rate
        rollout/episode_len eval/return eval/success_rate eval/fail_rate eval/episode_len eval_reward/forward
        global_step""",
    "apexrl": """train/policy_loss train/value_loss train/entropy_loss train/approx_kl train/learning_rate
        episode/mean_reward episode/mean_length rollout/mean_reward rollout/mean_value env/height eval/mean_reward
        eval/std_reward eval/min_reward eval/max_reward time/fps train/clip_fraction train/actor_grad_norm
        train/critic_grad_norm train/total_grad_norm train/early_stopped rollout/completed_episodes
        reward_components/forward advantage/mean advantage/std value/mean value/std returns/mean returns/std""",
    "pufferlib": """SPS agent_steps uptime epoch learning_rate environment/episode_return environment/episode_length
        environment/success_rate environment/height losses/policy_loss losses/value_loss losses/entropy
        losses/old_approx_kl losses/approx_kl losses/clipfrac losses/explained_variance performance/eval
        performance/train""",
    "embodichain": """train/actor_loss train/value_loss train/entropy train/learning_rate charts/SPS
        charts/episode_reward_avg_100 charts/episode_length_avg_100 rewards/forward metrics/height eval/avg_reward
        eval/avg_length eval/success_rate eval/metrics/height""",
}
"""What each system's users look for."""

SAME = {
    "rollout/ep_rew_mean": "charts/episodic_return rollout/ep_return_mean episode/mean_reward environment/episode_return "
    "charts/episode_reward_avg_100",
    "rollout/ep_len_mean": "charts/episodic_length rollout/episode_len episode/mean_length environment/episode_length "
    "charts/episode_length_avg_100",
    "rollout/success_rate": "environment/success_rate",
    "rollout/reward_mean": "rollout/rewards_mean rollout/mean_reward",
    "rollout/reward_max": "rollout/rewards_max",
    "rollout/value_mean": "rollout/mean_value",
    "rollout/episodes": "rollout/completed_episodes",
    "rollout/terminated": "charts/terminated_count",
    "rollout/truncated": "charts/truncated_count",
    "rollout/successes": "reward/success_count",
    "rollout/failures": "reward/fail_count",
    "reward/forward": "rewards/forward",
    "env/height": "environment/height metrics/height",
    "time/fps": "charts/SPS SPS",
    "time/total_timesteps": "global_step agent_steps",
    "time/iterations": "epoch",
    "time/time_elapsed": "uptime",
    "time/evaluate": "charts/eval_time",
    "time/collect": "performance/eval",
    "time/update": "performance/train",
    "train/policy_gradient_loss": "losses/policy_loss train/policy_loss train/actor_loss",
    "train/approx_kl": "losses/approx_kl",
    "train/old_approx_kl": "losses/old_approx_kl",
    "train/clip_fraction": "losses/clipfrac",
    "train/explained_variance": "losses/explained_variance",
    "train/grad_norm": "losses/grad_norm train/total_grad_norm",
    "train/learning_rate": "charts/learning_rate learning_rate",
}
"""Our name, and the names that other systems have for the same number."""

THEIRS = {theirs: ours for ours, names in SAME.items() for theirs in names.split()}


class Reaches(Talks):
    """As Talks, by actions that have a spread."""

    action_space = Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize("system", TABLES)
def test_loggers_receive_a_systems_names_and_monitors_keep_ours(fit, tmp_path, system):
    seen = []
    torch.manual_seed(0)
    model = PPO(
        Reaches, num_envs=4, num_steps=16, total_steps=64 * 6, metric_names=system, eval_interval=2, num_eval_episodes=2,
        target_kl=10.0, clip_range_vf=0.2, normalize_observation=True, normalize_reward=True, popart={"beta": 1e-3},
    )  # fmt: skip
    logger = CSVLogger(tmp_path)
    trainer = fit(
        model,
        logger=logger,
        limit_val_batches=1,
        callbacks=[
            RolloutDetails(["height"]),
            PPOCallback(on_iteration_end=lambda trainer, module, metrics: seen.append(metrics)),
        ],
    )
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert set(SYSTEMS[system].split()) <= rows[0].keys()
    last = next(row for row in reversed(rows) if any(name.endswith("value_loss") and row[name] for name in row))
    last = {name: float(value) for name, value in last.items() if value}
    ours = seen[-1]
    steps = last.pop("step")
    assert steps == model.num_env_steps
    for name, value in from_names(last, system).items():
        assert value == pytest.approx(ours[name], rel=1e-6, nan_ok=True), name
    for name in last.keys() & THEIRS.keys():
        assert last[name] == pytest.approx(ours[THEIRS[name]], rel=1e-6), name
    scale = {"sb3": 1.0, "embodichain": 1.0}.get(system, 0.5)
    name = next(name for name in last if name.endswith("value_loss"))
    assert last[name] == pytest.approx(scale * ours["train/value_loss"])
    name, sign = ("train/entropy_loss", -1) if system in ("sb3", "apexrl") else ("entropy", 1)
    entropy = next(value for other, value in last.items() if other.endswith(name))
    assert entropy == pytest.approx(sign * abs(ours["train/entropy_loss"]))
    assert "rollout/ep_rew_mean" in trainer.callback_metrics
    assert "eval/mean_reward" in trainer.callback_metrics
    expected = {"leanrl": "eval/return", "embodichain": "eval/avg_reward"}.get(system, "eval/mean_reward")
    evaluated = next({expected: float(row[expected])} for row in reversed(rows) if row[expected])
    assert evaluated[expected] == pytest.approx(float(trainer.callback_metrics["eval/mean_reward"]), rel=1e-6)


@pytest.mark.parametrize("system", TABLES)
def test_names_can_be_translated_back(system):
    ours = [name for table in TABLES.values() for name in table if not name.endswith("/")]
    metrics = dict.fromkeys([*ours, "env/a", "reward/b", "eval/env/c", "eval/reward/d", "train/std"], 2.0)
    named = to_names(metrics, system)
    assert len(named) == len(metrics)
    assert from_names(named, system) == metrics


@pytest.mark.parametrize("system", TABLES)
def test_counts_stay_whole_numbers(system):
    counts = {"time/iterations": 3, "time/total_timesteps": 2**53 + 1, "train/skipped_steps": 2}
    named = to_names(counts, system)
    assert [type(value) for value in named.values()] == [int] * 3
    assert from_names(named, system) == counts


def test_what_an_environment_says_takes_no_other_numbers_place():
    metrics = {
        "rollout/ep_rew_mean": 1.0,
        "env/episode_return": 2.0,
        "reward/x": 3.0,
        "env/reward/x": 4.0,
        "env/y": 5.0,
    }
    named = to_names(metrics, "pufferlib")
    assert named == {
        "environment/episode_return": 1.0,
        "env/episode_return": 2.0,
        "environment/reward/x": 3.0,
        "env/reward/x": 4.0,
        "environment/y": 5.0,
    }
    assert from_names(named, "pufferlib") == metrics


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"metric_names must be one of .*sb3.* got 'rllib'"):
        PPO(**SMALL, metric_names="rllib")


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"--model.{name}={value}" for name, value in SMALL.items()]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main(["fit", *words, *quiet, "--model.metric_names", "pufferlib", "--model.info_keys", "[power]"])
    header = next(tmp_path.glob("lightning_logs/version_0/metrics.csv")).read_text().partition("\n")[0]
    assert {"agent_steps", "losses/clipfrac"} <= set(header.split(","))


def test_details_are_those_of_the_rollout(fit):
    rollouts, seen = [], []

    class Watches(PPOCallback):
        def on_update_start(self, trainer, pl_module, rollout):
            rollouts.append(
                (rollout.clone(), pl_module.policy.moments.mean.clone(), pl_module.reward_normalizer(rollout["reward"]))
            )

        def on_iteration_end(self, trainer, pl_module, metrics):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    options = {"normalize_observation": True, "normalize_reward": True, "popart": {"beta": 1e-3}}
    model = PPO("Pendulum-v1", num_envs=3, num_steps=64, total_steps=384, **options)
    fit(model, callbacks=[RolloutDetails(["cos", "sin", "speed"]), Watches()])
    for (rollout, running, scaled), metrics in zip(rollouts, seen, strict=True):
        observation = rollout["observation"].flatten(0, 1).double()
        for index, name in enumerate(("cos", "sin", "speed")):
            assert metrics[f"obs_raw_mean/{name}"] == pytest.approx(observation[:, index].mean().item())
            assert metrics[f"obs_raw_std/{name}"] == pytest.approx(observation[:, index].std(correction=0).item())
            assert metrics[f"obs_rms_mean/{name}"] == running[index].item()
        assert metrics["obs_raw/mean_avg"] == pytest.approx(observation.mean().item())
        assert metrics["obs_raw/max"] == observation.max().item()
        assert metrics["obs_raw/min"] == observation.min().item()
        for name, key in {"advantage": "advantage", "value": "state_value", "returns": "value_target"}.items():
            assert metrics[f"{name}/mean"] == pytest.approx(rollout[key].double().mean().item())
            assert metrics[f"{name}/std"] == pytest.approx(rollout[key].double().std(correction=0).item())
        assert metrics["reward_norm/normalized_reward_mean"] == pytest.approx(scaled.double().mean().item())
        epochs = [metrics[f"train/clip_fraction_epoch_{epoch}"] for epoch in range(1, 5)]
        assert np.mean(epochs) == pytest.approx(metrics["train/clip_fraction"])
        assert metrics["popart/sigma"] > 0
    assert metrics["obs_normalized/std_avg"] < 10
    assert metrics["reward_norm/return_rms_count"] == 384
    assert metrics["reward_norm/return_rms_std"] == pytest.approx(metrics["reward_norm/return_rms_var"] ** 0.5)


def test_details_want_a_name_for_each_number(fit):
    for names, count in (["angle"], 1), (["angle", "speed", "angle", "place"], 3):
        with pytest.raises(InputError, match=f"{count} different observation_names, observations have 4 dimensions"):
            fit(PPO(**SMALL), callbacks=[RolloutDetails(names)])
