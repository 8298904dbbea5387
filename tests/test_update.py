"""What an update changes: which parameters, by which learning rate, and how it is counted."""

import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from processes import fit as fit_in_process
from processes import forked
from stable_baselines3 import PPO as StableBaselines3PPO  # noqa: N811
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from torch import nn
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError, PopArt, PPOLoss
from ppo_lightning.callbacks import AdaptiveLearningRate, PPOCallback, Stage, Stages
from ppo_lightning.envs.classic_control import Pendulum

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 128, "update_epochs": 2, "num_minibatches": 2}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def weights(module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


class At(PPOCallback):
    """Calls a function in a hook, once, after so many iterations."""

    def __init__(self, hook, iteration, function):
        super().__init__()
        self.iteration, self.function, self.called = iteration, function, False
        setattr(self, hook, self.call)

    def call(self, trainer, pl_module, *_):
        if pl_module.policy_version == self.iteration and not self.called:
            self.called = True
            self.function(trainer, pl_module)


def fails(*_):
    raise ZeroDivisionError


# --- how it is counted -------------------------------------------------------------------------------------------------


class Fragile(PPOLoss):
    """Fails within an update, once, after so many minibatches."""

    def __init__(self, minibatches):
        super().__init__()
        self.left, self.failed = minibatches, False

    def forward(self, batch, evaluate, coefficients):
        if self.left == 0 and not self.failed:
            self.failed = True
            raise ZeroDivisionError
        self.left -= 1
        return super().forward(batch, evaluate, coefficients)


@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "by the strategy"])
@pytest.mark.parametrize("iteration", [0, 2])
def test_an_update_that_was_broken_off_is_not_counted_and_changes_nothing(fit, iteration, hooked, tmp_path):
    class Hooked(Callback):
        def on_before_optimizer_step(self, *args):
            pass

    callbacks = [Hooked()] if hooked else []
    torch.manual_seed(0)
    model = PPO("CartPole-v1", loss=Fragile(4 * iteration + 1), optimizer=sgd, **SMALL)
    torch.manual_seed(0)
    whole = PPO("CartPole-v1", optimizer=sgd, **SMALL)
    fit(whole, max_epochs=iteration)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=0, callbacks=callbacks,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    assert model.loss.failed
    assert trainer.global_step == int(model.iterations) == iteration
    assert_close(weights(model), weights(whole), rtol=0, atol=0)
    trainer.fit(model)
    assert trainer.global_step == int(model.iterations) == 4
    assert model.num_env_steps == 128
    files = list(Path(tmp_path).rglob("last.ckpt"))
    assert len(files) == 1
    saved = torch.load(files[0], weights_only=True)
    assert saved["global_step"] == int(saved["state_dict"]["iterations"]) == 4


def test_an_update_whose_first_minibatch_is_skipped_counts_once(fit):
    class Poisoned(PPOLoss):
        calls = 0

        def forward(self, batch, evaluate, coefficients):
            self.calls += 1
            losses = super().forward(batch, evaluate, coefficients)
            return {name: value * torch.nan for name, value in losses.items()} if self.calls == 5 else losses

    model = PPO("CartPole-v1", loss=Poisoned(), target_kl=0.1, non_finite="skip", **SMALL)
    trainer = fit(model)
    assert model.guard.skipped == 1
    assert trainer.global_step == trainer.current_epoch == int(model.iterations) == 4


@pytest.mark.parametrize("kind", ["step of its own", "hook"])
def test_iterations_are_counted_whatever_a_step_does(fit, kind):
    class Own(PPO):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            optimizer.step()

    model = (Own if kind == "step of its own" else PPO)("CartPole-v1", **SMALL)
    trainer = fit(model, callbacks=[At("on_before_optimizer_step", 0, lambda *_: None)])
    assert trainer.global_step == int(model.iterations) == 4


def test_a_file_that_counted_a_broken_off_update_twice_is_resumed_with_the_iterations(fit, tmp_path):
    model = PPO("CartPole-v1", **SMALL)
    trainer = fit(model, max_epochs=2)
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == 3
    model = PPO("CartPole-v1", **SMALL)
    trainer = fit(model, ckpt_path=tmp_path / "a.ckpt")
    assert trainer.global_step == int(model.iterations) == 4


