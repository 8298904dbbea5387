"""What averages weights leaves counters, statistics and training itself alone."""

import copy
from pathlib import Path

import gymnasium as gym
import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.callbacks import AsyncEvaluation, PPOCallback
from ppo_lightning.errors import EnvironmentFault

SMALL = {"num_envs": 2, "num_steps": 32, "total_steps": 640, "num_minibatches": 2, "num_eval_episodes": 1}
RUN = {"enable_checkpointing": True, "limit_val_batches": 1, "check_val_every_n_epoch": 4}


class Late(WeightAveraging):
    """Averages every third step only, without buffers."""

    def __init__(self):
        super().__init__(use_buffers=False)

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx % 3 == 2


AVERAGES = {
    "mean": WeightAveraging,
    "exponential": lambda: EMAWeightAveraging(decay=0.9),
    "exponential by epochs": lambda: EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=2),
    "seldom, without buffers": Late,
}


class Trajectory(PPOCallback):
    """The weights of training after each update, and what an evaluation sees."""

    def __init__(self):
        super().__init__()
        self.weights, self.seen, self.rates = [], [], []

    def on_update_end(self, trainer, pl_module, update):
        self.weights.append(weights(pl_module))
        self.rates.append(pl_module.learning_rate)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen.append((pl_module.num_env_steps, pl_module.policy_version, weights(pl_module)))


def weights(model) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def model_of(seed=1, **kwargs) -> PPO:
    lightning.seed_everything(seed, verbose=False)
    options = {"normalize_observation": True, "normalize_reward": True, **SMALL, **kwargs}
    return PPO("CartPole-v1", **options)


def counters(state) -> list[int]:
    names = ("env_steps", "iterations", "n_updates", "policy.moments.count", "reward_normalizer.moments.count")
    return [int(state[name]) for name in names]


