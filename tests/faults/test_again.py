"""What a run goes on from after it ended in less usual ways."""

import os
import random
import signal
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import LambdaCallback
from outcomes import outcome, same
from test_resume import SMALL, SaveAt, Walk

from ppo_lightning import PPO
from ppo_lightning.callbacks import GracefulShutdown
from ppo_lightning.errors import InputError


class Fails(Callback):
    """Raises once, in a hook, after so many iterations."""

    def __init__(self, hook, iteration, error):
        self.iteration, self.error, self.failed = iteration, error, False
        setattr(self, hook, self.fail)

    def fail(self, trainer, pl_module, *_):
        if pl_module.policy_version == self.iteration and not self.failed:
            self.failed = True
            raise self.error


def test_a_third_fit_after_one_that_failed_resumes_with_the_optimiser_and_no_old_episodes(fit):
    torch.manual_seed(0)
    model = PPO("Pendulum-v1", **SMALL)
    fit(model, max_epochs=2)
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[Fails("on_train_batch_start", 4, ZeroDivisionError())])
    assert model.policy_version == 4
    trainer = fit(model)
    assert {int(one["step"]) for one in trainer.optimizers[0].state.values()} == {6 * 2 * 3}


def test_what_fails_between_iterations_keeps_the_environments(fit):
    kwargs = {"limit_val_batches": 1, "check_val_every_n_epoch": 2, "enable_checkpointing": True}
    torch.manual_seed(0)
    model = PPO("CartPole-v1", **SMALL)
    expected = outcome(model, fit(model, **kwargs))
    torch.manual_seed(0)
    stopped = PPO("CartPole-v1", **SMALL)
    with pytest.raises(ZeroDivisionError):
        fit(stopped, callbacks=[Fails("on_validation_start", 4, ZeroDivisionError())], **kwargs)
    last = max(Path().rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    model = PPO("CartPole-v1", **SMALL)
    same(outcome(model, fit(model, ckpt_path=last, **kwargs)), expected)


@pytest.mark.parametrize(
    "hook",
    ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_start"],
)
@pytest.mark.parametrize("again", ["another Trainer", "the same Trainer"])
def test_whatever_failed_epochs_are_iterations(hook, again, fit):
    """The run that continues ends after as many iterations as ``max_epochs`` says, and evaluates after every second."""
    options = {"limit_val_batches": 1, "enable_checkpointing": True, "max_epochs": 6}
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 10 * 96}, eval_interval=2)
    fails = Fails(hook, 4 if hook == "on_validation_start" else 3, ZeroDivisionError())
    evaluated = []
    evaluations = LambdaCallback(on_validation_end=lambda trainer, model: evaluated.append(model.policy_version))
    trainers = []
    keep = LambdaCallback(setup=lambda trainer, model, stage: trainers.append(trainer))
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[fails, keep, evaluations], **options)
    if again == "the same Trainer":
        trainer = trainers[0]
        trainer.fit(model)
    else:
        last = max(Path().rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        model = PPO("CartPole-v1", **{**SMALL, "total_steps": 10 * 96}, eval_interval=2)
        trainer = fit(model, ckpt_path=last, callbacks=[evaluations], **options)
    assert (trainer.current_epoch, trainer.global_step, model.policy_version) == (6, 6, 6)
    assert set(evaluated) >= {2, 6}
    assert set(evaluated) <= {2, 4, 6}


def test_a_trainer_evaluates_the_next_model_by_its_own_interval(fit):
    trainers, evaluated = [], []
    keep = LambdaCallback(
        setup=lambda trainer, model, stage: trainers.append(trainer),
        on_validation_end=lambda trainer, model: evaluated.append(model.policy_version),
    )
    fails = Fails("on_train_batch_end", 3, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        fit(PPO("CartPole-v1", **SMALL, eval_interval=50), callbacks=[fails, keep], limit_val_batches=1)
    trainers[0].fit(PPO("CartPole-v1", **SMALL, eval_interval=3))
    assert evaluated == [3, 6]


def test_environments_that_a_callable_makes_otherwise_restart(fit, caplog):
    fit(PPO(partial(gym.make, "Pendulum-v1", g=10.0), **SMALL), callbacks=[SaveAt(3)])
    model = PPO(partial(gym.make, "Pendulum-v1", g=5.0, max_episode_steps=50), **SMALL)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(model, ckpt_path="at.ckpt", limit_train_batches=1, max_epochs=4)
    assert "environments begin new episodes: those that were saved were made otherwise" in caplog.text
    model.rollouts.collect()
    environment = model.rollouts.environments.env.envs[0]
    assert environment.unwrapped.g == 5.0
    model.close_environments()


class Drawing(Walk):
    """Draws from the streams that everybody shares, in resets too."""

    def reset(self, *, seed=None, options=None):
        seen, info = super().reset(seed=seed, options=options)
        self.place += random.random() + np.random.rand()  # noqa: NPY002
        return seen, info

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def test_shared_streams_resume_even_where_resets_draw_from_them(fit):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model = PPO(Drawing, **SMALL)
    expected = outcome(model, fit(model, callbacks=[SaveAt(3)]))
    model = PPO(Drawing, **SMALL)
    same(outcome(model, fit(model, ckpt_path="at.ckpt")), expected)


def test_a_signal_at_the_very_end_is_not_heard_after_it(fit, monkeypatch):
    monkeypatch.setattr(GracefulShutdown, "GRACE_S", 0.3)

    class Late(Callback):
        def on_train_end(self, *_):
            os.kill(os.getpid(), signal.SIGINT)

    model = PPO("CartPole-v1", **SMALL)
    fit(model, callbacks=[Late()])
    assert model.agreed_stop_signal is signal.SIGINT
    signal.sigtimedwait([], 0.6)  # nothing comes


def test_what_no_file_can_hold_is_refused_at_the_first_save(fit):
    class Wrong(Callback):
        def state_dict(self):
            return {"best": np.float64(3.0)}

    with pytest.raises(InputError, match="it holds more than tensors and plain data"):
        fit(PPO("CartPole-v1", **SMALL), callbacks=[Wrong(), SaveAt(1)])


def test_a_damaged_file_does_not_replace_the_good_one_before_it(fit):
    kwargs = {"enable_checkpointing": True}
    fit(PPO("CartPole-v1", **SMALL, eval_interval=2), **kwargs)
    last = next(Path().rglob("last.ckpt"))
    previous = last.with_name("previous.ckpt")
    good = previous.read_bytes()
    last.write_bytes(b"damaged")
    model = PPO("CartPole-v1", **{**SMALL, "total_steps": 8 * 96}, eval_interval=100)
    fit(model, ckpt_path=previous, **kwargs)
    assert previous.read_bytes() == good
