"""What is not finite, or not what a space says, changes no parameter (F05-F08, F10-F13)."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from crashes import FIRST_SEED, Crash
from probes import Endless
from torch import nn
from torch.testing import assert_close

from ppo_lightning import PPO, EnvironmentFault, LossCoefficients, PPOLoss
from ppo_lightning import ppo as module
from ppo_lightning.algorithm.loss import normalize_advantages
from ppo_lightning.envs.classic_control import CartPole

SMALL = {"num_envs": 2, "num_steps": 8, "total_steps": 64, "num_minibatches": 2}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*ERROR:UserWarning"
)  # Gymnasium reports a worker's error as a warning, too


def state(model: PPO) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in model.policy.state_dict().values()]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def seeded(model: PPO) -> PPO:
    model.seed = FIRST_SEED
    return model


def refused(model: PPO, fit) -> str:
    """What the error says of a run whose second rollout is wrong, and that left the parameters as they were then."""
    seen = []
    model.on_train_batch_end = lambda *_: seen.append(state(model))
    with pytest.raises(EnvironmentFault) as caught:
        fit(seeded(model))
    assert len(seen) == 1
    assert equal(seen[0], state(model))
    assert model.rollouts.environments is None  # closed
    return str(caught.value)


# --- F05, F06: what environments return --------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["Box", "Dict"])
@pytest.mark.parametrize("place", ["", " final"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_observation_that_is_not_finite_is_named_and_changes_nothing(value, place, nested, fit):
    env = partial(Crash, f"{value}{place}", at=12, nested=nested)
    message = refused(PPO(env, normalize_observation=True, **SMALL), fit)
    key = f"{place.strip()} observation{' speed' if nested else ''}".strip()
    step = 3 if place else 4  # what an episode ended with belongs to its last step
    assert message.startswith(
        f"environment 1 returned a {key} that is not finite at step {step} of the rollout: [{value} {value}]"
    )


@pytest.mark.parametrize(
    ("fault", "value"), [("nan reward", "nan"), ("inf reward", "inf"), ("-inf reward", "-inf"), ("none reward", "nan")]
)
def test_a_reward_that_is_not_finite_is_named_and_changes_nothing(fault, value, fit):
    message = refused(PPO(partial(Crash, fault, at=12), normalize_reward=True, **SMALL), fit)
    assert message.startswith(
        f"environment 1 returned a reward that is not finite at step 3 of the rollout: {value}; no parameter was changed"
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("place", ["", " final"])
def test_a_number_too_large_for_float32_is_not_finite(place, fit):
    message = refused(PPO(partial(Crash, f"huge{place}", at=12), **SMALL), fit)
    assert message.startswith(f"environment 1 returned a{place} observation that is not finite at step")


# --- F08: what their spaces say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("fault", ["dtype", "shape", "scalar", "integer", "missing"])
def test_an_observation_of_another_kind_is_named_in_the_step_that_gave_it(fault, vectorization):
    env = partial(Crash, fault, at=1, nested=fault == "missing")
    model = seeded(PPO(env, vectorization=vectorization, **SMALL))
    with pytest.raises(EnvironmentFault, match="environment 1 returned in step an observation that"):
        model.rollouts.collect()
    model.close_environments()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_observation_out_of_bounds_is_reported_once(vectorization, fit):
    model = seeded(PPO(partial(Crash, "outside", at=3), vectorization=vectorization, **SMALL))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model)
    told = [str(warning.message) for warning in caught if "outside" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith(
        "environment 1 returned an observation outside of Box(-10.0, 10.0, (2,), float32) at step 3 of the first rollout: "
        "[11. 11.]"
    )
    assert model.num_env_steps == 64


# --- F07: what is computed of them -------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """A network whose logits, values or gradients become NaN while it is told so."""

    def __init__(self, observation_space, action_space, what: str) -> None:
        super().__init__()
        self.logits, self.value, self.what, self.active = nn.Linear(2, 2), nn.Linear(2, 1), what, False

    def forward(self, observation):
        logits, value = self.logits(observation), self.value(observation).squeeze(-1)
        if self.active and self.what == "logits":
            logits = logits * torch.nan
        if self.active and self.what == "value":
            value = value * torch.nan
        if self.active and self.what == "grad" and value.requires_grad:
            value.register_hook(lambda gradient: gradient * torch.nan)
        return logits, value


class Poisonous(PPO):
    """Poisons the first ``times`` minibatches of the second iteration."""

    def __init__(self, what: str, times: int = 1, **kwargs) -> None:
        self.what, self.times, self.before, self.after = what, times, [], []
        super().__init__(
            partial(Crash, "none"),
            policy=partial(Poisoned, what=what),
            loss=partial(poisoned_loss, self),
            **{**SMALL, "update_epochs": 8, **kwargs},
        )


def poisoned_loss(model, batch, evaluate, coefficients):
    if len(model.after) < len(model.before):
        model.after.append(state(model))  # of the step before
    spoilt = int(model.iterations) == 1 and len(model.before) < model.times
    model.policy.network.active = spoilt
    losses = PPOLoss()(batch, evaluate, coefficients)
    model.policy.network.active = False
    if spoilt:
        model.before.append(state(model))
        if model.what == "loss":
            losses["loss"] = losses["loss"] * torch.nan
    return losses


@pytest.mark.parametrize("what", ["logits", "value", "loss", "grad"])
def test_the_run_ends_before_a_step_by_what_is_no_number_and_leaves_a_file(what, fit, tmp_path):
    model = Poisonous(what)
    with pytest.raises(
        FloatingPointError, match="the gradient's norm is nan in iteration 2, the step was not"
    ) as caught:
        fit(model)
    assert equal(model.before[0], state(model))
    file = tmp_path / "non_finite.pt"
    assert str(file) in str(caught.value)
    left = torch.load(file, weights_only=True)
    assert np.isnan(left["norm"])
    assert left["iteration"] == 2
    assert len(left["samples"]["observation"]) == 8
    # What it holds is enough to come to the same gradient.
    model.policy.load_state_dict(left["policy"])
    network = model.policy.network
    network.active = True
    losses = PPOLoss()(left["samples"], model.policy.evaluate_actions, LossCoefficients(**left["coefficients"]))
    (losses["loss"] * (torch.nan if what == "loss" else 1.0)).backward()
    assert nn.utils.get_total_norm([one.grad for one in model.policy.parameters()]).isnan()


@pytest.mark.parametrize("what", ["logits", "value", "loss", "grad"])
@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "by the strategy"])
def test_a_step_by_what_is_no_number_is_left_out_and_counted(what, hooked, fit, monkeypatch):
    if hooked:
        monkeypatch.setattr(module, "can_bypass_strategy", lambda trainer, ranks: False)
    model = Poisonous(what, times=3, non_finite="skip")
    logged = []
    model.on_train_batch_end = lambda *_: logged.append(dict(model.trainer.callback_metrics))
    fit(model)
    assert len(model.after) == 3
    assert all(equal(before, after) for before, after in zip(model.before, model.after, strict=True))
    assert not equal(model.after[-1], state(model))  # the others were taken
    assert all(one.isfinite().all() for one in state(model))
    assert model.num_env_steps == 64
    assert [row.get("train/skipped_steps") for row in logged] == [None, 3, 3, 3]
    assert all(row["train/grad_norm"].isfinite() for row in logged)


def test_no_more_than_ten_steps_in_a_row_are_left_out(fit):
    fit(Poisonous("grad", times=10, non_finite="skip"))
    model = Poisonous("grad", times=11, non_finite="skip")
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan 11 times in a row in iteration 2"):
        fit(model)
    assert equal(model.before[0], state(model))


class Overflows(CartPole):
    """Rewards overflow the critic's loss in those steps of a run that are told, for all environments."""

    def __init__(self, num_envs: int, steps: range) -> None:
        super().__init__(num_envs)
        self.steps, self.taken = steps, 0

    def step(self, actions):
        observation, reward, *rest = super().step(actions)
        reward = reward * (1e30 if self.taken in self.steps else 1.0)
        self.taken += 1
        return observation, reward, *rest