# --- which parameters --------------------------------------------------------------------------------------------------


def new_head(_, model):
    torch.manual_seed(5)
    model.policy.network.value_head = nn.Linear(64, 1)


def new_head_and_group(trainer, model):
    new_head(trainer, model)
    trainer.optimizers[0].add_param_group({"params": list(model.policy.network.value_head.parameters())})


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_head_replaced_between_two_fits_is_learnt_clipped_and_rolled_back(fit, compiles):
    model = PPO("CartPole-v1", **SMALL, max_grad_norm=1e-4, compile=compiles,
                optimizer=partial(torch.optim.Adam, lr=1.0, eps=1.0, fused=True))  # fmt: skip
    fit(model, max_epochs=2)
    before = weights(model.policy.network.actor_trunk)
    new_head(None, model)
    start = weights(model.policy.network.value_head)
    trainer = fit(model, max_epochs=1)
    change = (weights(model.policy.network.value_head) - start).abs().max()
    assert 0 < change < 1e-3  # with eps 1 a step is in proportion to the gradient
    assert 0 < (weights(model.policy.network.actor_trunk) - before).abs().max() < 1e-3
    assert model.trainer.callback_metrics["train/critic_grad_norm"] > 1e-3  # before clipping
    steps = {name: int(trainer.optimizers[0].state[one]["step"]) for name, one in model.policy.named_parameters()}
    assert {steps.pop("network.value_head.weight"), steps.pop("network.value_head.bias")} == {4}
    assert set(steps.values()) == {12}
    kept = weights(model.policy)
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[At("on_train_batch_end", 3, lambda *_: None), At("on_update_end", 3, fails)])
    assert_close(weights(model.policy), kept, rtol=0, atol=0)


def test_a_head_that_does_not_fit_is_refused_at_the_next_fit(fit):
    model = PPO("CartPole-v1", **SMALL)
    fit(model, max_epochs=1)
    model.policy.network.value_head = nn.Linear(64, 2)
    with pytest.raises(InputError, match="ActorCritic"):
        fit(model, max_epochs=1)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
def test_a_head_replaced_during_training_needs_a_parameter_group(fit, hook):
    with pytest.raises(InputError, match=r"value_head.weight.*add_param_group"):
        fit(PPO("CartPole-v1", **SMALL), callbacks=[At(hook, 1, new_head)])
    model = PPO("CartPole-v1", **SMALL, max_grad_norm=1e-4, optimizer=sgd)
    head = []

    def look(trainer, model):
        head.append(weights(model.policy.network.value_head))

    fit(model, callbacks=[At(hook, 1, new_head_and_group), At("on_train_batch_start", 1 + (hook[-1] == "d"), look)])
    assert 0 < (weights(model.policy.network.value_head) - head[0]).abs().max() < 1e-3


@pytest.mark.parametrize("extended", [False, True])
def test_a_new_parameter_group_is_rolled_back_with_the_others(fit, extended):
    model = PPO("CartPole-v1", **SMALL)
    before, steps = [], {}
    callbacks = [
        At("on_train_batch_start", 1, lambda *_: before.append(weights(model.policy))),
        At("on_update_end", 1, fails),
    ]
    if extended:
        callbacks.insert(0, At("on_train_epoch_start", 1, new_head_and_group))
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=callbacks)
    assert_close(weights(model.policy), before[0], rtol=0, atol=0)

    def look(trainer, model):
        state = trainer.optimizers[0].state
        steps.update({name: int(state[one].get("step", 0)) for name, one in model.policy.named_parameters()})

    fit(model, callbacks=[At("on_iteration_start", 1, look)])
    new = {"network.value_head.weight", "network.value_head.bias"} if extended else set()
    assert {name for name, taken in steps.items() if taken == 0} == new
    assert {taken for name, taken in steps.items() if name not in new} == {4}


class UsesHead(PPOLoss):
    def forward(self, batch, evaluate, coefficients):
        losses = super().forward(batch, evaluate, coefficients)
        own = sum(100 * (head(batch["observation"]) - 1).square().mean() for head in self.head)
        return {**losses, "loss": losses["loss"] + own}