@pytest.mark.parametrize("name", AVERAGES)
def test_counters_statistics_and_training_are_those_without_averaging(fit, name, tmp_path):
    plain, averaged = Trajectory(), Trajectory()
    without, model = model_of(), model_of()
    fit(without, callbacks=[plain], **{**RUN, "enable_checkpointing": False})
    logger = CSVLogger(tmp_path, version=0)
    trainer = fit(model, callbacks=[AVERAGES[name](), averaged], logger=logger, **RUN)
    for one, other in zip(plain.weights, averaged.weights, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert plain.rates == averaged.rates
    assert counters(model.state_dict()) == counters(without.state_dict()) == [640, 10, 40, 640, 640]
    for key in ("policy.moments.mean", "policy.moments.variance", "reward_normalizer.moments.variance"):
        assert_close(model.state_dict()[key], without.state_dict()[key], rtol=0, atol=0)
    assert [seen[:2] for seen in averaged.seen] == [(256, 4), (512, 8), (640, 10)]
    assert trainer.global_step == 10
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    step = rows[0].split(",").index("step")
    assert {int(row.split(",")[step]) for row in rows[1:]} == set(range(64, 641, 64))
    for index, (_, iterations, evaluated) in enumerate(averaged.seen):
        assert bool((evaluated != plain.weights[iterations - 1]).any()) or (
            name == "seldom, without buffers" and not index
        )
    assert (weights(model) != weights(without)).any()
    (best,) = Path(tmp_path).rglob("best.ckpt")
    saved = torch.load(best, weights_only=True)
    iterations = saved["global_step"]
    assert counters(saved["state_dict"]) == [
        64 * iterations,
        iterations,
        4 * iterations,
        64 * iterations,
        64 * iterations,
    ]
    evaluated = next(seen[2] for seen in averaged.seen if seen[1] == iterations)
    loaded = PPO.load_from_checkpoint(best)
    assert_close(weights(loaded), evaluated, rtol=0, atol=0)
    assert loaded.num_env_steps == 64 * iterations


@pytest.mark.parametrize("name", ["mean", "exponential"])
def test_a_resumed_run_averages_on(fit, tmp_path, name):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.policy_version == 5:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    whole, trajectory = model_of(), Trajectory()
    fit(whole, callbacks=[AVERAGES[name](), trajectory, Save()])
    saved = torch.load(tmp_path / "at.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert counters(saved[part]) == [320, 5, 20, 320, 320]
    assert_close(torch.cat([saved["current_model_state"][key].flatten() for key, _ in whole.named_parameters()]),
                 trajectory.weights[4], rtol=0, atol=0)  # fmt: skip
    resumed, second = model_of(2), Trajectory()
    fit(resumed, callbacks=[AVERAGES[name](), second], ckpt_path=tmp_path / "at.ckpt")
    for one, other in zip(second.weights, trajectory.weights[5:], strict=True):
        assert_close(one, other, rtol=0, atol=0)
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert counters(resumed.state_dict()) == [640, 10, 40, 640, 640]


def test_the_last_checkpoint_of_a_run_resumes_with_the_weights_of_training(fit, tmp_path):
    trajectory = Trajectory()
    fit(model_of(), callbacks=[WeightAveraging(), trajectory], **RUN)
    (last,) = Path(tmp_path).rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    names = [name for name, _ in model_of().named_parameters()]
    assert_close(torch.cat([saved["current_model_state"][name].flatten() for name in names]), trajectory.weights[-1],
                 rtol=0, atol=0)  # fmt: skip
    assert counters(saved["state_dict"]) == [640, 10, 40, 640, 640]


def test_an_interrupted_evaluation_of_averages_leaves_the_weights_of_training(fit, tmp_path):
    class Breaks(gym.Wrapper):
        armed = False

        def step(self, action):
            if Breaks.armed:
                raise ZeroDivisionError
            return super().step(action)

    class Arms(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            Breaks.armed = pl_module.policy_version == 8

    model, trajectory = model_of(wrappers=[Breaks]), Trajectory()
    with pytest.raises(EnvironmentFault):
        fit(model, callbacks=[WeightAveraging(), trajectory, Arms()], **RUN)
    assert_close(weights(model), trajectory.weights[7], rtol=0, atol=0)
    (last,) = Path(tmp_path).rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    current = torch.cat([saved["current_model_state"][name].flatten() for name, _ in model.named_parameters()])
    averaged = torch.cat([saved["state_dict"][name].flatten() for name, _ in model.named_parameters()])
    assert_close(current, trajectory.weights[7], rtol=0, atol=0)
    assert_close(averaged, torch.stack(trajectory.weights[:8]).mean(0), rtol=1e-4, atol=1e-6)


def test_the_average_is_that_of_the_weights(fit):
    model, trajectory = model_of(), Trajectory()
    fit(model, callbacks=[WeightAveraging(), trajectory])
    assert_close(weights(model), torch.stack(trajectory.weights).mean(0), rtol=1e-4, atol=1e-6)


class Normed(ActorCritic):
    """Has statistics of its own, and a table of whole numbers."""

    def __init__(self, *spaces):
        super().__init__(*spaces)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.tensor([5, 7, 11]))
        self.register_buffer("allowed", torch.tensor([True, False]))

    def actor(self, features):
        return super().actor(self.norm(features))


def test_other_buffers_of_floats_are_averaged_and_whole_numbers_are_not(fit):
    model = model_of(policy=Normed)
    fit(model, callbacks=[EMAWeightAveraging(decay=0.999)])
    network = model.policy.network
    assert network.table.tolist() == [5, 7, 11]
    assert network.allowed.tolist() == [True, False]
    assert network.norm.running_mean.abs().sum() > 0


def test_an_average_of_ones_own_may_be_swapped_in(fit):
    """As WeightAveraging does, by torch's own class."""

    class Own(Callback):
        def on_train_start(self, trainer, pl_module):
            self.average = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.average.update_parameters(pl_module)
            pairs = zip(self.average.module.parameters(), pl_module.parameters(), strict=True)
            buffers = zip(self.average.module.buffers(), pl_module.buffers(), strict=True)
            for one, other in [*pairs, *buffers]:
                other.data.copy_(one.data)

    model = model_of()
    trainer = fit(model, callbacks=[Own()])
    assert counters(model.state_dict()) == [640, 10, 40, 640, 640]
    assert trainer.global_step == 10


def test_a_copy_of_a_model_counts_by_itself(fit):
    model = model_of()
    fit(model, max_epochs=2)
    other = copy.deepcopy(model)
    fit(model, max_epochs=2)
    assert (other.num_env_steps, model.num_env_steps) == (128, 256)
    assert_close(other.state_dict()["env_steps"], torch.tensor(128))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_averaging_copies_no_environments(fit, vectorization):
    vector = gym.make_vec("CartPole-v1", 2, vectorization_mode=vectorization)
    lightning.seed_everything(1, verbose=False)
    model = PPO(vector, **{**SMALL, "total_steps": 128})
    fit(model, callbacks=[WeightAveraging()])
    assert model.num_env_steps >= 128
    vector.close()


def test_the_compiled_update_is_averaged_as_well(fit):
    trajectory = Trajectory()
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", compile=True, num_envs=2, num_steps=32, total_steps=256, num_minibatches=2)
    fit(model, callbacks=[WeightAveraging(), trajectory], limit_val_batches=1, check_val_every_n_epoch=2)
    assert (model.num_env_steps, model.policy_version) == (256, 4)
    assert_close(weights(model), torch.stack(trajectory.weights).mean(0), rtol=1e-4, atol=1e-6)


def test_evaluations_beside_training_would_be_about_other_weights(fit):
    with pytest.raises(InputError, match="AsyncEvaluation evaluates the weights of training"):
        fit(model_of(), callbacks=[WeightAveraging(), AsyncEvaluation()])
