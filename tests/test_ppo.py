import inspect
import logging
import math
import pickle
import time
from functools import partial

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.tuner import Tuner
from probes import ActionMustMatch, ConstantReward, Target
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError, Linear, PopArt, PPOLoss
from ppo_lightning.algorithm.minibatches import split_samples
from ppo_lightning.callbacks import BestCheckpoint, LastCheckpoint, PPOCallback, StepProgressBar
from ppo_lightning.runs.clock import Clock
from ppo_lightning.runs.state import derive_seed

SMALL = {"num_envs": 4, "num_steps": 32, "total_steps": 512}


class Memory(Logger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "memory"
    version = 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def trained(fit, env="CartPole-v1", seed=1, logger=None, trainer=(), **kwargs) -> PPO:
    lightning.seed_everything(seed, verbose=False)
    model = PPO(env, **{**SMALL, **kwargs})
    fit(model, logger=logger or False, **dict(trainer))
    return model


def parameters(model: PPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


# --- the same mathematics, written plainly -----------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_equals_the_same_loop_in_plain_torch_bit_for_bit(fit, env):
    """No dataset, no TensorDict, no Lightning: environments, networks, generator, Adam."""
    lightning.seed_everything(3, verbose=False)
    model = PPO(env, num_envs=4, num_steps=32, total_steps=6 * 128, ent_coef=0.01, clip_range_vf=0.2)
    lightning.seed_everything(3, verbose=False)
    network = ActorCritic(model.observation_space, model.action_space)
    fit(model)

    discrete = env == "CartPole-v1"
    envs = SyncVectorEnv([lambda: gym.make(env)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4, eps=1e-5, fused=True)
    generator = torch.Generator().manual_seed(derive_seed(model.seed, "training", 0, 0))
    observation, _ = envs.reset(seed=3)
    for iteration in range(6):
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - iteration / 6)
        if discrete:
            noise = -torch.empty(32, 4, 2).exponential_(generator=generator).log()
        else:
            noise = torch.randn(32, 4, 1, generator=generator)
        seen, actions, rewards, terminal, done, finals = [], [], [], [], [], {}
        with torch.no_grad():
            for t in range(32):
                seen.append(torch.tensor(observation, dtype=torch.float32))
                output = network.actor(seen[-1])
                if discrete:
                    action = (output + noise[t]).argmax(-1)
                    given = action.numpy()
                else:
                    action = torch.addcmul(output[:, :1], output[:, 1:].exp(), noise[t])
                    given = action.numpy().clip(-2, 2)
                observation, reward, terminated, truncated, info = envs.step(given)
                actions.append(action)
                rewards.append(torch.tensor(reward, dtype=torch.float32))
                terminal.append(torch.tensor(terminated))
                done.append(torch.tensor(terminated | truncated))
                for i in np.flatnonzero(terminated | truncated):
                    finals[t, i] = torch.tensor(info["final_obs"][i])
            last = torch.tensor(observation, dtype=torch.float32)
            x, a = torch.cat(seen), torch.cat(actions)
            value = network.critic(x).view(32, 4)
            tail = network.critic(torch.stack([*last, *finals.values()]))
            next_value = torch.cat([value[1:], tail[None, :4]])
            for (t, i), v in zip(finals, tail[4:], strict=True):
                next_value[t, i] = v
            old_log_prob = log_probability(network.actor(x), a, discrete)[0]
            advantage = torch.zeros(32, 4)
            after = torch.zeros(4)
            for t in reversed(range(32)):
                delta = rewards[t] + 0.99 * next_value[t] * ~terminal[t] - value[t]
                advantage[t] = after = torch.addcmul(delta, 0.99 * 0.95 * ~done[t], after)
            target = (advantage + value).flatten()
            advantage, value = advantage.flatten(), value.flatten()
        for _ in range(4):
            order = torch.randperm(128, generator=generator)
            for index in order.split(32):
                log_prob, entropy = log_probability(network.actor(x[index]), a[index], discrete)
                normal = (advantage[index] - advantage[index].mean()) / (advantage[index].std() + 1e-8)
                ratio = (log_prob - old_log_prob[index]).exp()
                gain = torch.minimum(normal * ratio, normal * ratio.clamp(0.8, 1.2)).mean()
                moved = value[index] + (network.critic(x[index]) - value[index]).clamp(-0.2, 0.2)
                loss = -gain + 0.5 * (target[index] - moved).square().mean() - 0.01 * entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
    assert_close(dict(model.policy.network.named_parameters()), dict(network.named_parameters()), rtol=0, atol=0)


def log_probability(output, action, discrete):
    if discrete:
        log_probs = output.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # before the gather: gradients are summed in this order
        return log_probs.gather(-1, action[:, None])[:, 0], entropy
    mean, log_std = output.chunk(2, -1)
    z = (action - mean) * (-log_std).exp()
    log_std = log_std.sum(-1)
    log_2pi = math.log(2 * math.pi)
    return -0.5 * (z.square().sum(-1) + log_2pi) - log_std, log_std + 0.5 * (1 + log_2pi)


@pytest.mark.parametrize(
    "kwargs", [{}, {"normalize_observation": True, "normalize_reward": True}], ids=["plain", "normalised"]
)
@pytest.mark.parametrize(("env", "minibatches"), [("CartPole-v1", 4), ("Pendulum-v1", 4), ("Pendulum-v1", 7)])
def test_ratio_is_one_in_the_first_minibatch(fit, env, kwargs, minibatches):
    """In every iteration: normalisers are frozen from the rollout to the end of its update."""
    logger, steps = Memory(), []

    class First(PPO):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            samples = self.training_samples(batch)
            size = len(samples["advantage"])
            with torch.no_grad():
                for piece in split_samples(samples, [size // minibatches] * minibatches):
                    log_prob, *_ = self.policy.evaluate_actions(piece)
                    steps.append((log_prob - piece["action_log_prob"]).exp() - 1)

    lightning.seed_everything(0, verbose=False)
    still = partial(torch.optim.SGD, lr=0.0)  # the policy does not move, so every minibatch is a first one
    options = {**SMALL, "num_steps": 4 * 7 * 2 if minibatches == 7 else 64, "optimizer": still}
    model = First(env, num_minibatches=minibatches, **options, **kwargs)
    fit(model, logger=logger)
    assert len(steps) >= 2 * minibatches
    worst = max(step.abs().max().item() for step in steps)
    assert worst <= (0 if 256 % minibatches == 0 and 256 // minibatches % 16 == 0 else 1e-6)
    assert all(abs(row["train/approx_kl"]) < 1e-6 for _, row in logger.rows)


def test_ratio_is_one_under_autocast(fit):
    ratios = []

    class First(PPO):
        def training_step(self, batch, batch_idx):
            samples = self.training_samples(batch)
            log_prob, _, _ = self.policy.evaluate_actions(samples)
            ratios.append((log_prob - samples["action_log_prob"]).exp())
            super().training_step(batch, batch_idx)

    fit(First("CartPole-v1", **SMALL), precision="bf16-mixed")
    assert_close(torch.cat(ratios), torch.ones(len(torch.cat(ratios))), atol=1e-2, rtol=0)


# --- Lightning's side --------------------------------------------------------------------------------------------------


def test_no_rollout_is_a_policy_old(fit):
    """The version the rollout was collected with is the number of updates before it."""
    versions = []

    class Seen(PPO):
        def on_train_batch_start(self, batch, batch_idx):
            versions.append((batch["policy_version"], int(self.iterations)))
            super().on_train_batch_start(batch, batch_idx)

    fit(Seen("CartPole-v1", **SMALL))
    assert versions == [(i, i) for i in range(4)]


def test_refuses_a_rollout_of_an_older_policy():
    model = PPO("CartPole-v1", **SMALL)
    batch = model.rollouts.collect()
    model.iterations += 1
    with pytest.raises(InputError, match="policy 0, this is policy 1"):
        model.on_train_batch_start(batch, 0)


def test_a_bare_trainer_trains_to_total_steps(tmp_path, capsys):
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", num_envs=4, num_steps=32, total_steps=40 * 128, update_epochs=1, num_eval_episodes=2)
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(model)
    assert model.num_env_steps == 40 * 128
    assert trainer.global_step == trainer.current_epoch == 40
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert torch.load(folder / "last.ckpt")["state_dict"]["env_steps"] == 40 * 128
    bar = capsys.readouterr().out
    assert "PPO: 100%" in bar
    assert "5.12k/5.12k" in bar
    assert "return=" in bar


def test_configured_callbacks_are_the_users_too(tmp_path):
    mine = [ModelCheckpoint(save_top_k=-1, every_n_epochs=2), TQDMProgressBar(refresh_rate=0)]
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=mine, logger=False)
    trainer.fit(PPO("CartPole-v1", **SMALL))
    assert set(mine[:2]) <= set(trainer.callbacks)  # Lightning appends its own to the list
    assert StepProgressBar not in map(type, trainer.callbacks)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5  # theirs after iterations 2 and 4, best, last, previous


def test_users_callbacks_stay_and_defaults_give_way(tmp_path):
    class MyBar(RichProgressBar):
        pass

    mine = ModelCheckpoint(monitor="rollout/ep_rew_mean", mode="max", filename="mine", dirpath=tmp_path)
    trainer = lightning.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[mine, MyBar()], max_epochs=2, logger=False
    )
    trainer.fit(PPO("CartPole-v1", **SMALL))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert MyBar in kinds
    assert StepProgressBar not in kinds
    assert kinds.count(ModelCheckpoint) == kinds.count(BestCheckpoint) == kinds.count(LastCheckpoint) == 1
    assert (tmp_path / "mine.ckpt").exists()


def test_max_epochs_ends_a_run_early_and_changes_no_schedule(fit):
    logger = Memory()
    model = PPO("CartPole-v1", **SMALL)
    fit(model, max_epochs=2, logger=logger)
    assert model.num_env_steps == 256
    assert [row["train/learning_rate"] for _, row in logger.rows] == pytest.approx([3e-4, 3e-4 * 3 / 4])


def test_total_steps_is_rounded_up_to_whole_iterations(fit):
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 300})
    fit(model)
    assert model.num_env_steps == 384


def test_fitting_twice_continues_counting_and_a_finished_run_trains_no_more(fit):
    model = PPO("CartPole-v1", **SMALL)
    fit(model)
    before = parameters(model)
    fit(model)
    assert model.num_env_steps == 512
    assert_close(parameters(model), before, rtol=0, atol=0)
    model.total_steps = 1024
    fit(model)
    assert model.num_env_steps == 1024
    assert not torch.equal(parameters(model), before)


def test_evaluations_come_every_interval_and_at_the_end(tmp_path):
    logger = CSVLogger(tmp_path)
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 5 * 128}, eval_interval=2, num_eval_episodes=2)
    trainer = lightning.Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model)
    rows = np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    evaluated = rows["step"][~np.isnan(rows["eval/mean_reward"])]
    assert evaluated.tolist() == [256, 512, 640]
    early = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
        default_root_dir=tmp_path,
    )  # fmt: skip
    early.fit(PPO("CartPole-v1", **SMALL, eval_interval=100, num_eval_episodes=2))
    assert "eval/mean_reward" in early.callback_metrics


