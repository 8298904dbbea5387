"""The algorithm's parts are values: a loss, an advantage estimator, keys of one's own, in every mode."""

import ast
import math
import pickle
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import pytest
import torch
from processes import forked
from torch import nn
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError, PPOCallback, PPOLoss, gae
from ppo_lightning.callbacks import AdaptiveLearningRate, RolloutDetails, Stage, Stages
from ppo_lightning.cli import CLI_OPTIONS, PPOCLI

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 4 * 32, "update_epochs": 2, "num_minibatches": 2}


class NextObservation(PPOLoss):
    def __init__(self, size: int, coef: float = 0.1) -> None:
        super().__init__()
        self.head, self.coef = nn.Linear(size, 1), coef

    def forward(self, batch, evaluate, coefficients):
        losses = super().forward(batch, evaluate, coefficients)
        error = (self.head(batch["observation"]).squeeze(-1) - batch["bonus"]).square().mean()
        return {**losses, "loss": losses["loss"] + self.coef * error, "bonus_error": error}


def monte_carlo(rollout, *, gamma, gae_lambda):
    return gae(rollout, gamma=gamma, gae_lambda=1.0)


class Bonus(PPOCallback):
    def on_rollout_end(self, trainer, model, rollout):
        rollout["bonus"] = rollout["observation"][..., 0].abs()


class Logged(PPOCallback):
    def __init__(self):
        super().__init__()
        self.rows = []

    def on_iteration_end(self, trainer, pl_module, metrics):
        self.rows.append(metrics)


def trained(model, *callbacks, ranks=1, max_epochs=-1, **options):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False, max_epochs=max_epochs,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, **options)
    return trainer


def weights(module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in module.state_dict().items()}


def seeded(make):
    lightning.seed_everything(3, verbose=False)
    return make()


# --- the code of the documentation, in every mode ----------------------------------------------------------------------


def pendulum(**options) -> PPO:
    options = {**SMALL, "advantage_estimator": monte_carlo, **options}
    return seeded(lambda: PPO("Pendulum-v1", loss=NextObservation(3), **options))


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_with_parameters_an_estimator_and_a_key_of_a_callback(compile):
    model, logged = pendulum(compile=compile), Logged()
    before = weights(model)
    trained(model, Bonus(), logged)
    after = weights(model)
    assert (model.updater.compiled is not None) == compile
    for name in ("loss.head.weight", "policy.network.value_head.weight"):
        assert not torch.equal(before[name], after[name])
    assert [row["train/bonus_error"] > 0 for row in logged.rows] == [True] * 4


