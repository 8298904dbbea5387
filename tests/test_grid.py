"""Every policy on every space: each cell trains, resumes, predicts, and starts its updates at ratio 1."""

import itertools
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from probes import ACTIONS, OBSERVATIONS, Spaces
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic
from ppo_lightning.spaces import action_dims

FAMILIES = ("normal", "tanh", "beta", "gsde")
MEMORIES = (None, "lstm", "gru")
VIEWS = ("flat", "image", "both", "privileged")


def has_box(action: str) -> bool:
    return action in ("box", "dict", "tuple")


def cells() -> list[tuple]:
    """All combinations that differ: families matter to Box actions, masks to discrete ones."""
    found = []
    for action, masked, memory, view in itertools.product(ACTIONS, (False, True), MEMORIES, VIEWS):
        if masked and not action_dims(ACTIONS[action]):
            continue
        for family in FAMILIES if has_box(action) else ("normal",):
            found.append((action, masked, memory, family, view))
    return found


def pairwise_sample(cells: list[tuple]) -> list[tuple]:
    """Cells in which every pair of values that occurs at all occurs."""

    def pairs(cell):
        return set(itertools.combinations(enumerate(cell), 2))

    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


GRID = cells()
SAMPLE = pairwise_sample(GRID)


class Checked(PPO):
    """Keeps the probability ratios of each first minibatch."""

    def on_fit_start(self):
        super().on_fit_start()
        self.ratios = []

    def update(self, batch):
        samples = self.training_samples(batch)
        with torch.no_grad():
            log_prob, _, _ = self.policy.evaluate_actions(samples)
        ratio = (log_prob - samples["action_log_prob"]).exp()
        valid = samples.get("valid", None)
        self.ratios.append(ratio if valid is None else ratio[valid])
        return super().update(batch)


def policy_of(cell) -> partial:
    _, _, memory, family, view = cell
    options = {"rnn": memory, "rnn_size": 8, "distribution": family, "hidden_sizes": (8,)}
    if view == "privileged":
        options["actor_keys"] = ["state", "mode"]
    return partial(ActorCritic, **options)


def make(cell) -> Checked:
    action, masked, memory, _, view = cell
    return Checked(
        partial(Spaces, "both" if view == "privileged" else view, action, masked),
        num_envs=2,
        num_steps=16,
        total_steps=64,
        policy=policy_of(cell),
        normalize_observation=view != "image",
        num_minibatches=2,
        update_epochs=2,
        sequence_length=8 if memory else None,
        ent_coef=0.01,
    )


def check(cell, fit, tmp_path):
    """Two iterations, ratio 1, a third from the checkpoint, and predictions that fit the space and repeat themselves."""
    lightning.seed_everything(1, verbose=False)
    model = make(cell)
    trainer = fit(model)
    assert int(model.iterations) == 2
    for ratio in model.ratios:
        assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    trainer.save_checkpoint(tmp_path / "grid.ckpt")
    resumed = make(cell)
    resumed.total_steps = 96
    fit(resumed, ckpt_path=tmp_path / "grid.ckpt")
    assert int(resumed.iterations) == 3

    model.eval()
    space = model.observation_space
    space.seed(0)
    one = space.sample()
    mask = None
    if cell[1]:
        mask = np.concatenate([np.arange(size) == size - 1 for size in action_dims(model.action_space)])
    answers = [model.predict(one, action_mask=mask) for _ in range(2)]
    again = Checked.load_from_checkpoint(tmp_path / "grid.ckpt", env=model.env_factory.env, policy=policy_of(cell))
    answers.append(again.predict(one, action_mask=mask))
    actions = [answer[0] if cell[2] else answer for answer in answers]
    assert model.action_space.contains(actions[0]), actions[0]
    for action in actions[1:]:
        assert_close(tensors_of(action), tensors_of(actions[0]), rtol=0, atol=0)
    assert model.evaluate(num_episodes=2)["eval/mean_ep_length"] >= 3


def tensors_of(action):
    if isinstance(action, dict):
        return {key: tensors_of(part) for key, part in action.items()}
    if isinstance(action, tuple):
        return [tensors_of(part) for part in action]
    return torch.as_tensor(np.asarray(action))


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: "-".join(map(str, cell)))
def test_pairwise_sample_of_the_grid(cell, fit, tmp_path):
    check(cell, fit, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("cell", GRID, ids=lambda cell: "-".join(map(str, cell)))
def test_the_whole_grid(cell, fit, tmp_path):
    check(cell, fit, tmp_path)


def test_the_grid_has_no_exclusions():
    for action in ACTIONS:
        assert {cell[2] for cell in GRID if cell[0] == action} == set(MEMORIES)
        assert {cell[4] for cell in GRID if cell[0] == action} == set(VIEWS)
        if has_box(action):
            assert {cell[3] for cell in GRID if cell[0] == action} == set(FAMILIES)
    assert set(OBSERVATIONS) < set(VIEWS)