def test_callbacks_can_monitor_what_is_logged(fit):
    """Return and training metrics alike."""
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 10_000})
    stop = EarlyStopping("train/learning_rate", mode="max", patience=2, check_on_train_epoch_end=True)
    fit(model, callbacks=[stop])
    assert int(model.iterations) == 3
    assert {"rollout/ep_rew_mean", "train/approx_kl", "time/fps"} <= model.trainer.callback_metrics.keys()


def test_early_stopping_looks_at_evaluations_when_there_is_one(fit):
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 10_000}, eval_interval=2, num_eval_episodes=2)
    stop = EarlyStopping("eval/mean_reward", mode="max", stopping_threshold=1.0)
    fit(model, callbacks=[stop], limit_val_batches=1.0)
    assert int(model.iterations) == 2


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_all_metrics_are_logged_once_per_rollout_over_environment_steps(fit, env):
    logger = Memory()
    trained(fit, env, logger=logger, total_steps=4 * 1024, num_steps=256, clip_range_vf=0.2)
    names = {
        "rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/iterations", "time/total_timesteps",
        "time/time_elapsed", "time/collect", "time/update", "time/evaluate", "train/approx_kl", "train/clip_fraction",
        "train/clip_range", "train/clip_range_vf", "train/ent_coef", "train/entropy_loss", "train/explained_variance",
        "train/learning_rate", "train/loss", "train/policy_gradient_loss", "train/value_loss", "train/grad_norm",
        "train/n_updates", "train/old_approx_kl", "train/actor_grad_norm", "train/critic_grad_norm", "time/iteration",
        "rollout/ep_rew_min", "rollout/ep_rew_max", "rollout/episodes", "rollout/terminated", "rollout/truncated",
        "rollout/reward_mean", "rollout/reward_std", "rollout/reward_min", "rollout/reward_max", "rollout/value_mean",
    }  # fmt: skip
    if env == "Pendulum-v1":
        names |= {"train/std", "rollout/clipped_actions"}
    assert [step for step, _ in logger.rows] == [1024, 2048, 3072, 4096]
    assert set(logger.rows[-1][1]) == names
    assert all(math.isfinite(value) for value in logger.rows[-1][1].values())
    assert "time/fps" not in logger.rows[1][1]  # still its burn-in
    assert [row["train/n_updates"] for _, row in logger.rows] == [4, 8, 12, 16]