class Beside(PPO):
    """Has a module beside the policy, which its loss uses or does not."""

    def __init__(self, *args, uses, **kwargs):
        super().__init__(*args, loss=UsesHead(), **kwargs)
        self.head = nn.Linear(4, 1)
        self.loss.head = [self.head] if uses else []  # a list, so that it is no module of the loss


def test_a_module_beside_the_policy_learns_where_the_loss_uses_it(fit, tmp_path):
    torch.manual_seed(0)
    model = Beside("CartPole-v1", uses=True, **SMALL)
    before = weights(model.head)
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    assert ((weights(model.head) - before).abs() > 1e-4).all()
    again = Beside("CartPole-v1", uses=True, **{**SMALL, "total_steps": 256})
    fit(again, ckpt_path=tmp_path / "a.ckpt")
    assert int(again.iterations) == 8


def test_a_module_beside_the_policy_is_clipped_and_rolled_back_too(fit):
    model = Beside("CartPole-v1", uses=True, **SMALL, max_grad_norm=1e-4, optimizer=sgd)
    before = weights(model.head)
    fit(model, max_epochs=1)
    assert 0 < (weights(model.head) - before).abs().max() < 1e-3
    kept = weights(model)
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[At("on_update_end", 1, fails)])
    assert_close(weights(model), kept, rtol=0, atol=0)


def test_a_module_that_receives_no_gradient_is_named_once(fit):
    with pytest.warns(UserWarning, match=r"head.weight, head.bias did not receive a gradient") as told:
        fit(Beside("CartPole-v1", uses=False, **SMALL))
    assert len([one for one in told if "gradient" in str(one.message)]) == 1
    frozen = Beside("CartPole-v1", uses=False, **SMALL)
    frozen.head.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient")
        fit(frozen)


def test_the_compiled_update_leaves_modules_beside_the_policy_to_the_eager_one(fit):
    model = Beside("CartPole-v1", uses=True, compile=True, **SMALL)
    before = weights(model.head)
    with pytest.warns(UserWarning, match="since the optimizer has parameters beside those of policy and loss"):
        fit(model)
    assert ((weights(model.head) - before).abs() > 1e-4).all()


def test_an_optimizer_of_a_subclass_says_what_is_learnt(fit):
    class Two(PPO):
        def configure_optimizers(self):
            network = self.policy.network
            groups = [network.value_head, network.action_head, network.actor_trunk, network.critic_trunk]
            return torch.optim.SGD([{"params": list(one.parameters())} for one in groups], lr=1.0)

    model = Two("CartPole-v1", **SMALL, max_grad_norm=1e-4)
    before = weights(model)
    trainer = fit(model)
    assert 0 < (weights(model) - before).abs().max() < 1e-3
    assert len(trainer.optimizers[0].param_groups) == 4
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/actor_grad_norm"] > 0
    assert metrics["train/grad_norm"] ** 2 == pytest.approx(
        metrics["train/actor_grad_norm"] ** 2 + metrics["train/critic_grad_norm"] ** 2, rel=0.1
    )


def test_another_optimizer_in_the_next_fit_begins_without_state(fit):
    model = PPO("CartPole-v1", **SMALL)
    fit(model, max_epochs=1)
    model.optimizer = sgd
    trainer = fit(model, max_epochs=1)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert "betas" not in trainer.optimizers[0].param_groups[0]


def test_layers_may_be_frozen_and_released_between_iterations(fit):
    model = PPO("CartPole-v1", **SMALL, optimizer=partial(torch.optim.Adam, lr=1e-2))
    trunk, seen = model.policy.network.critic_trunk, []
    freeze = At("on_train_epoch_start", 1, lambda *_: trunk.requires_grad_(False))
    release = At("on_train_epoch_start", 2, lambda *_: trunk.requires_grad_(True))
    look = [At("on_train_batch_start", i, lambda *_: seen.append(weights(trunk))) for i in range(4)]
    fit(model, callbacks=[freeze, release, *look])
    moved = [bool((one != other).any()) for one, other in pairwise(seen)]
    assert moved == [True, False, True]


# --- by which learning rate ---------------------------------------------------------------------------------------------


