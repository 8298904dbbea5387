"""When checkpoints are saved, evaluations made and metrics logged, and what each file can be used for."""

import csv
import shutil
from datetime import timedelta
from pathlib import Path

import gymnasium as gym
import pytest
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from ppo_lightning import PPO
from ppo_lightning.callbacks import PPOCallback
from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import VerifiedCheckpointIO, read_checkpoint, resumes_exactly

ITERATION = 2 * 16
"""Environment steps of an iteration of the models here."""


def make(env="CartPole-v1", *, iterations=4, **options):
    sizes = {"num_envs": 2, "num_steps": 16, "update_epochs": 1, "num_minibatches": 2, "num_eval_episodes": 1}
    return PPO(env, **{**sizes, "total_steps": iterations * ITERATION, **options})


def fit_with_files(fit, model, *callbacks, **options):
    return fit(model, callbacks=list(callbacks), **{"enable_checkpointing": True, "limit_val_batches": 1, **options})


@pytest.mark.parametrize("limit_val_batches", [1, 0])
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_of_every_fourth_iteration_is_saved_whatever_the_evaluation_interval(fit, limit_val_batches):
    checkpoint = ModelCheckpoint("every", filename="{epoch}", every_n_epochs=4, save_top_k=-1)
    fit_with_files(fit, make(iterations=24, eval_interval=5), checkpoint, limit_val_batches=limit_val_batches)
    assert {path.stem for path in Path("every").iterdir()} == {f"epoch={epoch}" for epoch in range(3, 24, 4)}


@pytest.mark.parametrize(("every", "saved"), [(4, {4, 9, 14, 19}), (3, {4, 9, 14, 19}), (7, {9, 14})])
def test_a_checkpoint_of_a_score_that_is_due_is_saved_at_the_next_evaluation(fit, every, saved):
    checkpoint = ModelCheckpoint(
        "scored", filename="{epoch}", monitor="eval/mean_reward", every_n_epochs=every, save_top_k=-1
    )
    fit_with_files(fit, make(iterations=20, eval_interval=5), checkpoint)
    assert {path.stem for path in Path("scored").iterdir()} == {f"epoch={epoch}" for epoch in saved}


@pytest.mark.parametrize(
    "when", [{"train_time_interval": timedelta(microseconds=1)}, {"every_n_train_steps": 1}, {"every_n_epochs": 1}]
)
def test_each_checkpoint_is_named_by_the_environment_steps_that_it_was_saved_at(fit, when):
    checkpoint = ModelCheckpoint("all", filename="{step}", save_top_k=-1, **when)
    fit_with_files(fit, make(eval_interval=3), checkpoint)
    assert {path.stem for path in Path("all").iterdir()} == {f"step={n * ITERATION}" for n in (1, 2, 3, 4)}
    for path in Path("all").iterdir():
        assert int(read_checkpoint(path)["state_dict"]["env_steps"]) == int(path.stem.removeprefix("step="))


def test_best_is_the_best_policy_in_ranks_that_are_forked(fit, tmp_path):
    trainer = fit_with_files(fit, make(iterations=2), strategy="ddp_notebook", devices=2)
    assert Path(trainer.checkpoint_callback.best_model_path).name == "best.ckpt"


@pytest.fixture
def weights_alone(fit):
    """A trained model, and its weights in a file."""
    model = make(iterations=2)
    fit_with_files(fit, model).save_checkpoint("weights.ckpt", weights_only=True)
    return model


def test_a_checkpoint_of_weights_alone_acts_and_is_evaluated_and_resumes_nothing(weights_alone, fit, tmp_path):
    loaded = PPO.load_from_checkpoint("weights.ckpt")
    observation = loaded.observation_space.sample()
    assert loaded.predict(observation) == weights_alone.predict(observation)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (evaluated,) = trainer.validate(make(), ckpt_path="weights.ckpt", verbose=False)
    assert evaluated["eval/mean_ep_length"] >= 1
    with pytest.raises(InputError, match=r"holds weights alone .* give last\.ckpt"):
        fit(make(), ckpt_path="weights.ckpt")