def test_what_callbacks_log_themselves_is_over_environment_steps_too(fit):
    class Mine(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.log("mine", 1.0)

    logger = Memory()
    fit(PPO("CartPole-v1", **SMALL), logger=logger, callbacks=[Mine()])
    assert [step for step, row in logger.rows if "mine" in row] == [128, 256, 384, 512]
    assert len(logger.rows) == 8


def test_metrics_have_stable_baselines3s_meanings(fit):
    logger, kept = Memory(), []

    class Kept(PPO):
        def update(self, rollout):
            kept.append(super().update(rollout))
            return kept[-1]

    lightning.seed_everything(0, verbose=False)
    fit(Kept("Pendulum-v1", **SMALL), logger=logger)
    (_, row), update = logger.rows[0], kept[0]
    assert len(update.losses) == 16
    column = lambda name: update.column(name).tolist()  # noqa: E731
    assert row["train/approx_kl"] == pytest.approx(np.mean(column("approx_kl")[-4:]))
    assert row["train/loss"] == pytest.approx(column("loss")[-1])
    assert row["train/entropy_loss"] == pytest.approx(np.mean(column("entropy_loss")))
    assert row["train/value_loss"] == pytest.approx(np.mean(column("value_loss")))
    assert row["train/policy_gradient_loss"] == pytest.approx(np.mean(column("policy_gradient_loss")), abs=1e-7)
    assert row["train/clip_fraction"] == pytest.approx(np.mean(column("clip_fraction")))


def test_counters_are_exact_beyond_float32(fit):
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 2**24 + 128})
    model.env_steps.fill_(2**24 + 1)
    logger = Memory()
    fit(model, logger=logger)
    assert [step for step, _ in logger.rows] == [2**24 + 129]


def test_hooks_of_callbacks_see_every_gradient_step_and_change_nothing(fit):
    """Without such a callback the steps take a shorter way to the same numbers."""

    class Counter(lightning.Callback):
        calls = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.calls += 1

    counter = Counter()
    plain = trained(fit)
    hooked = trained(fit, trainer={"callbacks": [counter]})
    assert counter.calls == 4 * 16
    assert_close(parameters(hooked), parameters(plain), rtol=0, atol=0)


# --- seeds, checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_the_same_seed_twice_is_the_same_run(fit, env):
    kwargs = {"normalize_observation": True, "normalize_reward": True}
    first, second = trained(fit, env, **kwargs), trained(fit, env, **kwargs)
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(parameters(first), parameters(trained(fit, env, seed=2, **kwargs)))