class Sets(Callback):
    """Sets the learning rate of a parameter group, in a hook, at some iterations."""

    def __init__(self, hook, rates, group=0):
        self.rates, self.group = rates, group
        setattr(self, hook, self.set)

    def set(self, trainer, pl_module, *_):
        if pl_module.policy_version in self.rates:
            trainer.optimizers[0].param_groups[self.group]["lr"] = self.rates[pl_module.policy_version]


def rates_of(fit, model, *callbacks, **kwargs) -> list[float]:
    """The learning rate of each iteration, as it is when a step is taken."""
    seen = []
    look = PPOCallback(on_update_end=lambda trainer, *_: seen.append(trainer.optimizers[0].param_groups[0]["lr"]))
    fit(model, callbacks=[*callbacks, look], **kwargs)
    return seen


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start"])
def test_a_rate_that_a_callback_sets_is_the_rate(fit, hook):
    model = PPO("CartPole-v1", **SMALL)
    assert rates_of(fit, model, Sets(hook, {1: 1e-4, 3: 5e-5})) == [3e-4, 1e-4, 1e-4, 5e-5]
    assert model.learning_rate == 5e-5


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_rate_that_a_callback_sets_before_training_counts(fit, hook):
    rates = rates_of(fit, PPO("CartPole-v1", **SMALL), Sets(hook, {0: 1e-3}))
    expected = [1e-3, 7.5e-4, 5e-4, 2.5e-4] if hook == "on_fit_start" else [1e-3] * 4
    assert rates == pytest.approx(expected)


def test_the_rate_of_one_group_may_be_a_callbacks_and_the_other_follows_the_schedule(fit):
    def two(parameters):
        first, *others = parameters
        return torch.optim.Adam([{"params": [first]}, {"params": others, "lr": 1e-4}], lr=1e-3)

    model = PPO("CartPole-v1", **SMALL, optimizer=two)
    assert rates_of(fit, model, Sets("on_train_epoch_start", {1: 1e-5}, group=1)) == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    )
    assert model.trainer.optimizers[0].param_groups[1]["lr"] == 1e-5


