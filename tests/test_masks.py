"""Masks: every way to give them, exactly nothing for what is forbidden, errors that name the environment."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from probes import Lock, Recall, Spaces
from torch.testing import assert_close

from ppo_lightning import PPO, EnvironmentFault, InputError

SMALL = {"num_envs": 3, "num_steps": 16, "total_steps": 96}


class Base(gym.Env):
    """Episodes of three steps; action ``step % 4`` alone is allowed. Terminal states allow nothing."""

    careless = False

    def __init__(self) -> None:
        self.observation_space = Box(0, 4, (1,), np.float32)
        self.action_space = Discrete(4)

    def mask(self) -> np.ndarray:
        return (np.arange(4) == self.steps % 4).astype(np.int8) * (self.steps < 3)

    def see(self):
        return np.array([self.steps], np.float32)

    def info(self):
        return {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), self.info()

    def step(self, action):
        assert action == self.steps % 4 or self.careless, "a masked action was taken"
        self.steps += 1
        return self.see(), 1.0, self.steps == 3, False, self.info()


class InInfo(Base):
    def info(self):
        return {"action_mask": self.mask()}


class InObservation(Base):
    """PettingZoo's convention."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = Dict({"observation": self.observation_space, "action_mask": MultiBinary(4)})

    def see(self):
        return {"observation": super().see(), "action_mask": self.mask()}


class ByMethod(Base):
    """sb3-contrib's convention."""

    def action_masks(self):
        return self.mask().astype(bool)


class AsList(Base):
    def info(self):
        return {"action_mask": self.mask().tolist()}


class Broken(InInfo):
    """Does one thing wrong."""

    careless = True

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def info(self):
        mask = self.mask()
        match self.fault, self.steps:
            case "long", _:
                mask = np.ones(5, np.int8)
            case "nothing", 2:
                mask = np.zeros(4, np.int8)
            case "missing", 2:
                return {}
            case "late", 0:
                return {}
        return {"action_mask": mask}


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("env", [InInfo, InObservation, ByMethod, AsList])
def test_every_convention_in_every_autoreset_mode(fit, env, mode):
    """The environment itself asserts that nothing else was done, in training and in evaluation."""
    from ppo_lightning.envs.checked import CheckedEnv

    make = lambda num_envs: SyncVectorEnv(  # noqa: E731
        [lambda index=index: CheckedEnv(env(), index) for index in range(num_envs)], autoreset_mode=AutoresetMode(mode)
    )
    batches = []

    class Kept(PPO):
        def on_train_batch_start(self, batch, batch_idx):
            batches.append(batch.clone())
            super().on_train_batch_start(batch, batch_idx)

    model = Kept(make, **SMALL)
    fit(model, limit_val_batches=1)
    for batch in batches:
        valid = batch["valid"]
        assert (batch["action_mask"][valid].sum(-1) == 1).all()
        assert_close(batch["action_log_prob"][valid], torch.zeros(int(valid.sum())))  # certain: nothing else is allowed
    for deterministic in (True, False):
        assert model.evaluate(num_episodes=4, deterministic=deterministic)["eval/mean_reward"] == 3


def test_the_observations_mask_is_not_the_networks_to_see():
    model = PPO(InObservation, **SMALL)
    assert list(model.policy.encoders) == ["observation"]
    observation, _ = InObservation().reset(seed=0)
    assert model.predict(observation) == 0
    batch = {"observation": np.zeros((2, 1), np.float32), "action_mask": np.eye(4, dtype=np.int8)[[2, 3]]}
    assert model.predict(batch, deterministic=False).tolist() == [2, 3]


def test_predict_takes_a_mask():
    model = PPO(InInfo, **SMALL)
    for action in range(4):
        mask = np.arange(4) == action
        assert model.predict(np.zeros(1, np.float32), action_mask=mask, deterministic=False) == action
    with pytest.raises(InputError, match="has 3 entries"):
        model.predict(np.zeros(1, np.float32), action_mask=np.ones(3))
    with pytest.raises(InputError, match="allows no action"):
        model.predict(np.zeros(1, np.float32), action_mask=np.zeros(4))