def test_without_a_seed_one_is_drawn_logged_and_saved(tmp_path, caplog, fit, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    model = PPO("CartPole-v1", **SMALL)
    with caplog.at_level(logging.INFO):
        trainer = fit(model)
    assert f"seed {model.seed}" in caplog.text
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt")["ppo_lightning"]["seed"] == model.seed


@pytest.mark.parametrize("kwargs", [{}, {"clip_range": Linear(0.3, 0.1), "env_kwargs": {"max_episode_steps": 50}}])
def test_a_checkpoint_loads_with_plain_data_only_and_predicts_the_same(fit, tmp_path, kwargs):
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", normalize_observation=True, **SMALL, **kwargs)
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    loaded = PPO.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert (loaded.predict(observations) == model.predict(observations)).all()
    assert loaded.num_env_steps == 512
    assert loaded.schedules["clip_range"] == model.schedules["clip_range"]
    assert loaded.env_factory == model.env_factory
    assert loaded.evaluate(3) == model.evaluate(3)


def test_continuing_from_a_checkpoint_keeps_optimiser_counters_and_moments(fit, tmp_path):
    kwargs = {**SMALL, "normalize_observation": True, "normalize_reward": True}
    model = PPO("CartPole-v1", **kwargs)
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    longer = PPO("CartPole-v1", **{**kwargs, "total_steps": 1024})
    seen = {}

    class Look(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            state = trainer.optimizers[0].state_dict()["state"]
            seen.update(
                steps=int(state[0]["step"]), env=pl_module.num_env_steps, moments=pl_module.policy.moments.count
            )
            seen["window"] = list(pl_module.rollouts.episodes.ep_info_buffer)

    fit(longer, ckpt_path=tmp_path / "a.ckpt", callbacks=[Look()])
    assert seen["steps"] == 4 * 16
    assert seen["env"] == 512
    assert repr(seen["window"]) == repr(list(model.rollouts.episodes.ep_info_buffer))  # repr, as NaN differs from NaN
    assert longer.num_env_steps == 1024
    assert longer.trainer.global_step == 8
    assert int(longer.policy.moments.count) == int(longer.reward_normalizer.moments.count) == 1024


@pytest.mark.parametrize("scheduler", [None, 0.5])
def test_the_settings_of_a_resumed_run_win_over_the_checkpoints(fit, tmp_path, scheduler):
    """Learning rate, other numbers of the optimiser, and a scheduler's: its state goes on, its numbers are new."""

    def make(lr, total_steps, decay, gamma):
        return PPO(
            "CartPole-v1",
            **{**SMALL, "total_steps": total_steps},
            optimizer=lambda params: torch.optim.Adam(params, lr=lr, weight_decay=decay),
            lr_scheduler=gamma and (lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=gamma)),
        )

    fit(make(1e-3, 512, 0.0, scheduler)).save_checkpoint(tmp_path / "a.ckpt")
    logger = Memory()
    trainer = fit(make(1e-2, 1024, 0.1, scheduler and 0.1), ckpt_path=tmp_path / "a.ckpt", logger=logger)
    rates = [row["train/learning_rate"] for _, row in logger.rows]
    expected = [5e-3, 3.75e-3, 2.5e-3, 1.25e-3] if scheduler is None else [1e-2 * 0.5**4 * 0.1**i for i in range(4)]
    assert rates == pytest.approx(expected)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1


class Doubles(schedulers.LRScheduler):
    """Counts in an attribute of its own."""

    def __init__(self, optimizer):
        self.halvings = -1
        super().__init__(optimizer)

    def get_lr(self):
        self.halvings += 1
        return [rate * 0.5**self.halvings for rate in self.base_lrs]


SCHEDULERS = {
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 5), schedulers.ExponentialLR(o, 0.9)]
    ),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=6),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-4, 1e-3, step_size_up=3, cycle_momentum=False),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.8**epoch),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=1e-3, total_steps=9),
    "own": Doubles,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch_resume_where_they_were(fit, tmp_path, name):
    kwargs = {**SMALL, "total_steps": 1024, "lr_scheduler": SCHEDULERS[name]}
    whole, first, second = Memory(), Memory(), Memory()

    def run(logger, **options):
        betas = []
        watch = PPOCallback(
            on_update_start=lambda trainer, *_: betas.append(trainer.optimizers[0].param_groups[0]["betas"])
        )
        return fit(PPO("CartPole-v1", **kwargs), logger=logger, callbacks=[watch], **options), betas

    _, expected = run(whole)
    trainer, before = run(first, max_epochs=4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, after = run(second, ckpt_path=tmp_path / "a.ckpt")
    assert before + after == expected
    assert len(set(expected)) > 1 or name != "one cycle"
    rates = [[row["train/learning_rate"] for _, row in logger.rows] for logger in (whole, first, second)]
    assert rates[1] + rates[2] == pytest.approx(rates[0])
    assert len(set(rates[0])) > 1


def test_a_run_that_leaves_its_scheduler_out_falls_linearly(fit, tmp_path):
    kwargs, logger = {**SMALL, "total_steps": 1024}, Memory()
    halves = lambda o: schedulers.StepLR(o, step_size=1, gamma=0.5)  # noqa: E731
    fit(PPO("CartPole-v1", **kwargs, lr_scheduler=halves), max_epochs=4).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="lr_scheduler"):
        fit(PPO("CartPole-v1", **kwargs), ckpt_path=tmp_path / "a.ckpt")
    contents = torch.load(tmp_path / "a.ckpt", weights_only=True)
    contents["ppo_lightning"]["not_saved"] = []  # as of a command line, whose null leaves it out
    torch.save(contents, tmp_path / "b.ckpt")
    fit(PPO("CartPole-v1", **kwargs), logger=logger, ckpt_path=tmp_path / "b.ckpt")
    rates = [row["train/learning_rate"] for _, row in logger.rows]
    assert rates == pytest.approx([3e-4 * (1 - done / 8) for done in range(4, 8)])