def test_checkpoints_that_are_written_beside_training_can_be_read(fit, tmp_path):
    model = make()
    trainer = fit_with_files(fit, model, plugins=[AsyncCheckpointIO()])
    for name in ("best", "last", "previous"):
        assert read_checkpoint(tmp_path / f"checkpoints/{name}.ckpt")
    assert PPO.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt").num_env_steps == 4 * ITERATION
    assert isinstance(trainer.strategy.checkpoint_io.checkpoint_io, VerifiedCheckpointIO)


def test_a_plugin_whose_files_could_not_be_loaded_is_refused(fit):
    class Own(TorchCheckpointIO):
        pass

    with pytest.raises(InputError, match="Own writes checkpoints that may be incomplete"):
        fit(make(), plugins=[Own()])


def of_twenty_steps():
    return gym.make("Pendulum-v1", max_episode_steps=20)


@pytest.mark.parametrize(
    ("kind", "options"), [(EarlyStopping, {"patience": 100}), (ModelCheckpoint, {"dirpath": "own"})]
)
def test_what_monitors_returns_waits_until_an_episode_has_ended(fit, kind, options):
    callback = kind(monitor="rollout/ep_rew_mean", mode="max", **options)
    model = make(of_twenty_steps)  # the first episodes end in the second iteration
    fit_with_files(fit, model, callback, limit_val_batches=0)
    assert model.policy_version == 4
    if isinstance(callback, ModelCheckpoint):
        assert callback.best_model_score is not None
    else:
        assert callback.best_score.isfinite()


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_metric_that_never_comes_is_named_with_the_nearest_one(fit, kind):
    with pytest.raises(InputError, match=r"monitors rollout/ep_rew_maen, .* did you mean rollout/ep_rew_mean"):
        fit_with_files(fit, make(), kind(monitor="rollout/ep_rew_maen"))