class AsItIs:
    graphs = 0

    def __init__(self, function, module):
        self.function = function

    def check_again(self):
        pass

    def __call__(self, *args):
        return self.function(*args)

    repeat = __call__


@pytest.mark.filterwarnings("ignore:compile. true has no effect on rollouts:UserWarning")
@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_the_steps_that_are_compiled_are_as_careful(non_finite, fit, tmp_path, monkeypatch):
    """The second rollout has two samples that overflow: their steps are left out, or the whole update is taken back.

    The functions run as they are, not as graphs, which take long to compile.
    """
    for place in ("algorithm.compiled_step", "rollout.dataset"):
        monkeypatch.setattr(f"ppo_lightning.{place}.CompiledFunction", AsItIs)
    size = {"num_envs": 2, "num_steps": 8, "total_steps": 48, "num_minibatches": 2, "update_epochs": 2}
    model = PPO(
        partial(Overflows, 2, range(8, 9)), compile=True, non_finite=non_finite, normalize_advantage=False, **size
    )
    seen, steps = [], []
    model.on_train_batch_end = lambda *_: (
        seen.append(state(model)),
        steps.append(float(model.updater.compiled.steps[0])),
    )
    if non_finite == "raise":
        with pytest.raises(FloatingPointError, match=r"the gradient's norm is (inf|nan) in iteration 2"):
            fit(model)
        assert equal(seen[0], state(model))
        assert float(model.updater.compiled.steps[0]) == steps[0] == 4
        left = torch.load(tmp_path / "non_finite.pt", weights_only=True)
        assert left["samples"]["observation"].shape == (8, 4)  # the minibatch, since it was all made again step by step
        assert (left["samples"]["value_target"] > 1e20).sum() >= 1
        assert equal(list(left["policy"].values()), state(model))
    else:
        fit(model)
        skipped = model.trainer.callback_metrics["train/skipped_steps"]
        assert 2 <= skipped <= 4
        assert steps == [4, 8 - skipped, 12 - skipped]
        assert all(one.isfinite().all() for one in state(model))
        torch.manual_seed(1)
        eager = PPO(partial(Overflows, 2, range(8, 9)), non_finite="skip", normalize_advantage=False, **size)
        torch.manual_seed(1)
        again = PPO(
            partial(Overflows, 2, range(8, 9)), compile=True, non_finite="skip", normalize_advantage=False, **size
        )
        fit(eager)
        fit(again)
        for one, other in zip(state(eager), state(again), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_extreme_rewards_do_not_poison_running_moments(fit):
    """They are finite, but their squares and sums are not."""

    class Extreme(Overflows):
        def step(self, actions):
            observation, reward, *rest = super().step(actions)
            return observation, reward.clamp(max=1e8) * (3e30 if self.taken - 1 in self.steps else 1.0), *rest

    model = PPO(
        partial(Extreme, 2, range(8, 9)), non_finite="skip", normalize_reward=True, popart={"beta": 0.1},
        num_envs=2, num_steps=8, total_steps=96, num_minibatches=2,
    )  # fmt: skip
    fit(model)
    assert all(one.isfinite().all() for one in model.state_dict().values())
    assert model.rollouts.running_return.isfinite().all()


# --- F10-F13: degenerate minibatches -----------------------------------------------------------------------------------


def test_advantages_without_spread_move_no_policy(fit):
    """Every step is worth one more than the critic says: there is nothing to choose."""
    assert_close(normalize_advantages(torch.full((64,), 3.0)), torch.zeros(64), atol=0, rtol=0)
    model = Poisonous("nothing", gae_lambda=0.0, total_steps=16)
    nn.init.zeros_(model.policy.network.value.weight)
    nn.init.zeros_(model.policy.network.value.bias)
    weight, bias, value = (
        model.policy.network.get_parameter(name) for name in ("logits.weight", "logits.bias", "value.bias")
    )
    before = [one.detach().clone() for one in (weight, bias, value)]
    fit(model)
    assert equal(before[:2], [weight.detach(), bias.detach()])
    assert value.item() > 0.0


@pytest.mark.parametrize("normalize", [True, False])
def test_minibatches_of_one_sample_train(normalize, fit):
    model = PPO(partial(Crash, "none"), **{**SMALL, "num_minibatches": 16}, normalize_advantage=normalize)
    before = state(model)
    fit(model)
    assert all(one.isfinite().all() for one in state(model))
    assert not equal(before, state(model))


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("num_steps", [7, 16])
@pytest.mark.parametrize("num_minibatches", [1, 2, 3, 5, 7])
def test_every_pass_takes_every_sample_once(num_envs, num_steps, num_minibatches):
    seen: list[list[float]] = []

    class Counts(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            seen.append(batch["advantage"].tolist())
            return super().forward(batch, evaluate, coefficients)

    model = PPO(
        partial(Endless, 5), num_envs=num_envs, num_steps=num_steps, num_minibatches=num_minibatches, update_epochs=2,
        loss=Counts(), normalize_advantage=False,
    )  # fmt: skip
    batch = model.collect()
    batch["advantage"] = torch.arange(float(num_envs * num_steps)).view(num_steps, num_envs)
    model.learn(batch, torch.optim.SGD(model.parameters(), lr=0.0))
    for taken in (seen[:num_minibatches], seen[num_minibatches:]):
        assert sorted(one for piece in taken for one in piece) == list(range(num_envs * num_steps))
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_a_learning_rate_far_too_high_is_stopped_by_target_kl(fit):
    updates = []

    class Notes(PPO):
        def update(self, rollout):
            updates.append(super().update(rollout))
            return updates[-1]

    reckless = lambda params: torch.optim.Adam(params, lr=1e3)  # noqa: E731
    size = {**SMALL, "num_steps": 32, "total_steps": 128}
    model = Notes("CartPole-v1", **size, target_kl=0.02, optimizer=reckless)
    fit(model)
    # In the first minibatch the policy is what it was, so that its step is taken; the second finds out.
    assert len(updates[0].losses) == 2
    assert len(updates[1].losses) < 8
    assert all(one.isfinite().all() for one in state(model))


class Diverges(PPO):
    """The divergence is no number from the second minibatch of each update on, or from the first."""

    divergence, at_once = torch.nan, False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, loss=self.diverging_loss, **kwargs)

    def diverging_loss(self, batch, evaluate, coefficients):
        losses = PPOLoss()(batch, evaluate, coefficients)
        if self.calls or self.at_once:
            losses["approx_kl"] = torch.tensor(self.divergence)
        self.calls += 1
        return losses

    def update(self, rollout):
        self.calls = 0
        return super().update(rollout)


@pytest.mark.parametrize("divergence", [torch.nan, torch.inf])
def test_a_divergence_that_is_not_finite_counts_as_too_large(divergence, fit):
    model = Diverges("CartPole-v1", **SMALL, target_kl=1e9)
    model.divergence, taken = divergence, []
    model.on_train_batch_end = lambda *_: taken.append(len(model.updater.eager.norms))
    fit(model)
    assert set(taken) == {1}


@pytest.mark.parametrize("divergence", [torch.nan, torch.inf])
def test_before_any_step_it_means_a_policy_that_gives_no_numbers(divergence, fit):
    model = Diverges("CartPole-v1", **SMALL, target_kl=1e9)
    model.divergence, model.at_once = divergence, True
    before = state(model)
    with pytest.raises(FloatingPointError, match="in iteration 1"):
        fit(model)
    assert equal(before, state(model))
    model = Diverges("CartPole-v1", **SMALL, target_kl=1e9, non_finite="skip")
    model.divergence, model.at_once = divergence, True
    before = state(model)
    fit(model)
    assert equal(before, state(model))
    assert model.guard.skipped == int(model.iterations)