def test_a_scheduler_that_has_ended_is_not_stepped(fit):
    """A vector that resets in a step of its own takes more iterations than steps say."""
    model = PPO(
        lambda num_envs: SyncVectorEnv([ConstantReward] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP),
        num_envs=2, num_steps=6, total_steps=48, num_minibatches=2,
        lr_scheduler=lambda o: schedulers.OneCycleLR(o, max_lr=1e-3, total_steps=4),
    )  # fmt: skip
    fit(model)
    assert model.policy_version > 4


def test_a_scheduler_that_a_resumed_run_adds_begins_with_the_initial_learning_rate(fit, tmp_path):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint(tmp_path / "a.ckpt")
    logger = Memory()
    constant = lambda o: schedulers.ConstantLR(o, factor=1.0)  # noqa: E731
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 768}, lr_scheduler=constant)
    fit(model, ckpt_path=tmp_path / "a.ckpt", logger=logger)
    assert [row["train/learning_rate"] for _, row in logger.rows] == pytest.approx([3e-4, 3e-4])


def test_a_raised_budget_is_saved(fit, tmp_path):
    model = PPO("CartPole-v1", **SMALL)
    fit(model)
    model.total_steps = 1024
    fit(model).save_checkpoint(tmp_path / "a.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "a.ckpt").total_steps == 1024


def test_without_evaluations_there_is_a_last_checkpoint_and_no_warning(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=0, default_root_dir=tmp_path
    )
    trainer.fit(PPO("CartPole-v1", **SMALL))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_resumed_run_has_the_checkpoints_seed_and_sees_other_episodes(fit, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    first = PPO("CartPole-v1", **SMALL)
    start, noise = [], []
    collect = type(first.rollouts).collect

    def watched(self):
        batch = collect(self)
        start.append(batch["observation"][0].clone())
        noise.append(self.learner.generator.get_state())
        return batch

    monkeypatch.setattr(type(first.rollouts), "collect", watched)
    fit(first).save_checkpoint(tmp_path / "a.ckpt")
    second = PPO("CartPole-v1", **{**SMALL, "total_steps": 1024})
    fit(second, ckpt_path=tmp_path / "a.ckpt")
    assert second.seed == first.seed
    assert not torch.equal(start[0], start[4])
    assert not torch.equal(noise[0], noise[4])


def test_a_policy_acts_without_the_optimiser_it_was_trained_with_but_does_not_train_on(fit, tmp_path):
    adam = lambda params: torch.optim.Adam(params, lr=1e-2)  # noqa: E731
    fit(PPO("CartPole-v1", **SMALL, optimizer=adam)).save_checkpoint(tmp_path / "a.ckpt")
    model = PPO.load_from_checkpoint(tmp_path / "a.ckpt", total_steps=1024)
    assert model.evaluate(2)
    with pytest.raises(InputError, match="optimizer=…"):
        fit(model)
    fit(PPO.load_from_checkpoint(tmp_path / "a.ckpt", total_steps=1024, optimizer=adam))


def test_environments_are_closed_after_a_fit(fit):
    model = trained(fit)
    assert model.rollouts.environments is None
    assert model.env_provider._eval_envs is None


def test_the_trainer_gets_its_evaluation_interval_back(fit):
    trainer = fit(PPO("CartPole-v1", **SMALL), check_val_every_n_epoch=7)
    assert trainer.check_val_every_n_epoch == 7


def test_a_fast_dev_run_is_one_iteration(fit):
    model = PPO("CartPole-v1", **SMALL)
    fit(model, fast_dev_run=True)
    assert model.num_env_steps == 128


def test_speed_leaves_evaluations_out():
    clock = Clock()
    for step in (1, 2):
        clock.lap(1000 * step)
    time.sleep(0.2)
    clock.add_evaluation(0.2)
    metrics = clock.lap(3000)
    assert metrics["time/evaluate"] == pytest.approx(0.2)
    assert metrics["time/fps"] > 1000 / 0.1


def test_rollouts_are_acted_in_the_precision_of_updates(fit):
    seen = []

    class Acts(PPO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            act = self.policy.act
            self.policy.act = lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or act(*a, **k)

    fit(Acts("CartPole-v1", **SMALL), precision="bf16-mixed")
    assert seen
    assert all(seen)


def test_a_model_that_has_trained_can_be_pickled(fit):
    """For strategies that spawn processes."""
    model = trained(fit)
    model.trainer = None
    model.generator.manual_seed(5)
    twin = pickle.loads(pickle.dumps(model))  # the simulators stay where they are
    assert torch.equal(twin.generator.get_state(), model.generator.get_state())
    assert twin.rollouts.environments is None


def test_a_network_of_ones_own_must_be_given_again(fit, tmp_path):
    make = lambda o, a: ActorCritic(o, a, hidden_sizes=(16,))  # noqa: E731
    fit(PPO("CartPole-v1", policy=make, **SMALL)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="policy=…"):
        PPO.load_from_checkpoint(tmp_path / "a.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "a.ckpt", policy=make).num_env_steps == 512
    with pytest.raises(InputError, match="policy=…"):
        fit(PPO("CartPole-v1", **SMALL), ckpt_path=tmp_path / "a.ckpt")


def test_refuses_a_checkpoint_for_other_spaces(fit, tmp_path):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"observation space Box\(4,\) float32, Pendulum-v1 has Box\(3,\) float32"):
        fit(PPO("Pendulum-v1", **SMALL), ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="Acrobot-v1 has"):
        PPO.load_from_checkpoint(tmp_path / "a.ckpt", env="Acrobot-v1")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_refuses_a_truncated_checkpoint(fit, tmp_path, keep):
    path = tmp_path / "a.ckpt"
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 1024})
    before = parameters(model)
    with pytest.raises(InputError, match=r"a\.ckpt is no checkpoint that can be read"):
        fit(model, ckpt_path=path)
    assert torch.equal(parameters(model), before)
    with pytest.raises(InputError, match="is no checkpoint that can be read"):
        PPO.load_from_checkpoint(path)


def test_refuses_a_foreign_checkpoint(fit, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of ppo_lightning"):
        PPO.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="not a checkpoint of ppo_lightning"):
        fit(PPO("CartPole-v1", **SMALL), ckpt_path=tmp_path / "a.ckpt")


# --- every option changes a result ---------------------------------------------------------------------------------------

OPTIONS = {
    "env": "CartPole-v0",
    "env_kwargs": {"max_episode_steps": 9},
    "wrappers": [lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward)],
    "num_envs": 3,
    "vectorization": "vector_entry_point",
    "num_steps": 16,
    "total_steps": 256,
    "policy": lambda o, a: ActorCritic(o, a, hidden_sizes=(8,)),
    "normalize_observation": True,
    "normalize_reward": True,
    "clip_reward": True,
    "popart": PopArt(),
    "gamma": 0.5,
    "gae_lambda": 0.5,
    "recompute_advantages": True,
    "update_epochs": 2,
    "num_minibatches": 2,
    "sequence_length": 8,
    "clip_range": 0.001,
    "clip_range_vf": 0.01,
    "normalize_advantage": False,
    "ent_coef": 0.5,
    "vf_coef": 0.1,
    "max_grad_norm": 0.01,
    "target_kl": 1e-7,
    "optimizer": lambda params: torch.optim.Adam(params, lr=1e-2),
    "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_changes_the_trained_parameters(fit, option):
    if option == "env":
        # CartPole-v0 differs from v1 only after 200 steps: another environment altogether
        assert trained(fit, "Acrobot-v1").policy.network.actor_trunk.layers[0].weight.shape == (64, 6)
        return
    base = {"policy": partial(ActorCritic, rnn="gru")} if option == "sequence_length" else {}
    if option == "clip_reward":
        base = {"env": "Pendulum-v1"}  # CartPole's rewards are their signs
    default, changed = trained(fit, **base), trained(fit, **base, **{option: OPTIONS[option]})
    assert parameters(default).shape != parameters(changed).shape or not torch.equal(
        parameters(default), parameters(changed)
    )


def test_all_options_are_tested_here_or_by_name():
    parameters = set(inspect.signature(PPO).parameters)
    elsewhere = {
        "compile",
        "gradient_accumulation_steps",
        "eval_interval",
        "num_eval_episodes",
        "eval_deterministic",
        "env_timeout_s",
        "num_workers",
        "max_env_restarts",
        "loss",
        "advantage_estimator",
        "non_finite",
        "info_keys",
        "metric_names",
    }
    assert parameters == OPTIONS.keys() | elsewhere


@pytest.mark.parametrize("name", ["clip_range", "ent_coef"])
def test_schedules_run_over_total_steps(fit, name):
    model = PPO("CartPole-v1", **SMALL, **{name: Linear(0.4, 0.2)})
    values = []
    look = PPOCallback(on_update_start=lambda *_: values.append(getattr(model.coefficients, name)))
    fit(model, callbacks=[look])
    assert values == pytest.approx([0.4, 0.35, 0.3, 0.25])


def test_learning_rate_falls_linearly_to_zero_unless_a_scheduler_is_given(fit):
    for scheduler, expected in (
        (None, [3e-4, 2.25e-4, 1.5e-4, 0.75e-4]),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1), [3e-4, 3e-4, 3e-5, 3e-5]),
    ):
        logger = Memory()
        fit(PPO("CartPole-v1", **SMALL, lr_scheduler=scheduler), logger=logger)
        assert [row["train/learning_rate"] for _, row in logger.rows] == pytest.approx(expected)