class LogsEverywhere(Callback):
    """Logs one number in each hook where Lightning allows it."""

    def on_train_start(self, trainer, pl_module):
        pl_module.log("on/train_start", 1.0)

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.log("on/train_epoch_start", 1.0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.log("on/train_batch_start", 1.0, on_step=True, on_epoch=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("on/train_batch_end", 1.0, on_epoch=True)

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("on/train_epoch_end", 1.0)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("on/validation_epoch_end", 1.0)


@pytest.mark.parametrize("interval", ["step", "epoch", None])
def test_everything_is_logged_over_environment_steps(fit, tmp_path, interval):
    logger = CSVLogger(tmp_path)
    callbacks = [LogsEverywhere(), LearningRateMonitor(interval)]
    fit_with_files(fit, make(eval_interval=2), *callbacks, logger=logger)
    with open(Path(logger.log_dir, "metrics.csv")) as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        if name not in ("step", "epoch"):
            steps = {float(row["step"]) for row in rows if row[name]}
            # What is logged before the first rollout has none behind it.
            assert steps <= {n * ITERATION for n in range(5)}, name
            assert len(steps) >= 2 or "train_start" in name, (name, steps)


@pytest.mark.parametrize("ends", ["callback", "early stopping", "max_time"])
def test_the_last_policy_is_evaluated_whatever_ends_the_run(fit, tmp_path, ends):
    class Ends(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = pl_module.policy_version == 3

    class Counts(Callback):
        steps: list = []  # noqa: RUF012

        def on_validation_end(self, trainer, pl_module):
            self.steps.append(pl_module.num_env_steps)

    early = EarlyStopping("time/iterations", mode="max", stopping_threshold=2.5)
    callback = {"callback": [Ends()], "early stopping": [early], "max_time": []}[ends]
    options = {"max_time": timedelta(seconds=0.5)} if ends == "max_time" else {}
    counts, model = Counts(), make(iterations=5000, eval_interval=10_000)
    counts.steps = []
    fit_with_files(fit, model, counts, *callback, **options)
    assert model.policy_version == 3 or ends == "max_time"
    assert model.policy_version < 5000
    assert counts.steps == [model.num_env_steps]
    best = read_checkpoint(tmp_path / "checkpoints/best.ckpt")
    assert int(best["state_dict"]["env_steps"]) == model.num_env_steps


def test_a_run_that_fails_keeps_the_file_that_resumes_exactly(fit, tmp_path):
    """Beside it there is a newer one, of weights and counters."""

    def fail(trainer, model, rollout):
        if model.policy_version == 7:
            raise RuntimeError("not today")

    model = make(iterations=20, eval_interval=5)
    with pytest.raises(RuntimeError, match="not today"):
        fit_with_files(fit, model, PPOCallback(on_rollout_end=fail))
    last, newer = (read_checkpoint(tmp_path / f"checkpoints/{name}.ckpt") for name in ("last", "on_exception"))
    assert [int(one["state_dict"]["iterations"]) for one in (last, newer)] == [5, 7]
    assert [resumes_exactly(one, world_size=1) for one in (last, newer)] == [True, False]


def test_a_run_whose_folder_has_moved_keeps_its_best_score(fit, tmp_path):
    def run(root, **kwargs):
        return fit_with_files(fit, make(**kwargs.pop("of")), default_root_dir=root, **kwargs).checkpoint_callback

    before = run(tmp_path / "here", of={"iterations": 2})
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "alone/checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "there/checkpoints/last.ckpt", tmp_path / "alone/checkpoints")
    last = tmp_path / "alone/checkpoints/last.ckpt"
    assert Path(run(tmp_path / "alone", of={"iterations": 3}, ckpt_path=last).best_model_path).is_file()
    after = run(tmp_path / "there", of={"iterations": 3}, ckpt_path=tmp_path / "there/checkpoints/last.ckpt")
    assert after.best_model_score >= before.best_model_score
    assert Path(after.best_model_path).resolve() == (tmp_path / "there/checkpoints/best.ckpt").resolve()
    contents = read_checkpoint(tmp_path / "there/checkpoints/best.ckpt")
    assert contents["state_dict"]["env_steps"] > 0


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("options", [{"save_last": True, "save_weights_only": True}, {"save_last": "link"}])
def test_a_last_checkpoint_of_the_user_does_not_replace_that_of_the_run(fit, options):
    own = ModelCheckpoint(**options)
    trainer = fit_with_files(fit, make(iterations=4), own)
    folder = Path(trainer.default_root_dir) / "checkpoints"
    assert own.last_model_path == str(folder / "last-v1.ckpt")
    assert own.CHECKPOINT_NAME_LAST == "last"
    last, previous = (read_checkpoint(folder / name) for name in ("last.ckpt", "previous.ckpt"))
    assert (last["global_step"], previous["global_step"]) == (4, 3)
    fit_with_files(fit, make(iterations=5), ModelCheckpoint(**options), ckpt_path=folder / "last.ckpt")


@pytest.mark.parametrize("name", ["best", "last", "previous", "on_exception"])
def test_a_file_that_the_run_writes_is_nobody_elses(fit, tmp_path, name):
    with pytest.raises(InputError, match=f"would write .*{name}.ckpt, which this run writes itself: give another"):
        fit_with_files(fit, make(), ModelCheckpoint(filename=name, monitor="rollout/ep_rew_mean"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    fit_with_files(fit, make(), ModelCheckpoint("elsewhere", filename=name))


@pytest.mark.filterwarnings("ignore:.*ckpt_path:UserWarning")  # Lightning resumes by itself with such a callback
def test_a_callback_that_saves_on_exceptions_leaves_the_checkpoints_of_the_run(fit, tmp_path):
    fit_with_files(fit, make(), OnExceptionCheckpoint(tmp_path / "checkpoints"))
    assert {path.stem for path in tmp_path.rglob("*.ckpt")} == {"best", "last", "previous"}


def test_metrics_are_logged_at_the_interval_of_the_trainer_and_at_the_end(fit, tmp_path):
    logger = CSVLogger(tmp_path, name="", version=0)
    own = PPOCallback(on_iteration_end=lambda trainer, model, metrics: model.log_metrics({"own": 1.0}))
    fit_with_files(fit, make(iterations=10), own, logger=logger, log_every_n_steps=4, limit_val_batches=0)
    with (tmp_path / "version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/value_loss", "own"):
        steps = [int(row["step"]) for row in rows if row[name]]
        assert steps == [4 * ITERATION, 8 * ITERATION, 10 * ITERATION]
