"""Memory: the same state wherever a sequence is cut, none across episodes, none between environments."""

from functools import partial

import lightning
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probes import Recall, Scripted, Spaces
from torch import nn
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError, RecurrentLayer

KINDS = ["lstm", "gru"]
SMALL = {"num_envs": 3, "num_steps": 24, "total_steps": 144, "num_minibatches": 3}


def network(rnn="lstm", **options):
    return partial(ActorCritic, rnn=rnn, rnn_size=8, hidden_sizes=(8,), **options)


@pytest.mark.parametrize("often", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_layer_step_by_step(kind, often):
    """Outputs, the state after them, and the gradients of both."""
    memory = RecurrentLayer(kind, 4, 6)
    cell = (nn.LSTMCell if kind == "lstm" else nn.GRUCell)(4, 6)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            own = dict(memory.layer.named_parameters())[f"{name}_l0"]
            own.normal_()
            parameter.copy_(own)
    inputs, first = (torch.randn(*shape, requires_grad=True) for shape in ((10, 3, 4), (3, memory.state_size)))
    start, weights = torch.rand(10, 3) < often, torch.randn(10, 3, 6)

    def gradients(outputs, after, module):
        loss = (outputs * weights).sum() + after.square().sum()
        return torch.autograd.grad(loss, [inputs, first, *module.parameters()])

    outputs, after = memory(inputs, first, start)
    expected, state = [], first
    for row, fresh in zip(inputs, start, strict=True):
        state = torch.where(fresh[:, None], torch.zeros_like(state), state)
        state = torch.cat(cell(row, tuple(state.chunk(2, -1))), -1) if kind == "lstm" else cell(row, state)
        expected.append(state[:, :6])
    assert_close(outputs, torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert_close(after, state, atol=1e-6, rtol=1e-5)
    is_torchs = kind == "lstm" and often < 0.1  # which without gradients is another kernel, on some processors
    with torch.no_grad():
        assert_close(memory(inputs, first, start), (outputs, after), atol=1e-6 if is_torchs else 0, rtol=0)
    own, theirs = gradients(outputs, after, memory.layer), gradients(torch.stack(expected), state, cell)
    assert_close(own, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_orthogonal_and_biases_zero(kind):
    layer = RecurrentLayer(kind, 8, 8).layer
    gates = 4 if kind == "lstm" else 3
    columns = layer.weight_hh_l0.T @ layer.weight_hh_l0
    assert columns.shape == (8, 8)
    assert_close(columns, torch.eye(8), atol=1e-5, rtol=0)
    assert layer.bias_ih_l0.shape == (gates * 8,)
    assert layer.bias_ih_l0.abs().max() == layer.bias_hh_l0.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_after_an_episodes_end_is_that_of_a_fresh_start(kind):
    """To the last bit, gradients included: nothing flows over the border."""
    memory = RecurrentLayer(kind, 4, 6)
    inputs = torch.randn(7, 2, 4, requires_grad=True)
    start = torch.zeros(7, 2, dtype=torch.bool)
    start[3, 0] = True
    outputs, _ = memory(inputs, torch.randn(2, memory.state_size), start)
    fresh, _ = memory(inputs[3:], torch.zeros(2, memory.state_size), start[3:])
    assert torch.equal(outputs[3:, 0], fresh[:, 0])
    assert not torch.equal(outputs[3:, 1], fresh[:, 1])
    (gradient,) = torch.autograd.grad(outputs[3:, 0].sum(), inputs)
    assert (gradient[:3] == 0).all()
    assert (gradient[3:, 0] != 0).any()


def sync(env, mode):
    return lambda num_envs: SyncVectorEnv([env] * num_envs, autoreset_mode=AutoresetMode(mode))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_sequences_give_the_log_probabilities_of_the_rollout_step_by_step(fit, kind, mode, shared):
    """Over several rollouts, so that states are carried from one to the next, in sequences of every length."""
    differences = []

    class Checked(PPO):
        def update(self, batch):
            for length in (24, 12, 8, 1):
                self.rollouts.sequence_length = length
                samples = self.training_samples(batch)
                shape = samples["advantage"].shape
                assert shape == (72 // length, length)
                with torch.no_grad():
                    log_prob, _, value = self.policy.evaluate_actions(samples)
                valid = samples.get("valid", torch.ones(shape, dtype=torch.bool))
                assert int(valid.sum()) == int(batch["valid"].sum())
                differences.append((log_prob - samples["action_log_prob"])[valid])
                differences.append((value - (samples["value_target"] - samples["advantage"]))[valid])
            self.rollouts.sequence_length = 8
            return super().update(batch)

    env = partial(Spaces, "flat", "multi_discrete", mode != "Disabled")
    model = Checked(sync(env, mode), policy=network(kind, shared=shared), sequence_length=8, **SMALL)
    fit(model)
    assert int(model.iterations) >= 2
    assert len(differences) >= 16
    worst = max(difference.abs().max().item() for difference in differences)
    assert worst < 1e-5


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_rollouts_hold_the_state_before_each_step_and_where_episodes_start(mode):
    model = PPO(sync(Scripted, mode), policy=network(), **{**SMALL, "num_minibatches": 1})
    model.seed = 0
    first, second = model.rollouts.collect().clone(), model.rollouts.collect()
    for batch, before in ((first, None), (second, first)):
        valid, start = batch["valid"], batch["episode_start"]
        done = batch["terminated"] | batch["truncated"]
        if (
            mode == "NextStep"
        ):  # the row after an end still shows the old episode, the one after that begins the new one
            assert torch.equal(start[1:], ~valid[:-1])
        else:
            assert torch.equal(start[1:], done[:-1])
        state = torch.zeros(3, model.policy.state_size) if before is None else None
        if before is None:
            assert start[0].all()
            assert torch.equal(batch["recurrent_state"][0], state)
        for step in range(23):
            features = model.policy.features(batch["observation"][step])
            with torch.no_grad():
                _, _, after = model.policy.recurrent_step(features, batch["recurrent_state"][step], start[step])
            assert_close(after, batch["recurrent_state"][step + 1], rtol=0, atol=0)
    features = model.policy.features(first["observation"][23])
    with torch.no_grad():
        _, _, after = model.policy.recurrent_step(features, first["recurrent_state"][23], first["episode_start"][23])
    assert_close(after, second["recurrent_state"][0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_final_observations_are_valued_with_the_memory_of_their_episode(mode):
    """V(final) is what the network says of that observation after the whole episode, computed here on its own."""
    script = ((5, "truncated"),)
    model = PPO(sync(partial(Scripted, script), mode), policy=network("gru"), **{**SMALL, "num_minibatches": 1})
    model.seed = 0
    batch = model.rollouts.collect()
    period = 6 if mode == "NextStep" else 5
    for episode in range(3):
        begin = episode * period
        seen = torch.tensor([[episode + 0.01 * step] for step in range(6)], dtype=torch.float32)
        assert_close(batch["observation"][begin : begin + 5, 0], seen[:5])
        state = torch.zeros(1, model.policy.state_size)
        with torch.no_grad():
            for step, row in enumerate(seen):
                _, value, state = model.policy.recurrent_step(row[None], state, torch.tensor([step == 0]))
        assert batch["truncated"][begin + 4].all()
        assert_close(batch["next_state_value"][begin + 4, 0], value[0], atol=1e-6, rtol=1e-5)


def test_the_three_autoreset_modes_give_the_same_advantages(fit):
    """Valid rows of the same scripted episodes, cut to what all modes have."""
    kept = {}
    for mode in ("NextStep", "SameStep", "Disabled"):
        lightning.seed_everything(0, verbose=False)
        model = PPO(sync(Scripted, mode), policy=network(), **{**SMALL, "num_minibatches": 1, "num_steps": 48})
        model.seed = 0
        batch = model.rollouts.collect()
        model.on_train_batch_start(batch, 0)
        columns = [batch[:, i][batch["valid"][:, i]] for i in range(3)]
        # Actions differ (noise is drawn per row), values and rewards do not: observations are scripted.
        kept[mode] = torch.stack([torch.stack([c["advantage"], c["state_value"]])[:, :17] for c in columns])
    # The 17 first steps end with the fifth episode of 3, 2, 5, 3, 2 steps and two more.
    whole = slice(0, 15)
    assert_close(kept["NextStep"][..., whole], kept["SameStep"][..., whole], atol=1e-6, rtol=1e-5)
    assert_close(kept["Disabled"][..., whole], kept["SameStep"][..., whole], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_takes_and_gives_the_state(kind):
    model = PPO(partial(Recall, delay=2), policy=network(kind), **SMALL)
    env = Recall(delay=2)
    observation, _ = env.reset(seed=0)
    action, state = model.predict(observation)
    assert state.shape == (model.policy.state_size,)
    asked = np.array([0, 1], np.float32)
    _, after = model.predict(asked, state=state)
    _, fresh = model.predict(asked)
    assert not np.allclose(after, fresh)
    batched, states = model.predict(np.stack([asked, asked]), state=np.stack([state, np.zeros_like(state)]))
    assert batched.shape == (2,)
    assert_close(torch.from_numpy(states), torch.from_numpy(np.stack([after, fresh])), atol=1e-6, rtol=1e-5)
    assert env.action_space.contains(action)
    with pytest.raises(InputError, match="needs a state"):
        model.predict(observation, state=np.zeros(3))
    with pytest.raises(InputError, match=r"forward needs a state of \(1, \d+\), got \(1, 3\)"):
        model(torch.from_numpy(observation)[None], torch.zeros(1, 3))
    with pytest.raises(InputError, match="not recurrent"):
        PPO("CartPole-v1", **SMALL).predict(np.zeros(4, np.float32), state=np.zeros(3))


def test_evaluation_remembers_within_episodes_and_forgets_between_them():
    """A policy that answers right by memory alone: its cell keeps the cue. Forgetting to reset would not hurt it, so
    its counter of steps, which says when it answers, must start anew."""

    class Rememberer(nn.Module):
        state_size = 2

        def __init__(self, observation_space, action_space):
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, observation, state, start):
            parameters, values = [], []
            for row, fresh in zip(observation, start, strict=True):
                state = state.masked_fill(fresh[:, None], 0.0)
                cue = torch.where(state[:, 1:] == 0, row[:, :1], state[:, :1])
                state = torch.cat([cue, state[:, 1:] + 1], -1)
                parameters.append(torch.cat([-cue, cue], -1))
                values.append(state[:, 1])
            return torch.stack(parameters), torch.stack(values), state

    model = PPO(Recall, policy=Rememberer, **SMALL)
    for deterministic in (True, False):
        result = model.evaluate(num_episodes=50, deterministic=deterministic)
        assert result["eval/success_rate"] > (0.999 if deterministic else 0.8)
    batch = model.rollouts.collect()
    counted = batch["state_value"]  # 1 at each episode's first step
    assert torch.equal(counted == 1, batch["episode_start"])


def test_states_are_carried_across_devices_and_saved_with_the_weights(fit, tmp_path):
    model = PPO(Recall, policy=network(), **SMALL)
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "memory.ckpt")
    again = PPO.load_from_checkpoint(tmp_path / "memory.ckpt", env=Recall, policy=network())
    observation = np.array([1, 0], np.float32)
    for mine, other in zip(model.predict(observation), again.predict(observation), strict=True):
        assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=0, atol=0)


def test_minibatches_keep_time_whole(fit):
    """Each holds whole sequences, in order; over a pass, every sequence once."""
    seen = []

    class Watched(PPO):
        def update(self, batch):
            evaluate = self.policy.evaluate_actions
            batch["advantage"] = torch.arange(72.0).view(24, 3)  # a name for each row: step · 3 + environment

            def watching(piece):
                seen.append(piece["advantage"].clone())
                return evaluate(piece)

            self.policy.evaluate_actions = watching
            return super().update(batch)

    model = Watched(
        Recall,
        policy=network(),
        sequence_length=8,
        update_epochs=1,
        normalize_advantage=False,
        **{**SMALL, "total_steps": 72},
    )
    fit(model)
    assert [len(piece) for piece in seen] == [3, 3, 3]
    rows = torch.cat(seen)
    assert (rows.diff(dim=1) == 3).all()
    assert sorted(rows.flatten().tolist()) == list(range(72))
    assert all(first % 24 < 3 for first in rows[:, 0].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 7}, "sequence_length = 7 does not cut num_steps = 24"),
        ({"num_minibatches": 4}, "= 3 sequences cannot be cut into num_minibatches = 4"),
        ({"policy": ActorCritic, "sequence_length": 8}, "this one is not: leave it out"),
        ({"policy": partial(ActorCritic, rnn="transformer")}, "rnn must be one of"),
        ({"sequence_length": 0}, "sequence_length must be a whole number"),
    ],
)
def test_bad_input_is_refused_at_construction(change, message):
    with pytest.raises(InputError, match=message):
        PPO(Recall, **{**SMALL, "policy": network(), **change})


def test_refuses_a_network_whose_state_does_not_fit():
    class Wrong(nn.Module):
        state_size = 3

        def __init__(self, observation_space, action_space):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, observation, state, start):
            return self.layer(observation), observation.sum(-1), state[:, :2]

    with pytest.raises(InputError, match=r"a recurrent network also returns a state \(2, 3\)"):
        PPO(Recall, policy=Wrong, **SMALL)


def test_dummy_rows_need_sequences_of_two():
    model = PPO(sync(Recall, "NextStep"), policy=network(), sequence_length=1, **SMALL)
    with pytest.raises(InputError, match="raise sequence_length"):
        model.rollouts.collect()


def test_own_memory_in_bf16_starts_at_ratio_one(fit):
    ratios = []

    class First(PPO):
        def training_step(self, batch, batch_idx):
            samples = self.training_samples(batch)
            ratios.append((self.policy.evaluate_actions(samples)[0] - samples["action_log_prob"]).exp().flatten())
            super().training_step(batch, batch_idx)

    fit(First(partial(Spaces, "both"), policy=network(), **SMALL), precision="bf16-mixed")
    assert_close(torch.cat(ratios), torch.ones(len(torch.cat(ratios))), atol=1e-2, rtol=0)
