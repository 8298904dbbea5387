"""Dropout and the like: on while the policy is trained, off while it is evaluated or asked, whatever interrupts that."""

import lightning
import pytest
import torch
from lightning import Callback
from torch import nn

from ppo_lightning import PPO, ActorCritic
from ppo_lightning.callbacks import AsyncEvaluation
from ppo_lightning.policy import in_eval_mode

pytestmark = pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training")

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 128, "num_minibatches": 2, "num_eval_episodes": 2}


class Dropping(nn.Module):
    """A network whose dropout notes in which mode it is called, with a part that stays in evaluation mode."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.trunk, self.dropout = nn.Linear(4, 16), nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.9).eval()
        self.head = nn.Linear(16, 3)
        self.seen: list[bool] = []
        self.fails = False

    def forward(self, features):
        self.seen.append(self.dropout.training)
        assert not self.frozen.training
        if self.fails:
            raise KeyboardInterrupt if self.fails == "interrupt" else ZeroDivisionError
        output = self.head(self.frozen(self.dropout(self.trunk(features).tanh())))
        return output[:, :2], output[:, 2]


def model_of(**kwargs) -> PPO:
    return PPO("CartPole-v1", policy=Dropping, **{**SMALL, **kwargs})


class Fails(Callback):
    """Lets an evaluation fail, in a hook or within it."""

    def __init__(self, hook, error):
        self.error, self.armed = error, True
        setattr(self, hook, self.fail)

    def fail(self, trainer, pl_module, *_):
        if self.armed and pl_module.policy_version == 2:
            self.armed = False
            raise self.error


class Breaks(Fails):
    def __init__(self, kind):
        super().__init__("on_validation_batch_start", None)
        self.kind = kind

    def fail(self, trainer, pl_module, *_):
        pl_module.policy.network.fails = self.kind if pl_module.policy_version == 2 else False


INTERRUPTIONS = {
    "an error within": lambda: Breaks("error"),
    "an interrupt within": lambda: Breaks("interrupt"),
    "an error before": lambda: Fails("on_validation_start", ZeroDivisionError()),
    "an error after": lambda: Fails("on_validation_end", ZeroDivisionError()),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_training_after_an_interrupted_evaluation_has_its_dropout(fit, name):
    model = model_of()
    network = model.policy.network
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, SystemExit)):
        fit(model, callbacks=[INTERRUPTIONS[name]()], limit_val_batches=1, check_val_every_n_epoch=2)
    network.fails = False
    assert network.dropout.training
    assert network.training
    assert not network.frozen.training
    network.seen.clear()
    fit(model)
    assert network.seen
    assert all(network.seen)


def test_validation_and_test_of_a_trainer_leave_the_modes_as_they_were(tmp_path):
    model = model_of()
    network = model.policy.network
    for call in ("validate", "test"):
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, barebones=False
        )
        network.seen.clear()
        network.fails = "error"
        with pytest.raises(ZeroDivisionError):
            getattr(trainer, call)(model, verbose=False)
        network.fails = False
        assert network.dropout.training
        getattr(trainer, call)(model, verbose=False)
        assert network.dropout.training
        assert not any(network.seen)


@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_evaluate_and_predict_act_without_dropout_and_restore_the_modes(kind):
    model = model_of()
    network = model.policy.network
    assert network.dropout.training
    network.seen.clear()
    assert model.evaluate(2) == model.evaluate(2)
    actions = {int(model.predict(torch.full((4,), 0.01).numpy())) for _ in range(20)}
    assert len(actions) == 1
    assert not any(network.seen)
    network.fails = kind
    for call in (model.evaluate, lambda: model.predict(torch.zeros(4).numpy())):
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            call()
        assert network.dropout.training
        assert not network.frozen.training


def test_a_loaded_model_trains_with_dropout_after_an_evaluation(fit, tmp_path):
    fit(model_of(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    model = PPO.load_from_checkpoint(tmp_path / "a.ckpt", policy=Dropping)
    model.evaluate(1)
    model.policy.network.seen.clear()
    fit(model)
    assert model.policy.network.seen
    assert all(model.policy.network.seen)


def test_modes_that_the_user_chose_stay(fit):
    model = model_of()
    model.policy.network.dropout.eval()
    fit(model, limit_val_batches=1, check_val_every_n_epoch=1)
    assert model.policy.network.training
    assert not model.policy.network.dropout.training
    assert not any(model.policy.network.seen)


class Halves(ActorCritic):
    def __init__(self, *spaces):
        super().__init__(*spaces)
        self.action_head = nn.Sequential(nn.Dropout(0.5), self.action_head)


def test_a_network_with_dropout_may_have_halves():
    model = PPO("CartPole-v1", policy=Halves, **SMALL)
    assert model.policy.network.action_head[0].training


class Certain(nn.Module):
    """Goes right, unless its dropout takes the reason away."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.reason, self.dropout, self.value = nn.Parameter(torch.ones(1)), nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, features):
        reason = self.dropout(self.reason.expand(len(features)))
        return torch.stack([torch.full_like(reason, 0.5), reason], 1), self.value(features).squeeze(-1)


@pytest.mark.long
def test_an_evaluation_in_another_process_is_without_dropout(fit):
    model = PPO("CartPole-v1", policy=Certain, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0), **SMALL)
    fit(model, callbacks=[AsyncEvaluation()], check_val_every_n_epoch=4)
    mean = float(model.trainer.callback_metrics["eval/mean_reward"])
    assert mean < 11  # always right: the pole falls at once


class Counts(nn.Dropout):
    """Keeps its mode in a way of its own."""

    switched = 0

    def train(self, mode=True):
        self.switched += 1
        return super().train(mode)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize(
    "make", [lambda: nn.Dropout(0.5), lambda: Counts(0.5), lambda: torch.jit.script(nn.Dropout(0.5))]
)
def test_every_kind_of_module_is_in_evaluation_mode_and_comes_back(make):
    network = nn.Sequential(nn.Linear(4, 4), make(), nn.Sequential(nn.Dropout(0.5)).eval())
    given = torch.ones(64, 4)
    with in_eval_mode(network):
        assert torch.equal(network(given), network[0](given))
    assert (network[1].training, network[2].training, network[2][0].training) == (True, False, False)
    assert not torch.equal(network(given), network[0](given))
    assert getattr(network[1], "switched", 1) == 1