def test_compiled_and_eager_are_equal():
    eager, compiled = pendulum(), pendulum(compile=True)
    trained(eager, Bonus())
    trained(compiled, Bonus())
    assert_close(weights(compiled), weights(eager), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(compile, tmp_path):
    whole = pendulum(compile=compile)
    trained(whole, Bonus())
    first = pendulum(compile=compile)
    trained(first, Bonus(), max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    second = pendulum(compile=compile)
    trained(second, Bonus(), ckpt_path=tmp_path / "two.ckpt")
    assert_close(weights(second), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("compile", [False, True])
def test_all_ranks_have_the_same_parameters(compile):
    def train(rank):
        model = pendulum(compile=compile, total_steps=2 * SMALL["total_steps"])
        with torch.no_grad():
            model.loss.head.weight.add_(rank)  # as if each rank had drawn its own
        trained(model, Bonus(), ranks=2)
        return {name: one.numpy() for name, one in weights(model).items() if name.startswith(("loss", "policy"))}

    one, other = forked(train)
    for name in one:
        assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_checkpoint_acts_without_the_loss_and_trains_with_it(tmp_path):
    model = pendulum()
    trainer = trained(model, Bonus())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = PPO.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_close(loaded.policy.state_dict(), model.policy.state_dict())
    with pytest.raises(InputError, match="=… again"):
        trained(loaded, Bonus())
    whole = PPO.load_from_checkpoint(tmp_path / "a.ckpt", loss=NextObservation(3), advantage_estimator=monte_carlo)
    assert_close(whole.loss.head.weight, model.loss.head.weight)


# --- losses ------------------------------------------------------------------------------------------------------------


def only_value(batch, evaluate, coefficients):
    """A loss that is a plain function, and no PPOLoss."""
    _, _, value = evaluate(batch)
    return {"loss": (value - batch["value_target"]).square().mean()}


class OwnLoss(nn.Module):
    """A loss with a parameter that does not evaluate the minibatch."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, batch, evaluate, coefficients):
        return {"loss": (self.scale * batch["advantage"]).square().mean()}


def test_callbacks_do_without_the_diagnostics_of_a_loss_that_does_not_evaluate_or_ask_for_them():
    trained(PPO("CartPole-v1", loss=OwnLoss(), **SMALL), RolloutDetails())
    with pytest.raises(InputError, match="AdaptiveLearningRate needs the divergence"):
        trained(PPO("CartPole-v1", loss=OwnLoss(), **SMALL), AdaptiveLearningRate())


def test_the_file_of_a_gradient_that_is_not_finite_holds_the_parameters_of_the_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = PPO("CartPole-v1", loss=OwnLoss(math.inf), **SMALL)
    with pytest.raises(FloatingPointError):
        model.learn(model.collect(), model.optimizer(model.parameters()))
    left = torch.load("non_finite.pt", weights_only=True)
    assert left["loss"]["scale"].isinf()


@pytest.mark.parametrize("compile", [False, True])
def test_a_plain_function_is_a_loss(compile):
    model, logged = PPO("CartPole-v1", loss=only_value, compile=compile, target_kl=10.0, **SMALL), Logged()
    trained(model, logged)
    assert {"train/loss", "train/approx_kl", "train/clip_fraction"} <= logged.rows[0].keys()
    assert "train/value_loss" not in logged.rows[0]


@pytest.mark.parametrize("compile", [False, True])
def test_every_key_of_the_rollout_reaches_the_loss(compile):
    seen = set()

    class Sees(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            seen.update((name, *leaf.shape) for name, leaf in batch.items())
            return super().forward(batch, evaluate, coefficients)

    trained(PPO("Pendulum-v1", loss=Sees(), compile=compile, **SMALL), Bonus())
    assert {("observation", 16, 3), ("action", 16, 1), ("reward", 16), ("terminated", 16), ("truncated", 16)} <= seen
    assert {("next_state_value", 16), ("state_value", 16), ("advantage", 16), ("bonus", 16)} <= seen


@pytest.mark.parametrize("compile", [False, True])
def test_a_term_on_the_hidden_features_reaches_the_policy(compile):
    class Small(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            return {"loss": evaluate.latent(batch).square().mean(), "width": float(evaluate.latent(batch).shape[1])}

    model, logged = seeded(lambda: PPO("CartPole-v1", loss=Small(), compile=compile, **SMALL)), Logged()
    before = weights(model.policy)
    trained(model, logged)
    changed = {name for name, one in weights(model.policy).items() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if "actor_trunk" in name}
    assert logged.rows[0]["train/width"] == 64


def test_the_hidden_features_of_a_recurrent_policy_are_sequences():
    shapes = []

    class Sees(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            shapes.append(tuple(evaluate.latent(batch).shape))
            return super().forward(batch, evaluate, coefficients)

    from ppo_lightning import ActorCritic

    policy = partial(ActorCritic, hidden_sizes=(8,), rnn="lstm", rnn_size=5)
    trained(PPO("CartPole-v1", loss=Sees(), policy=policy, sequence_length=8, **SMALL))
    assert set(shapes) == {(2, 8, 5)}


@pytest.mark.parametrize("compile", [False, True])
def test_a_term_on_the_policy_by_a_reference_of_its_own_has_a_gradient(compile):
    class Refers(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            latent = self.policy[0].network.actor_trunk(batch["observation"])
            return {"loss": latent.square().mean()}

    loss = Refers()
    model = seeded(lambda: PPO("CartPole-v1", loss=loss, compile=compile, **SMALL))
    loss.policy = [model.policy]
    before = weights(model.policy)
    trained(model)
    changed = {name for name, one in weights(model.policy).items() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if "actor_trunk" in name}


def test_a_loss_that_cannot_be_traced_falls_back_to_eager_and_is_the_same():
    class Branches(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            losses = super().forward(batch, evaluate, coefficients)
            return losses if losses["value_loss"].item() > 0 else {**losses, "loss": -losses["loss"]}

    eager = seeded(lambda: PPO("CartPole-v1", loss=Branches(), **SMALL))
    trained(eager)
    model = seeded(lambda: PPO("CartPole-v1", loss=Branches(), compile=True, **SMALL))
    with pytest.warns(UserWarning, match="compile: true has no effect on the update, since") as caught:
        trained(model)
    assert len([one for one in caught if "has no effect on the update" in str(one.message)]) == 1
    assert_close(weights(model.policy), weights(eager.policy), rtol=1e-4, atol=1e-6)  # values are compiled


def test_a_loss_that_cannot_be_traced_falls_back_on_all_ranks():
    def train(rank):
        class Branches(PPOLoss):
            def forward(self, batch, evaluate, coefficients):
                losses = super().forward(batch, evaluate, coefficients)
                if rank == 1 and losses["value_loss"].item() < 0:  # the other rank could compile it
                    raise AssertionError
                return losses

        options = {**SMALL, "total_steps": 2 * SMALL["total_steps"]}
        model = seeded(lambda: PPO("CartPole-v1", loss=Branches(), compile=True, **options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trained(model, ranks=2)
        return model.updater.compiled is None, model.num_env_steps

    assert forked(train) == [(True, 256), (True, 256)]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda losses: losses["loss"], "must return a dictionary of scalars with the key loss, got Tensor"),
        (lambda losses: {"total": losses["loss"]}, "must return a dictionary of scalars with the key loss, got dict"),
        (lambda losses: {**losses, "each": torch.zeros(16)}, r"returned each as \(16,\): each value must be a scalar"),
        (lambda losses: {**losses, "each": "much"}, "returned each as str: each value must be a scalar"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(compile, returned, message):
    class Wrong(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            return returned(super().forward(batch, evaluate, coefficients))

    model = PPO("CartPole-v1", loss=Wrong(), compile=compile, **SMALL)
    before = weights(model)
    with pytest.raises(InputError, match=message):
        trained(model)
    assert_close(weights(model), before)


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_replaced_between_two_iterations_is_used(compile):
    class Nothing(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            return {"loss": 0.0 * evaluate(batch)[0].sum()}

    class Replaces(PPOCallback):
        def on_iteration_start(self, trainer, pl_module):
            if pl_module.policy_version == 2:
                pl_module.loss = Nothing()
                self.kept = weights(pl_module.policy)

    optimizer = partial(torch.optim.Adam, lr=1e-3, betas=(0.0, 0.999))  # without momentum, no gradient is no step
    model, replaces = PPO("CartPole-v1", compile=compile, optimizer=optimizer, **SMALL), Replaces()
    before = weights(model.policy)
    trained(model, replaces)
    assert (model.updater.compiled is not None) == compile
    assert not torch.equal(before["network.value_head.bias"], replaces.kept["network.value_head.bias"])
    assert_close(weights(model.policy), replaces.kept, rtol=0, atol=0)


def test_names_that_change_are_refused():
    class Changes(PPOLoss):
        calls = 0

        def forward(self, batch, evaluate, coefficients):
            self.calls += 1
            return {**super().forward(batch, evaluate, coefficients), f"call_{self.calls}": torch.zeros(())}

    with pytest.raises(InputError, match="return the same names in the same order"):
        trained(PPO("CartPole-v1", loss=Changes(), **SMALL))


def test_target_kl_needs_the_divergence():
    def constant(batch, evaluate, coefficients):
        return {"loss": 0.0 * parameter.sum()}

    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match="target_kl needs the divergence: call evaluate"):
        trained(PPO("CartPole-v1", loss=constant, target_kl=0.1, **SMALL))


def test_what_is_no_loss_is_refused():
    with pytest.raises(InputError, match="loss must be"):
        PPO("CartPole-v1", loss=3)  # pyright: ignore[reportArgumentType]


# --- advantage estimators ----------------------------------------------------------------------------------------------


def test_the_estimator_finds_rewards_as_they_are_learnt_from_and_the_rollout_keeps_the_environments():
    rewards = []

    def estimator(rollout, *, gamma, gae_lambda):
        rewards.append(rollout["reward"].clone())
        return gae(rollout, gamma=gamma, gae_lambda=gae_lambda)

    model = PPO("Pendulum-v1", advantage_estimator=estimator, normalize_reward=True, **SMALL)
    rollout = model.collect()
    assert_close(rewards[0], model.reward_normalizer(rollout["reward"]))
    assert not torch.allclose(rewards[0], rollout["reward"])


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda advantage, target: advantage, "got Tensor"),
        (lambda advantage, target: (advantage, target[0]), r"got shapes \[\(16, 2\), \(2,\)\]"),
        (lambda advantage, target: (advantage, target, target), "got shapes"),
    ],
)
def test_an_estimator_that_returns_something_else_is_refused(returned, got):
    def estimator(rollout, **given):
        return returned(*gae(rollout, **given))

    with pytest.raises(InputError, match=rf"advantage_estimator must return .* of shape \(16, 2\), {got}"):
        PPO("CartPole-v1", advantage_estimator=estimator, **SMALL).collect()


# --- the examples of the documentation ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs/changing_the_algorithm.md").read_text()
EXAMPLES = {
    re.findall(r"(?:class|def) (\w+)", code)[0]: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}


def example(name, **options):
    """Its model, of a small size, and its callbacks."""
    *definitions, model, fit = ast.parse(EXAMPLES[name]).body
    space: dict = {}
    exec(ast.unparse(ast.Module(definitions, [])), space)
    (model, fit) = (cast(Any, one).value for one in (model, fit))
    lightning.seed_everything(5, verbose=False)
    given = {one.arg: eval(ast.unparse(one.value), space) for one in model.keywords if one.arg != "total_steps"}
    callbacks = [eval(ast.unparse(one.value), space) for one in fit.func.value.keywords]
    options = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "total_steps": 96, **options}
    return seeded(lambda: PPO("Pendulum-v1", **given, **options)), [one for each in callbacks for one in each]


def test_there_are_examples_of_at_most_30_lines():
    assert EXAMPLES.keys() == {"RewardPrediction", "ClipHigher", "SPOLoss", "upgo", "RND", "Mirrored"}
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 30 for code in EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_trains_compiled_as_eager(name):
    (eager, callbacks), (model, others) = example(name), example(name, compile=True)
    before = weights(eager)
    trained(eager, *callbacks)
    trained(model, *others)
    assert model.updater.compiled is not None
    assert_close(weights(model), weights(eager), rtol=1e-3, atol=1e-4)
    assert not torch.equal(
        weights(eager)["policy.network.value_head.weight"], before["policy.network.value_head.weight"]
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_trains_on_two_ranks(name):
    def train(rank):
        model, callbacks = example(name, total_steps=128)
        trained(model, *callbacks, ranks=2)
        return {key: one.numpy() for key, one in weights(model).items() if key.startswith(("loss", "policy"))}

    one, other = forked(train)
    for key in one:
        assert_close(one[key], other[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_resumes_bit_exactly(name, tmp_path):
    whole, callbacks = example(name)
    trained(whole, *callbacks)
    first, callbacks = example(name)
    trained(first, *callbacks, max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    second, callbacks = example(name)
    trained(second, *callbacks, ckpt_path=tmp_path / "two.ckpt")
    assert_close(weights(second), weights(whole), rtol=0, atol=0)


def test_an_estimator_of_the_documentation_is_its_formula():
    """UPGO by its definition, over two environments in which episodes end in both ways."""
    model, _ = example("upgo", num_steps=32)
    rollout = seeded(model.collect).clone()
    generator = torch.Generator().manual_seed(0)
    for key in ("reward", "state_value", "next_state_value"):
        rollout[key] = torch.randn(32, 2, generator=generator)
    rollout["terminated"] = torch.rand(32, 2, generator=generator) < 0.1
    rollout["truncated"] = torch.rand(32, 2, generator=generator) < 0.1
    advantage, target = model.advantage_estimator(rollout, gamma=0.9, gae_lambda=0.5)
    one_step = rollout["reward"] + 0.9 * rollout["next_state_value"] * ~rollout["terminated"]
    for env in range(2):
        for t in range(32):
            total, discount, step = 0.0, 1.0, t
            while True:
                total += discount * float(rollout["reward"][step, env])
                discount *= 0.9
                over = rollout["terminated"][step, env] or rollout["truncated"][step, env] or step == 31
                better = not over and one_step[step + 1, env] >= rollout["state_value"][step + 1, env]
                if not better:
                    value = rollout["next_state_value"][step, env] if over else rollout["state_value"][step + 1, env]
                    total += discount * float(value) * (not rollout["terminated"][step, env])
                    break
                step += 1
            assert float(target[t, env]) == pytest.approx(total, rel=1e-4, abs=1e-5)
    assert_close(advantage, target - rollout["state_value"])


# --- schedules have one owner ------------------------------------------------------------------------------------------


class Fixes(PPOCallback):
    """Sets a schedule, as a callback of one's own does."""

    def __init__(self, name, value):
        super().__init__()
        self.name, self.value = name, value

    def on_iteration_start(self, trainer, pl_module):
        pl_module.schedules.override(self.name, self.value, owner=self)


@pytest.mark.parametrize(
    ("name", "metric"),
    [("lr", "train/learning_rate"), ("clip_range", "train/clip_range"), ("ent_coef", "train/ent_coef")],
)
def test_a_callback_overrides_a_schedule_and_restores_it(name, metric):
    model, logged, fixes = PPO("CartPole-v1", **SMALL), Logged(), Fixes(name, 0.125)
    trained(model, fixes, logged)
    assert [row[metric] for row in logged.rows] == [0.125] * 4
    own = model.schedules[name]
    model.schedules.override(name, None, owner=fixes)
    assert model.schedules[name] != own


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([Fixes("lr", 1e-3), Fixes("lr", 1e-4)], {}, "Fixes and Fixes both set the learning rate"),
        ([Stages([Stage(clip_range=0.1)]), Fixes("clip_range", 0.2)], {}, "Fixes and Stages both set clip_range"),
        (
            [Fixes("lr", 1e-3)],
            {"lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1)},
            "Fixes and lr_scheduler both set the learning rate",
        ),
        ([Fixes("gamma", 0.9)], {}, "there is no schedule gamma: take one of lr, clip_range, ent_coef"),
    ],
)
def test_a_second_owner_is_refused_by_name(callbacks, options, message):
    with pytest.raises(InputError, match=message):
        trained(PPO("CartPole-v1", **SMALL, **options), *callbacks)


# --- subclasses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
def test_the_samples_of_a_subclass_are_used(compile):
    class Half(PPO):
        def training_samples(self, rollout):
            return {name: tensor[::2] for name, tensor in super().training_samples(rollout).items()}

    sizes = set()

    class Sees(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            sizes.add(len(batch["advantage"]))
            return super().forward(batch, evaluate, coefficients)

    trained(Half("CartPole-v1", loss=Sees(), compile=compile, **SMALL))
    assert sizes == {8} if not compile else 8 in sizes


def test_the_command_line_trains_the_class_that_it_is_given(tmp_path, monkeypatch):
    from ppo_lightning.cli import PPOCLI

    kinds = []

    class MyPPO(PPO):
        def on_train_start(self):
            super().on_train_start()
            kinds.append(type(self).__name__)

    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model.env", "CartPole-v1", "--model.num_envs", "2", "--model.num_steps", "16"]
    words += ["--model.total_steps", "32", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]
    PPOCLI(MyPPO, args=[*words, "--trainer.enable_progress_bar", "false"])
    assert kinds == ["MyPPO"]


# --- the same by YAML --------------------------------------------------------------------------------------------------

MODULE = """
import torch
from ppo_lightning import PPO, PPOLoss, gae

class NextObservation(PPOLoss):
    def __init__(self, size: int, coef: float = 0.1) -> None:
        super().__init__()
        self.head, self.coef = torch.nn.Linear(size, 1), coef

    def forward(self, batch, evaluate, coefficients):
        losses = super().forward(batch, evaluate, coefficients)
        error = self.head(batch["observation"]).square().mean()
        return {**losses, "loss": losses["loss"] + self.coef * error, "error": error}

def monte_carlo(rollout, *, gamma, gae_lambda):
    return gae(rollout, gamma=gamma, gae_lambda=1.0)

class Discounted:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, rollout, *, gamma, gae_lambda):
        return gae(rollout, gamma=self.factor * gamma, gae_lambda=gae_lambda)

class MyPPO(PPO):
    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.mine = True
"""


@pytest.mark.parametrize(
    "estimator", ["my_package.monte_carlo", "{class_path: my_package.Discounted, init_args: {factor: 0.5}}"]
)
def test_loss_and_estimator_by_yaml(estimator, tmp_path: Path, monkeypatch):
    from ppo_lightning.cli import main

    (tmp_path / "my_package.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(
        f"""
trainer: {{accelerator: cpu, enable_progress_bar: false, limit_val_batches: 0}}
model:
  env: Pendulum-v1
  num_envs: 2
  num_steps: 16
  total_steps: 64
  num_minibatches: 2
  loss: {{class_path: my_package.NextObservation, init_args: {{size: 3}}}}
  advantage_estimator: {estimator}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "config.yaml"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["state_dict"]["loss.head.weight"].shape == (1, 3)
    main(["fit", "--config", "config.yaml", "--model.total_steps", "128", "--ckpt_path", str(checkpoint)])
    model = PPO.load_from_checkpoint(checkpoint)  # acts without what a file may not name
    assert model.predict(model.observation_space.sample()).shape == (1,)


class WithBonus(PPO):
    """A subclass with an argument of its own."""

    def __init__(self, *args: Any, bonus: float = 0.1, **kwargs: Any) -> None:
        bonus = bonus / 2  # what the constructor makes of its arguments is not what it was given
        scale = kwargs.pop("scale", 1)
        super().__init__(*args, **kwargs)
        self.bonus, self.scale = 2 * bonus, scale


class Saving(PPO):
    """The idiom of Lightning, and arguments that it passes on changed."""

    def __init__(self, env: str = "CartPole-v1", num_envs: int = 1, scale: Any = None, **kwargs: Any) -> None:
        super().__init__(env, num_envs=2 * num_envs, **kwargs)
        self.save_hyperparameters()
        self.scale = scale


SHORT = {"num_steps": 8, "total_steps": 64, "num_eval_episodes": 1, "compile": False}


def saved(model: PPO, fit) -> Path:
    fit(model).save_checkpoint("model.ckpt")
    return Path("model.ckpt")


def test_a_checkpoint_has_the_arguments_of_a_subclass(fit):
    given = WithBonus("CartPole-v1", num_envs=2, bonus=5.0, scale=3, **SHORT)
    loaded = WithBonus.load_from_checkpoint(saved(given, fit))
    assert (loaded.bonus, loaded.scale) == (5, 3)
    loaded = Saving.load_from_checkpoint(saved(Saving(num_envs=np.int64(2), scale=3, **SHORT), fit))
    assert (loaded.num_envs, loaded.scale) == (4, 3)


@pytest.mark.parametrize("name", ["policy", "scale"])
def test_what_a_subclass_saves_and_no_file_can_hold_is_asked_for(name, fit):
    value = partial(ActorCritic, hidden_sizes=[4])
    path = saved(Saving(num_envs=1, **{name: value}, **SHORT), fit)
    with pytest.raises(InputError, match=f"made with a value of {name} which a file of plain data cannot hold"):
        Saving.load_from_checkpoint(path)
    assert Saving.load_from_checkpoint(path, **{name: value}).num_envs == 2


def test_a_run_of_the_command_line_that_python_continues_stays_loadable(fit, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    flags = {
        "env": "CartPole-v1",
        "num_envs": 2,
        "bonus": 2.0,
        "optimizer": "torch.optim.SGD",
        "optimizer.lr": 0.01,
        **SHORT,
    }
    words = [f"--model.{key}={str(value).lower() if value is False else value}" for key, value in flags.items()]
    PPOCLI(WithBonus, **CLI_OPTIONS, args=["fit", *words, "--trainer.accelerator=cpu", "--name=mine"])
    first = Path("lightning_logs/mine_0/checkpoints/last.ckpt")
    model = WithBonus.load_from_checkpoint(first, total_steps=96)
    assert model.hyperparameters.unsaved == []
    path = saved(model, fit)
    again = WithBonus.load_from_checkpoint(path, total_steps=128)
    assert (again.num_env_steps, again.bonus) == (96, 2.0)
    trainer = fit(again)
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    PPOCLI(WithBonus, **CLI_OPTIONS, args=["validate", "--ckpt_path", str(path), "--trainer.accelerator=cpu"])
    replaced = WithBonus.load_from_checkpoint(first, total_steps=96, policy=partial(ActorCritic, hidden_sizes=[64, 64]))
    path = saved(replaced, fit)
    with pytest.raises(InputError, match="made with a value of policy which a file of plain data cannot hold"):
        WithBonus.load_from_checkpoint(path)


def test_a_loaded_model_can_be_sent_to_another_process(fit):
    path = saved(PPO("CartPole-v1", num_envs=2, **SHORT), fit)
    model = pickle.loads(pickle.dumps(PPO.load_from_checkpoint(path, total_steps=128)))
    expected = PPO.load_from_checkpoint(path, total_steps=128)
    fit(model)
    fit(expected)
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_class_in_the_place_of_a_loss_is_refused():
    with pytest.raises(InputError, match=r"loss is the class PPOLoss: give an object, PPOLoss\(\)"):
        PPO("CartPole-v1", loss=PPOLoss)