@pytest.mark.parametrize("numbers", [[2, 2], [2, 3]])
def test_predict_takes_the_mask_of_each_choice_as_environments_give_it(numbers):
    mask = ([1, 0], [0, *[1] * (numbers[1] - 1)])

    class Choices(InInfo):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = MultiDiscrete(numbers)

        def info(self):
            return {"action_mask": mask}

        def step(self, action):
            return super().step(self.steps % 4)

    actions = rollout_of(Choices)["action"]
    assert (actions[..., 0] == 0).all()
    assert (actions[..., 1] > 0).all()
    model = PPO(Choices, **SMALL)
    for deterministic in (True, False):
        action = model.predict(np.zeros(1, np.float32), deterministic, action_mask=mask)
        assert action[0] == 0 < action[1]


def test_predict_refuses_masks_of_as_many_numbers_in_other_rows():
    model, observations = PPO(InInfo, **SMALL), np.zeros((2, 1), np.float32)
    for mask in (np.ones((4, 2)), np.ones(8), np.ones((1, 8))):
        with pytest.raises(InputError, match=r"for each of 2 observations|has 8 entries"):
            model.predict(observations, action_mask=mask)
    assert model.predict(observations[:0], action_mask=np.ones((0, 4), bool)).shape == (0,)
    assert model.predict(observations[:1], action_mask=np.arange(4) == 2).tolist() == [2]


def test_async_workers_give_masks_too():
    vector = AsyncVectorEnv([InInfo] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    model = PPO(vector, **{**SMALL, "num_envs": 2})
    batch = model.rollouts.collect()
    assert (batch["action_mask"].sum(-1) == 1).all()
    vector.close()


class Parts(Spaces):
    """A mask in the parts of a Dict action, in info or in the observation."""

    def __init__(self, observed: bool, as_lists: bool = False) -> None:
        super().__init__("flat", "dict", masked=True)
        self.observed, self.as_lists = observed, as_lists
        if observed:
            masks = Dict({"tool": MultiBinary(3), "bits": MultiBinary(4)})
            self.observation_space = Dict({"state": self.observation_space, "action_mask": masks})

    def _see(self):
        space, self.observation_space = self.observation_space, Box(-1.0, 1.0, (3,), np.float32)
        state, info = super()._see()
        self.observation_space = space
        flat = info["action_mask"].astype(np.int8)
        parts = {"bits": flat[:4], "tool": flat[4:]}
        if self.as_lists:
            parts = {name: part.tolist() for name, part in parts.items()}
        return ({"state": state, "action_mask": parts}, {}) if self.observed else (state, {"action_mask": parts})


@pytest.mark.parametrize(("observed", "as_lists"), [(False, False), (True, False), (False, True)])
def test_a_dict_of_masks_fits_a_dict_of_actions(fit, observed, as_lists):
    model = PPO(partial(Parts, observed, as_lists), **SMALL)
    fit(model)
    assert model.rollouts.collect()["action_mask"].shape == (16, 3, 7)


@pytest.mark.parametrize(
    ("space", "length", "needed"),
    [
        (Discrete(4), 3, "needs 4"),
        (MultiDiscrete([2, 3]), 6, "needs 5"),
        (MultiBinary(3), 3, "needs 6"),
        (Box(-1, 1, (2,)), 2, "needs none"),
    ],
)
def test_a_mask_of_the_wrong_length_is_refused_at_construction(space, length, needed):
    class Wrong(InObservation):
        def __init__(self):
            super().__init__()
            self.action_space = space
            self.observation_space["action_mask"] = MultiBinary(length)

    with pytest.raises(InputError, match=f"{length} entries.*{needed}"):
        PPO(Wrong, **SMALL)


def test_nothing_but_a_mask_is_no_observation():
    class Wrong(InObservation):
        def __init__(self):
            super().__init__()
            self.observation_space = Dict({"action_mask": MultiBinary(4)})

    with pytest.raises(InputError, match="nothing but action_mask"):
        PPO(Wrong, **SMALL)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("long", InputError, "has 5 entries.*needs 4"),
        ("nothing", EnvironmentFault, r"environment \[0, 1, 2\] of Broken allows no action"),
        ("missing", EnvironmentFault, r"environment \[0, 1, 2\] of Broken gave no info\['action_mask'\] in step"),
        ("late", EnvironmentFault, "Broken gives info.* in step but not in reset"),
    ],
)
def test_a_broken_mask_is_one_sentence_that_names_the_environment(fault, kind, message):
    env = partial(Broken, fault)
    with pytest.raises(kind, match=message):
        PPO(env, **SMALL).rollouts.collect()