def test_target_kl_stops_before_the_step_that_is_too_far(fit):
    """Stable-Baselines3's rule: at the first minibatch whose approximate KL exceeds 1.5 times the target."""
    updates = []

    class Watched(PPO):
        def update(self, rollout):
            updates.append(super().update(rollout))
            return updates[-1]

    fast = lambda params: torch.optim.Adam(params, lr=3e-2)  # noqa: E731
    model = Watched("CartPole-v1", **SMALL, target_kl=0.02, optimizer=fast)
    fit(model)
    stopped = [update for update in updates if len(update.losses) < 16]
    assert stopped
    for update in updates:
        kls = update.column("approx_kl").tolist()
        assert all(kl <= 0.03 for kl in kls[:-1])
        over = kls[-1] > 0.03
        assert over == (len(kls) < 16) or len(kls) == 16
        assert len(update.grad_norms) == len(kls) - over
    assert model.trainer.global_step == 4


@pytest.mark.parametrize("num_minibatches", [1, 3, 7, 128])
def test_every_sample_is_used_exactly_once_per_epoch(num_minibatches):
    seen = []

    def loss(batch, evaluate, coefficients):
        seen.append(batch["advantage"].tolist())
        return {"loss": 0.0 * evaluate(batch)[2].sum()}

    options = {"num_minibatches": num_minibatches, "update_epochs": 3, "normalize_advantage": False}
    model = PPO("CartPole-v1", **SMALL, **options, loss=loss)
    batch = model.collect()
    batch["advantage"] = torch.arange(128.0).view(32, 4)
    model.learn(batch, torch.optim.SGD(model.parameters(), lr=0.0))
    assert len(seen) == 3 * num_minibatches
    sizes = {len(piece) for piece in seen}
    assert max(sizes) - min(sizes) <= 1
    for epoch in range(3):
        drawn = [x for piece in seen[epoch * num_minibatches : (epoch + 1) * num_minibatches] for x in piece]
        assert sorted(drawn) == list(range(128))
    assert seen[0] != seen[num_minibatches]