def test_a_resumed_run_has_the_rate_that_a_callback_had_set(fit):
    sets = {1: 1e-4}
    whole = PPO("CartPole-v1", **SMALL)
    save = At("on_train_epoch_end", 2, lambda trainer, _: trainer.save_checkpoint("at.ckpt"))
    assert rates_of(fit, whole, Sets("on_train_epoch_start", sets), save) == [3e-4, 1e-4, 1e-4, 1e-4]
    resumed = PPO("CartPole-v1", **SMALL)
    assert rates_of(fit, resumed, Sets("on_train_epoch_start", sets), ckpt_path="at.ckpt") == [1e-4, 1e-4]
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_rate_that_is_set_between_updates_by_hand_is_the_rate():
    model = PPO("CartPole-v1", **SMALL)
    optimizer, rates = torch.optim.Adam(model.policy.parameters(), lr=1e-3), []
    for index in range(4):
        if index == 2:
            optimizer.param_groups[0]["lr"] = 1e-4
        model.learn(model.collect(), optimizer)
        rates.append(model.learning_rate)
    assert rates == pytest.approx([1e-3, 7.5e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(
    "owner",
    [Stages([Stage(learning_rate=1e-3)]), AdaptiveLearningRate()],
    ids=["stages", "adaptive"],
)
def test_two_callbacks_that_set_the_rate_are_refused(fit, owner):
    with pytest.raises(InputError, match=r"two callbacks set the learning rate of parameter group 0: .* and 1e-05"):
        fit(PPO("CartPole-v1", **SMALL), callbacks=[owner, Sets("on_train_epoch_start", {1: 1e-5})])


@pytest.mark.parametrize("start", [2, 0.5])
def test_stochastic_weight_averaging_is_refused(fit, start):
    with pytest.raises(InputError, match="WeightAveraging, and lr_scheduler for the rate"):
        fit(
            PPO("CartPole-v1", **SMALL),
            callbacks=[StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=start)],
            max_epochs=4,
        )


@pytest.mark.parametrize("name", ["min_epochs", "min_steps"])
def test_a_least_length_beyond_total_steps_is_refused(fit, name):
    with pytest.raises(InputError, match=f"{name}=5 would train beyond total_steps, which is reached after 4 iter"):
        fit(PPO("CartPole-v1", **SMALL), **{name: 5})
    model = PPO("CartPole-v1", **SMALL)
    assert fit(model, **{name: 4}).global_step == int(model.iterations) == 4


OTHERS = {
    "SGD": (partial(torch.optim.SGD, lr=1e-3), r"optimizer.*, this run has SGD, which cannot continue"),
    "AdamW": (partial(torch.optim.AdamW, lr=1e-3), r"optimizer Adam, this run has AdamW"),
    "RMSprop": (partial(torch.optim.RMSprop, lr=1e-3), "RMSprop"),
    "groups": (lambda ps: torch.optim.Adam([{"params": [one]} for one in ps]), r"groups of \[12\] tensors, .*\[1, 1, "),
}


@pytest.mark.parametrize("old", [False, True], ids=["", "a file that does not name it"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_than_the_checkpoints_is_refused(fit, tmp_path, name, old):
    if old and name == "AdamW":
        pytest.skip("its numbers are Adam's")
    factory, message = OTHERS[name]
    trainer = fit(PPO("CartPole-v1", **SMALL), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    if old:
        contents = torch.load(tmp_path / "a.ckpt", weights_only=True)
        del contents["ppo_lightning"]["optimizer"]
        trainer.strategy.save_checkpoint(contents, tmp_path / "a.ckpt")
    model = PPO("CartPole-v1", **SMALL, optimizer=factory)
    with pytest.raises(InputError, match=message):
        fit(model, ckpt_path=tmp_path / "a.ckpt")
    assert int(PPO.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=factory).iterations) == 2  # to act


def test_another_scheduler_than_the_checkpoints_is_refused(fit, tmp_path):
    step, cosine = (partial(one, **given) for one, given in (
        (torch.optim.lr_scheduler.StepLR, {"step_size": 1}), (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 4}),
    ))  # fmt: skip
    fit(PPO("CartPole-v1", **SMALL, lr_scheduler=step), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="lr_scheduler StepLR, this run has CosineAnnealingLR"):
        fit(PPO("CartPole-v1", **SMALL, lr_scheduler=cosine), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (torch.optim.Adam, partial(torch.optim.Adam, amsgrad=True)),
        (torch.optim.RMSprop, partial(torch.optim.RMSprop, centered=True)),
        (torch.optim.RMSprop, partial(torch.optim.RMSprop, momentum=0.9)),
    ],
)
def test_an_optimizer_whose_state_the_checkpoint_lacks_is_refused(fit, tmp_path, before, now):
    options = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
    fit(PPO("CartPole-v1", total_steps=32, optimizer=before, **options)).save_checkpoint(tmp_path / "at.ckpt")
    with pytest.raises(InputError, match=r"was trained without (amsgrad|centered|momentum), whose state"):
        fit(PPO("CartPole-v1", total_steps=64, optimizer=now, **options), ckpt_path=tmp_path / "at.ckpt")


# --- advantages that are recomputed --------------------------------------------------------------------------------------


class Recorded(PPOLoss):
    """Keeps the estimates of each epoch of one minibatch, as a rollout has them, and what the critic said in it."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.epochs = shape, []

    def forward(self, batch, evaluate, coefficients):
        seen = {name: batch[name] for name in ("state_value", "advantage", "value_target")}
        seen["value"] = evaluate(batch)[2].detach()
        order = batch["place"].argsort()
        self.epochs.append({name: one[order].view(self.shape).clone() for name, one in seen.items()})
        return super().forward(batch, evaluate, coefficients)


def recorded(fit, env, lr, **options):
    """One iteration: the rollout, and the estimates of each of its epochs."""
    options = {"num_envs": 3, "num_steps": 16, "total_steps": 48, "update_epochs": 3, "num_minibatches": 1, **options}
    kept = {}

    def number(trainer, module, rollout):
        rollout["place"] = torch.arange(rollout.numel()).view(rollout.shape)

    watch = PPOCallback(
        on_rollout_end=number, on_update_start=lambda trainer, module, rollout: kept.update(rollout=rollout.clone())
    )
    optimizer = partial(torch.optim.SGD, lr=lr)
    loss = Recorded((options["num_steps"], options["num_envs"]))
    model = PPO(env, loss=loss, optimizer=optimizer, normalize_advantage=False, recompute_advantages=True, **options)
    fit(model, callbacks=[watch])
    return model, kept["rollout"], loss.epochs


SHORT = {"env_kwargs": {"max_episode_steps": 5}}  # time limits bootstrap from final observations
KINDS = {
    "time limits": ("Pendulum-v1", SHORT),
    "normalised": ("Pendulum-v1", {**SHORT, "normalize_observation": True, "normalize_reward": True}),
    "tensors": (partial(Pendulum, max_episode_steps=5), {}),
    "ends": ("CartPole-v1", {"num_steps": 64, "total_steps": 192}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_recomputed_with_an_unchanged_critic_are_the_same(fit, kind):
    env, options = KINDS[kind]
    _, rollout, epochs = recorded(fit, env, 0.0, **options)
    assert (rollout["terminated"] | rollout["truncated"]).any()
    assert len(epochs) == 3
    for epoch in epochs:
        for name in ("state_value", "advantage", "value_target"):
            assert_close(epoch[name], rollout[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_the_advantages_of_the_critic_as_it_then_is(fit, kind):
    env, options = KINDS[kind]
    model, rollout, epochs = recorded(fit, env, 0.1, **options)
    assert not torch.allclose(epochs[1]["state_value"], epochs[0]["state_value"], atol=1e-4)
    for epoch in epochs:
        assert_close(epoch["state_value"], epoch["value"], atol=1e-4, rtol=1e-4)
        advantage = epoch["value_target"] - epoch["state_value"]
        assert_close(epoch["advantage"], advantage, atol=1e-5, rtol=1e-5)
        # Where no step of a rollout ended an episode and another follows, δ + γλ A holds by the new values alone.
        reward, goes = model.reward_normalizer(rollout["reward"]), ~(rollout["terminated"] | rollout["truncated"])[:-1]
        delta = reward[:-1] + model.gamma * epoch["state_value"][1:] - epoch["state_value"][:-1]
        sums = delta + model.gamma * model.gae_lambda * epoch["advantage"][1:]
        assert_close(epoch["advantage"][:-1][goes], sums[goes], atol=1e-4, rtol=1e-4)


def test_each_epoch_has_the_critics_present_values_in_half_precision_too(fit):
    """Autocast keeps converted weights, which steps in between have changed."""
    _, _, epochs = recorded(partial(fit, precision="bf16-mixed"), "Pendulum-v1", 1.0, update_epochs=4)
    for epoch in epochs[1:]:
        assert_close(epoch["state_value"], epoch["value"].to(epoch["state_value"]), atol=2e-2, rtol=2e-2)


class Seen(PPOLoss):
    """Keeps the advantages of each minibatch."""

    def __init__(self):
        super().__init__()
        self.advantages = []

    def forward(self, batch, evaluate, coefficients):
        self.advantages.append(batch["advantage"].clone())
        return super().forward(batch, evaluate, coefficients)


def test_recomputed_advantages_are_normalised_over_all_ranks():
    """In each epoch by the moments of what both ranks have computed for it."""

    def run(rank):
        torch.manual_seed(0)
        model = PPO(
            "Pendulum-v1", loss=Seen(), optimizer=partial(torch.optim.SGD, lr=0.1), recompute_advantages=True,
            normalize_advantage="all_ranks", num_envs=2, num_steps=16, num_minibatches=1, update_epochs=4, total_steps=64,
        )  # fmt: skip
        fit_in_process(model, strategy="ddp", devices=2)
        return model.loss.advantages

    epochs = [torch.cat(both) for both in zip(*forked(run), strict=True)]
    assert len(epochs) == 4
    for epoch in epochs:
        assert epoch.mean().abs() < 1e-5
        assert epoch.std() == pytest.approx(1.0, abs=1e-4)
    assert not torch.allclose(epochs[0], epochs[1], atol=1e-3)


def test_a_rollout_keeps_the_values_that_it_was_collected_with(fit):
    options = {"recompute_advantages": True, "optimizer": sgd, "clip_range_vf": 0.2, "popart": PopArt()}
    model = PPO("Pendulum-v1", **options, **SMALL)
    seen = []

    class Watched(PPOCallback):
        def on_update_start(self, trainer, module, rollout):
            self.rollout, self.before = rollout, rollout.clone()

        def on_update_end(self, trainer, module, update):
            seen.append((self.rollout["state_value"], self.before["state_value"]))

    fit(model, callbacks=[Watched()])
    assert len(seen) == 4
    for after, before in seen:
        assert_close(after, before, atol=0, rtol=0)


def test_advantages_of_a_recurrent_network_are_not_recomputed():
    with pytest.raises(InputError, match="recompute_advantages needs a network that is not recurrent"):
        PPO("CartPole-v1", policy=partial(ActorCritic, rnn="gru"), recompute_advantages=True)


# --- a second implementation ------------------------------------------------------------------------------------------


def stable_baselines3s(model: PPO, rollout, env: str, **options):
    """Its PPO with the same weights, whose buffer holds the same rollout."""
    num_steps, num_envs = rollout.shape
    theirs = StableBaselines3PPO(
        "MlpPolicy", make_vec_env(env, num_envs), n_steps=num_steps, batch_size=num_steps * num_envs,
        n_epochs=model.updater.update_epochs, gamma=model.gamma, gae_lambda=model.gae_lambda, device="cpu", **options,
    )  # fmt: skip
    theirs.set_logger(configure(None, []))
    theirs.policy.load_state_dict(as_theirs(model))
    buffer, done = theirs.rollout_buffer, rollout["terminated"] | rollout["truncated"]
    starts = torch.cat([torch.zeros(1, num_envs, dtype=torch.bool), done[:-1]])
    reward = rollout["reward"] + model.gamma * rollout["next_state_value"] * (
        rollout["truncated"] & ~rollout["terminated"]
    )
    for step in range(num_steps):
        buffer.add(
            rollout["observation"][step].numpy(), rollout["action"][step].numpy(), reward[step].numpy(),
            starts[step].numpy(), rollout["state_value"][step], rollout["action_log_prob"][step],
        )  # fmt: skip
    buffer.compute_returns_and_advantage(rollout["next_state_value"][-1], done[-1].numpy())
    return theirs


def as_theirs(model: PPO) -> dict[str, torch.Tensor]:
    """The weights under Stable-Baselines3's names."""
    parts = {
        "mlp_extractor.policy_net": model.policy.network.actor_trunk.layers,
        "mlp_extractor.value_net": model.policy.network.critic_trunk.layers,
        "action_net": getattr(model.policy.network.action_head, "mean", model.policy.network.action_head),
        "value_net": model.policy.network.value_head,
    }
    found = {f"{name}.{key}": one.clone() for name, part in parts.items() for key, one in part.state_dict().items()}
    log_std = getattr(model.policy.network.action_head, "log_std", None)
    return found if log_std is None else {**found, "log_std": log_std.detach().clone()}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_ten_epochs_on_the_same_rollout_give_the_weights_of_stable_baselines3(env):
    """Also across time limits: from advantages to the tenth step of the optimizer."""
    torch.manual_seed(0)
    options = {"ent_coef": 0.01, "vf_coef": 0.4, "max_grad_norm": 0.3}
    model = PPO(
        env,
        num_envs=3,
        num_steps=250,
        num_minibatches=1,
        update_epochs=10,
        total_steps=10**9,
        clip_range_vf=0.2,
        **options,
    )
    rollout = model.collect()
    theirs = stable_baselines3s(model, rollout, env, clip_range_vf=0.2, **options)
    assert_close(torch.from_numpy(theirs.rollout_buffer.advantages), rollout["advantage"], atol=1e-5, rtol=1e-5)
    assert (rollout["truncated"] if env == "Pendulum-v1" else rollout["terminated"]).any()
    theirs.train()
    before = as_theirs(model)
    model.learn(rollout, torch.optim.Adam(model.parameters(), lr=3e-4, eps=1e-5))
    for name, weight in as_theirs(model).items():
        assert_close(weight, theirs.policy.state_dict()[name], atol=1e-6, rtol=1e-6)
        assert not torch.equal(weight, before[name])