def additive(mask):
    return np.where(mask, 0.0, -np.inf)


def shifted(mask):
    return np.asarray(mask) * 2


WRONG = {
    "additive": additive,
    "additive of float32": lambda mask: np.where(mask, np.float32(0), np.float32(-1e9)),
    "of NaN": lambda mask: np.where(mask, 1.0, np.nan),
    "of 2": shifted,
    "of -1": lambda mask: np.where(mask, 1, -1),
    "of probabilities": lambda mask: np.where(mask, 0.5, 0.0),
    "of texts": lambda mask: [str(bool(one)) for one in mask],
    "of bytes 0 and 255": lambda mask: np.where(mask, 255, 0).astype(np.uint8),
    "of None": lambda mask: [True if one else None for one in mask],
}


class Mistaken(InInfo):
    """Environment 1 says what is allowed in its own way."""

    careless = True
    change = staticmethod(additive)
    place = "info"

    def reset(self, *, seed=None, options=None):
        self.wrong = getattr(self, "wrong", False) if seed is None else seed % 3 == 1
        return super().reset(seed=seed)

    def info(self):
        if self.place != "info":
            return {}
        return {"action_mask": self.change(self.mask()) if self.wrong else self.mask()}


def rollout_of(env, **options):
    model = PPO(env, **{**SMALL, **options})
    model.seed = 0
    while model.environment_seed() % 3:
        model.seed += 1
    try:
        return model.rollouts.collect()
    finally:
        model.close_environments()


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("mode", ["ours", "async", *AutoresetMode])
def test_what_is_no_mask_is_refused_with_the_environments_number(kind, mode):
    class Wrong(Mistaken):
        change = staticmethod(WRONG[kind])

    if mode == "async":
        if kind not in ("additive", "of texts"):
            pytest.skip("worker processes are slow to start")
        env, options = Wrong, {"vectorization": "async", "num_envs": 2}
    else:
        options = {}
        env = Wrong if mode == "ours" else lambda num_envs: SyncVectorEnv([Wrong] * num_envs, autoreset_mode=mode)
    with pytest.raises(
        EnvironmentFault, match=r"environment 1 of .* gave an action_mask in reset .*a mask has 1 or True"
    ):
        rollout_of(env, **options)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_mask_is_refused_by_method_and_in_observations(kind):
    class Method(Mistaken):
        place = "method"

        def action_masks(self):
            return WRONG[kind](self.mask()) if self.wrong else self.mask()

    with pytest.raises(EnvironmentFault, match=r"environment 1 of .* gave an action_mask in reset"):
        rollout_of(Method)

    class Observed(Mistaken):
        place = "observation"

        def __init__(self):
            super().__init__()
            bounds = Box(-np.inf, np.inf, (4,), np.float64)
            self.observation_space = Dict({"observation": self.observation_space, "action_mask": bounds})

        def see(self):
            mask = self.mask()
            given = np.asarray(WRONG[kind](mask) if self.wrong else mask)
            return {"observation": super().see(), "action_mask": given.astype(np.float64)}

    if "texts" not in kind and "None" not in kind:
        with pytest.raises(EnvironmentFault, match=r"environment 1 of .* gave an action_mask in reset"):
            rollout_of(Observed)