def test_minibatches_of_one_train_without_nan(fit):
    model = trained(fit, num_minibatches=128, total_steps=256)
    assert parameters(model).isfinite().all()


# --- what the outside asks -------------------------------------------------------------------------------------------


def test_predict_takes_one_observation_or_a_batch():
    model = PPO("CartPole-v1")
    one = np.zeros(4, dtype=np.float32)
    assert model.predict(one) in (0, 1)
    assert model.predict(np.stack([one] * 5)).shape == (5,)
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert (model.predict(rows[::-1]) == model.predict(rows)[::-1]).all()  # views that torch cannot take as they are
    torch.manual_seed(0)
    drawn = model.predict(np.stack([one] * 200), deterministic=False)
    assert 50 < drawn.sum() < 150
    continuous = PPO(Target, policy=lambda o, a: ActorCritic(o, a, log_std_init=2.0))
    actions = continuous.predict(np.zeros((100, 1)), deterministic=False)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() == 1.0  # clipped to the action space
    with pytest.raises(InputError, match=r"shape \(4,\)"):
        model.predict(np.zeros(3))


def test_predict_normalises_as_training_does(fit):
    model = trained(fit, normalize_observation=True)
    observation = torch.randn(20, 4)
    expected = model.policy.actor(model.policy.features(observation)).argmax(-1)
    assert (model.predict(observation.numpy()) == expected.numpy()).all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs must be a whole number of 1 or more, got 0"),
        ({"num_steps": -3}, "num_steps must be a whole number of 1 or more, got -3"),
        ({"total_steps": 0}, "total_steps must be a whole number of 1 or more"),
        ({"update_epochs": 0}, "update_epochs must be a whole number of 1 or more"),
        ({"num_minibatches": 0}, "num_minibatches must be a whole number of 1 or more"),
        ({"eval_interval": 0}, "eval_interval must be a whole number of 1 or more"),
        ({"num_eval_episodes": 0}, "num_eval_episodes must be a whole number of 1 or more"),
        ({"num_minibatches": 2000}, r"8 · .*128|128 · 8 = 1024 samples cannot be cut into num_minibatches = 2000"),
        ({"num_steps": 128.5}, "num_steps must be a whole number of 1 or more, got 128.5"),
        ({"num_envs": "8"}, "num_envs must be a whole number"),
        ({"env": None}, "env must be a Gymnasium id"),
        ({"vectorization": "asynch"}, "vectorization must be one of"),
        ({"clip_range": {"begin": 1}}, "clip_range takes a number or start and end"),
        ({"gamma": 1.5}, "gamma must lie between 0 and 1"),
        ({"gae_lambda": -0.1}, "gae_lambda must lie between 0 and 1"),
        ({"gamma": math.nan}, "gamma must lie"),
        ({"clip_range": -0.1}, "clip_range must be zero or more"),
        ({"ent_coef": Linear(0.1, -0.1)}, "ent_coef must be zero or more"),
        ({"vf_coef": -1.0}, "vf_coef must be zero or more"),
        ({"normalize_advantage": "ranks"}, "normalize_advantage must be true, false or all_ranks, got 'ranks'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be more than 0"),
        ({"target_kl": -1.0}, "target_kl must be more than 0"),
        ({"clip_range_vf": 0.0}, "clip_range_vf must be more than 0"),
        ({"env_timeout_s": 0.0}, "env_timeout_s must be more than 0"),
        ({"max_env_restarts": -1}, "max_env_restarts must be a whole number of 0 or more, got -1"),
        ({"max_env_restarts": 0.5}, "max_env_restarts must be a whole number of 0 or more"),
        ({"non_finite": "ignore"}, "non_finite must be raise or skip, got 'ignore'"),
    ],
)
def test_refuses_a_value(kwargs, message):
    with pytest.raises(InputError, match=message):
        PPO(**{"env": "CartPole-v1", **kwargs})


