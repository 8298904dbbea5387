"""``forward`` and ``Trainer.predict``: raw observations as tensors, actions as the environment takes them."""

from functools import partial

import gymnasium
import lightning
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from probes import Spaces
from test_grid import SAMPLE, make, tensors_of
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.spaces import action_dims

OBSERVATIONS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    lightning.seed_everything(1, verbose=False)
    return PPO("Pendulum-v1", num_envs=2, num_steps=8, total_steps=16, num_minibatches=2)


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: "-".join(map(str, cell)))
def test_forward_on_tensors_is_predict_on_arrays(cell):
    """Over every space, mask, recurrent layer and distribution; with the state of the step before."""
    model = make(cell)
    space, dims = model.observation_space, action_dims(model.action_space)
    space.seed(0)
    rng = np.random.default_rng(0)
    batch = gymnasium.vector.utils.concatenate(
        space, [space.sample() for _ in range(5)], gymnasium.vector.utils.create_empty_array(space, 5)
    )
    mask = None
    if cell[1]:
        mask = np.concatenate([rng.permuted(np.tile(np.arange(size) > 0, (5, 1)), axis=1) for size in dims], 1)
    state = None
    for _ in range(2):
        expected = model.predict(batch, action_mask=mask, state=state)
        tensors = None if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            found = model(tensors_of(batch), None if state is None else torch.from_numpy(state), tensors)
        assert_close(tensors_of(found), tensors_of(expected), rtol=0, atol=0)
        state = expected[1] if cell[2] else None


def test_noise_draws_the_actions_that_predict_draws(model):
    torch.manual_seed(3)
    expected = model.predict(OBSERVATIONS.numpy(), deterministic=False)
    noise = model.policy.distribution.noise(10, generator=torch.Generator().manual_seed(3))
    assert_close(model(OBSERVATIONS, noise=noise).detach(), torch.from_numpy(expected))


def test_forward_has_gradients(model):
    model(OBSERVATIONS).sum().backward()
    assert model.policy.network.action_head.mean.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loader", [DataLoader(TensorDataset(OBSERVATIONS), batch_size=4), DataLoader(OBSERVATIONS, 4)])
def test_trainer_predict_takes_any_loader_of_observations(model, loader, tmp_path):
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False, logger=False)
    found = torch.cat(trainer.predict(model, loader))
    assert_close(found, torch.from_numpy(model.predict(OBSERVATIONS.numpy())))
    with pytest.raises(InputError, match=r"Trainer\.predict\(model, loader\)"):
        trainer.predict(model)
    assert not list(tmp_path.iterdir())


def test_a_mask_in_the_observation_is_read_from_there_by_parts_too():
    class InObservation(Spaces):
        """A mask beside what is seen, in the parts of the action space."""

        def __init__(self) -> None:
            super().__init__("flat", "dict", False)
            inner = Dict({"kind": Box(0, 1, (3,), np.int8)})
            self.observation_space = Dict({"seen": Box(-1, 1, (2,), np.float32), "action_mask": inner})
            self.action_space = Dict({"kind": Discrete(3), "push": Box(-1, 1, (1,), np.float32)})

        def reset(self, *, seed=None, options=None):
            return {"seen": np.zeros(2, np.float32), "action_mask": {"kind": np.ones(3, np.int8)}}, {}

    model = PPO(InObservation, num_envs=2, num_steps=8, num_minibatches=2)
    for allowed in range(3):
        mask = {"kind": torch.eye(3, dtype=torch.int8)[[allowed]].expand(4, -1)}
        assert (model({"seen": torch.randn(4, 2), "action_mask": mask})["kind"] == allowed).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), r"forward needs a batch of observations \('B', 3\), got \(3,\)"),
        ((torch.zeros(2, 4),), r"forward needs a batch of observations \('B', 3\), got \(2, 4\)"),
        (({"a": torch.zeros(2, 3)},), r"forward needs tensors of Box\(.*\), batched, got dict$"),
        ((np.zeros((2, 3), np.float32),), "batched, got ndarray$"),
        ((torch.zeros(2, 3), torch.zeros(2, 8)), "was given a state, this policy is not recurrent"),
        ((torch.zeros(2, 3), None, torch.ones(2, 3, dtype=torch.bool)), "action_mask has 3 entries"),
        (
            (torch.zeros(2, 3), None, torch.tensor([[0.0, -torch.inf]] * 2)),
            r"float32 \(what is added to logits, 0 and -inf",
        ),
        ((torch.zeros(2, 3), None, torch.ones(3, dtype=torch.bool)), r"with 2 rows of bools or integers, got \(3,\)"),
        (
            (torch.zeros(2, 3), None, torch.ones(1, 3, dtype=torch.bool)),
            r"with 2 rows of bools or integers, got \(1, 3\)",
        ),
        ((torch.zeros(2, 3), None, np.ones((2, 3), bool)), "bools or integers, got ndarray"),
        ((torch.zeros(2, 3), None, None, torch.zeros(2, 99)), r"forward needs noise of \(2, \d\), got \(2, 99\)"),
    ],
)
def test_forward_refuses_what_does_not_fit(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model(*arguments)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_predict_refuses_states_that_are_not_its_own(cell):
    model = PPO("CartPole-v1", num_envs=4, policy=partial(ActorCritic, rnn=cell, rnn_size=4))
    size, observations = model.policy.state_size, np.zeros((2, 4), np.float32)
    for state in (np.zeros((size, 2)), np.zeros(2 * size), np.zeros((2, 1, size)), "x"):
        with pytest.raises(
            InputError, match=rf"predict needs a state of \(2, {size}\), got .*: pass on what it returned"
        ):
            model.predict(observations, state=state)
    with pytest.raises(InputError, match="a state of finite numbers"):
        model.predict(observations[0], state=np.full(size, np.nan))
    action, state = model.predict(observations[:0])
    assert (action.shape, state.shape) == ((0,), (0, size))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_predict_acts_as_the_checkpoint_does_whatever_the_precision_of_training(precision, fit, tmp_path):
    model = PPO("Pendulum-v1", num_envs=2, num_steps=16, total_steps=64)
    trainer = fit(model, precision=precision)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    expected = PPO.load_from_checkpoint(tmp_path / "model.ckpt").predict(OBSERVATIONS.numpy())
    with torch.autocast("cpu", torch.bfloat16):  # as within a hook of a Trainer
        assert (model.predict(OBSERVATIONS.numpy()) == expected).all()


def test_predict_refuses_a_state_in_the_place_of_the_flag(model):
    """There Stable-Baselines3 takes the state."""
    with pytest.raises(InputError, match="deterministic must be True or False, got tuple: give a state by its name"):
        model.predict(np.zeros(3, np.float32), (np.zeros((1, 8)),))