def test_what_is_no_mask_is_refused_in_steps_and_in_parts():
    class Later(Mistaken):
        def info(self):
            return {"action_mask": additive(self.mask()) if self.wrong and self.steps == 2 else self.mask()}

    with pytest.raises(EnvironmentFault, match=r"environment 1 of .* gave an action_mask in step with .*(inf|0\.0)"):
        rollout_of(Later)

    class Apart(Parts):
        def _see(self):
            state, info = super()._see()
            return state, {"action_mask": {key: additive(part) for key, part in info["action_mask"].items()}}

    with pytest.raises(EnvironmentFault, match=r"environment 0 of .* gave an action_mask in reset"):
        rollout_of(partial(Apart, False))


@pytest.mark.parametrize("kind", WRONG)
def test_predict_refuses_what_is_no_mask(kind):
    model = PPO(InInfo, **SMALL)
    mask, observation = np.arange(4) == 2, np.zeros((2, 1), np.float32)
    with pytest.raises(InputError, match=r"given to predict has .*a mask has 1 or True"):
        model.predict(observation[0], action_mask=WRONG[kind](mask))
    with pytest.raises(InputError, match=r"given to predict has .*a mask has 1 or True"):
        model.predict(observation, action_mask=[mask.tolist(), list(WRONG[kind](mask))])


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float32, np.float64, object])
def test_a_mask_of_0_and_1_may_have_any_dtype(dtype):
    class Other(InInfo):
        def info(self):
            return {"action_mask": self.mask().astype(dtype)}

    assert (rollout_of(Other)["action_mask"].sum(-1) == 1).all()
    mask = (np.arange(4) == 2).astype(dtype)
    model = PPO(InInfo, **SMALL)
    assert model.predict(np.zeros(1, np.float32), action_mask=mask) == 2
    assert model.predict(np.zeros(1, np.float32), action_mask=mask.tolist()) == 2


def test_predict_without_a_mask_says_once_that_the_policy_was_trained_with_masks(fit, tmp_path, recwarn):
    observation = np.zeros(1, np.float32)
    model = PPO(InInfo, **SMALL)
    model.predict(observation)
    fit(model).save_checkpoint(tmp_path / "masked.ckpt")
    for trained in (model, PPO.load_from_checkpoint(tmp_path / "masked.ckpt", env=InInfo)):
        trained.predict(observation, action_mask=[1, 1, 0, 0])
        with pytest.warns(UserWarning, match="predict got no action_mask, though the policy was trained with masks"):
            trained.predict(observation)
        trained.predict(observation)  # else a warning, which is an error in the tests
    fit(PPO(InObservation, **SMALL)).save_checkpoint(tmp_path / "observed.ckpt")
    seen, _ = InObservation().reset(seed=0)
    PPO.load_from_checkpoint(tmp_path / "observed.ckpt", env=InObservation).predict(seen)


def test_the_mask_is_kept_in_the_update(fit):
    """Were it not, the ratio of the first minibatch would not be 1, and an entropy would count forbidden actions."""
    entropies = []

    class Checked(PPO):
        def update(self, batch):
            log_prob, entropy, _ = self.policy.evaluate_actions(self.training_samples(batch))
            assert_close(log_prob, batch["action_log_prob"].flatten(), atol=1e-6, rtol=0)
            entropies.append((entropy, batch["action_mask"].flatten(0, 1).sum(-1)))
            return super().update(batch)

    fit(Checked(partial(Lock, n=20, locks=3), **SMALL))
    for entropy, allowed in entropies:
        assert (entropy <= allowed.float().log() + 1e-5).all()
        assert (entropy > 0).all()


def test_probes_keep_their_word():
    env = Lock(n=20, locks=2, masked=False)
    env.reset(seed=0)
    assert env.step(env.right[0])[1] == 1.0
    assert env.step(1 - env.right[1] if env.right[1] < 2 else 0)[2]
    assert Lock().allowed.mean() == pytest.approx(0.1)
    env = Recall(masked=True)
    assert "action_mask" in env.reset(seed=0)[1]