@pytest.mark.parametrize("kwargs", [{"precision": "64-true"}, {"precision": "bf16-true"}, {"max_steps": 10}])
def test_refuses_trainer_settings_that_mislead(fit, kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        fit(PPO("CartPole-v1", **SMALL), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4 .*: set gradient_accumulation_steps=4 of PPO"),
        ({"gradient_clip_val": 0.5}, "gradient_clip_val=0.5 .*: set max_grad_norm of PPO"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "set gradient_accumulation_steps of PPO"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder .*`ppo-lightning sweep`"),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder .*`ppo-lightning sweep`"),
    ],
)
def test_features_of_lightning_that_ppo_does_otherwise_name_what_to_use(fit, kwargs, message):
    with pytest.raises(InputError, match=message):
        fit(PPO("CartPole-v1", **SMALL), **kwargs)


def test_a_compiled_module_is_refused_and_can_be_trained_itself(fit):
    model = PPO("CartPole-v1", **SMALL)
    with pytest.raises(InputError, match=r"give PPO\(…, compile=True\)"):
        fit(torch.compile(model))
    fit(model)
    other = PPO("CartPole-v1", **SMALL)
    nn.Module.compile(other)
    with pytest.raises(InputError, match=r"give PPO\(…, compile=True\)"):
        fit(other)
    fit(other)


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_searches_of_the_tuner_name_the_sweep_and_leave_the_trainer_usable(search, tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0
    )
    model = PPO("CartPole-v1", **SMALL)
    with pytest.raises(InputError, match="`ppo-lightning sweep`"):
        getattr(Tuner(trainer), search)(model)
    trainer.fit(model)
    assert model.num_env_steps == 512


def test_batches_of_a_loader_of_ones_own_are_refused():
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(InputError, match="leave train_dataloaders out"):
        trainer.fit(PPO("CartPole-v1", **SMALL), torch.utils.data.DataLoader(torch.zeros(8, 4)))


def test_refuses_fsdp(monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    from ppo_lightning.runs.trainer import validate_trainer

    model = PPO("CartPole-v1", **SMALL)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy.__new__(FSDPStrategy))
    monkeypatch.setattr(type(trainer), "precision", "32-true")
    model.trainer = trainer
    with pytest.raises(InputError, match=r"FSDPStrategy.*use ddp"):
        validate_trainer(model.trainer, running_moments=False)


def test_refuses_a_scheduler_that_waits_for_a_metric(fit):
    with pytest.raises(InputError, match="ReduceLROnPlateau"):
        fit(PPO("CartPole-v1", **SMALL, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau))


def test_a_step_on_gradients_that_are_not_finite_is_never_taken(fit):
    """The first minibatch of the second iteration is spoilt."""
    before = []

    def spoilt(batch, evaluate, coefficients):
        losses = PPOLoss()(batch, evaluate, coefficients)
        if int(model.iterations) == 1:
            before.append(parameters(model))
            losses["loss"] = losses["loss"] * torch.nan
        return losses

    model = PPO("CartPole-v1", loss=spoilt, **SMALL)
    with pytest.raises(FloatingPointError, match="norm is nan in iteration 2, the step was not taken"):
        fit(model)
    assert torch.equal(parameters(model), before[0])


# --- probes: each isolates one stage -----------------------------------------------------------------------------------

FAST = {
    "num_envs": 8, "num_steps": 16, "total_steps": 128 * 60, "gamma": 0.9, "num_minibatches": 2,
    "optimizer": lambda params: torch.optim.Adam(params, lr=5e-3),
}  # fmt: skip


def value_of(model: PPO, *observations: float) -> list[float]:
    with torch.no_grad():
        return model.policy.critic(torch.tensor(observations)[:, None]).tolist()


def test_probe_value(fit):
    assert value_of(trained(fit, ConstantReward, **FAST), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_observation(fit):
    from probes import RewardIsObservation

    assert value_of(trained(fit, RewardIsObservation, **FAST), -1.0, 1.0) == pytest.approx([-1, 1], abs=0.1)


def test_probe_discount(fit):
    from probes import DelayedReward

    assert value_of(trained(fit, DelayedReward, **FAST), -1.0, 1.0) == pytest.approx([0.9, 1.0], abs=0.1)


def test_probe_action(fit):
    from probes import ActionMatters

    model = trained(fit, ActionMatters, **FAST)
    assert model.predict(np.zeros(1)) == 1
    assert value_of(model, 0.0) == pytest.approx([1.0], abs=0.15)


def test_probe_action_and_observation(fit):
    model = trained(fit, ActionMustMatch, **FAST)
    assert model.predict(np.array([[-1.0], [1.0]])).tolist() == [0, 1]
    assert model.rollouts.episodes.means()["rollout/success_rate"] > 0.95


def test_probe_continuous_action(fit):
    model = trained(fit, Target, **{**FAST, "total_steps": 128 * 80})
    assert model.predict(np.zeros(1)) == pytest.approx([0.5], abs=0.1)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_learns_in_every_autoreset_mode(fit, mode):
    make = lambda: SyncVectorEnv([ActionMustMatch] * 8, autoreset_mode=mode)  # noqa: E731
    model = trained(fit, make, **FAST)
    assert model.predict(np.array([[-1.0], [1.0]])).tolist() == [0, 1]
