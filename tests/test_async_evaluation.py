"""Evaluations in another process: of the snapshot that was taken, logged and kept as that, and never in training's way."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium.vector import SyncVectorEnv
from hills import Hill
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from probes import Probe, Uneven
from torch.testing import assert_close

from ppo_lightning import PPO, InputError
from ppo_lightning.callbacks import AsyncEvaluation, BestCheckpoint, Curriculum, Level, async_evaluation
from ppo_lightning.envs import EnvOverrides, RestartBudget
from ppo_lightning.evaluation.process import EvalProcess, Evaluation, EvaluationFailed, evaluate_snapshot
from ppo_lightning.runs.checkpoint import read_checkpoint
from ppo_lightning.tools.sweep import fit_process


class Kept(DummyLogger):
    """What was logged of evaluations, by step."""

    def __init__(self):
        super().__init__()
        self.evaluations = {}

    def log_metrics(self, metrics, step=None):
        if "eval/mean_reward" in metrics:
            assert step not in self.evaluations
            self.evaluations[step] = {name: value for name, value in metrics.items() if name.startswith("eval/")}


class Here:
    """An evaluator that needs no process of its own, which takes seconds to start; its answer comes when it is waited for."""

    def __init__(self, evaluation, timeout_s):
        _, _, self.evaluation = cloudpickle.loads(evaluation)
        assert not self.evaluation.policy.training

    def submit(self, weights, seed, overrides):
        self.job, self.overrides = (weights, seed), overrides

    def poll(self, wait_s):
        if not wait_s:
            return None
        environments = self.evaluation.make_environments(self.overrides, RestartBudget())
        return evaluate_snapshot(self.evaluation, environments, *self.job)

    def close(self):
        pass


@pytest.fixture
def _here(monkeypatch):
    monkeypatch.setattr(async_evaluation, "EvalProcess", Here)


class Compare(Callback):
    """Evaluates in the training process, too."""

    def __init__(self, **kwargs):
        self.evaluations, self.weights, self.kwargs = {}, {}, kwargs

    def on_train_epoch_end(self, trainer, pl_module):
        self.evaluations[pl_module.num_env_steps] = pl_module.evaluate(**self.kwargs)
        self.weights[pl_module.num_env_steps] = {name: t.clone() for name, t in pl_module.state_dict().items()}


class Wait(Callback):
    """Lets every evaluation end before the next iteration."""

    def on_train_epoch_end(self, trainer, pl_module):
        (beside,) = (callback for callback in trainer.callbacks if isinstance(callback, AsyncEvaluation))
        while beside.poll(trainer, time.monotonic() + 60):
            pass


class Sleeper(Probe):
    """Evaluations, which are reset with a seed of their own process, hang, or kill their process."""

    def __init__(self, parent: int, deed: str, length: int = 1) -> None:
        super().__init__()
        self.parent, self.deed, self.length, self.pay = parent, deed, length, 1.0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        if os.getpid() != self.parent:
            match self.deed:
                case "sleep":
                    time.sleep(600)
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "raise":
                    raise ZeroDivisionError("the pole is at infinity")
        self.steps += 1
        return self.see(0.0), self.pay, self.steps == self.length, False, {}


def cartpole(**kwargs):
    settings = {"num_envs": 2, "num_steps": 32, "total_steps": 256, "num_eval_episodes": 5}
    model = PPO(**{"env": "CartPole-v1", **settings, **kwargs})
    model.seed = 5
    return model


def processes():
    """Evaluating processes that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"ppo_lightning.evaluation.process" in words and f", {os.getpid()})".encode() in words:
            found.append(path.parent.name)
    return found


def test_a_snapshot_has_the_statistics_that_evaluate_gives_at_its_step_and_training_is_the_same_without(fit, tmp_path):
    """Normalisers and PopArt included: all statistics, all steps, all digits; and drawn actions are the same draws."""
    logger, compare = Kept(), Compare(deterministic=False)
    runs = []
    for callbacks in ([], [AsyncEvaluation(every=1, deterministic=False), Wait(), compare]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = cartpole(normalize_observation=True, normalize_reward=True, popart={"beta": 0.01})
        folder = tmp_path / f"{len(callbacks)} callbacks"
        trainer = fit(model, logger=logger, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder)
        random = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())  # noqa: NPY002
        runs.append((model.state_dict(), random, model.generator.get_state()))
    assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert logger.evaluations == compare.evaluations
    assert list(logger.evaluations) == [64, 128, 192, 256]
    assert len({str(statistics) for statistics in logger.evaluations.values()}) > 1
    assert {n: trainer.callback_metrics[n].item() for n in logger.evaluations[256]} == logger.evaluations[256]
    assert processes() == []


@pytest.mark.usefixtures("_here")
def test_best_ckpt_is_the_snapshot_that_was_evaluated_not_what_training_has_become(fit, tmp_path):
    logger, compare = Kept(), Compare()
    model = cartpole(normalize_observation=True, normalize_reward=True, popart={"beta": 0.01}, total_steps=512)
    trainer = fit(
        model,
        logger=[logger, CSVLogger(tmp_path, "", "run")],
        callbacks=[AsyncEvaluation(every=2), compare],
        enable_checkpointing=True,
    )
    score = {step: statistics["eval/mean_reward"] for step, statistics in logger.evaluations.items()}
    first_best = max(score, key=lambda step: score[step])
    (best,) = (callback for callback in trainer.callbacks if isinstance(callback, BestCheckpoint))
    loaded = PPO.load_from_checkpoint(best.best_model_path)
    assert loaded.num_env_steps == first_best
    assert_close(loaded.state_dict(), compare.weights[first_best], rtol=0, atol=0)
    loaded.seed = 5
    assert loaded.evaluate() == logger.evaluations[first_best]
    assert best.best_model_score == max(score.values())
    held = read_checkpoint(best.best_model_path)
    assert held["callbacks"]["RunSummary"]["evaluations"]["last"] == {
        "step": first_best,
        **logger.evaluations[first_best],
    }
    assert held["callbacks"]["RunSummary"]["train"]["last"]["step"] == first_best
    assert held["callbacks"]["BestCheckpoint"]["best_model_score"] == max(score.values())
    assert (
        held["callbacks"].keys()
        == read_checkpoint(Path(best.best_model_path).with_name("last.ckpt"))["callbacks"].keys()
    )


@pytest.mark.usefixtures("_here")
def test_a_run_resumes_from_the_best_snapshot_bit_for_bit(fit, tmp_path):
    """A snapshot is a whole checkpoint: optimiser, environments and random streams as they were."""
    straight = cartpole(total_steps=256, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.0))
    best = fit(straight, callbacks=[AsyncEvaluation(every=1), Wait()], enable_checkpointing=True).checkpoint_callback
    assert isinstance(best, BestCheckpoint)
    path = best.best_model_path
    begun = read_checkpoint(path)["state_dict"]["env_steps"]
    resumed = cartpole(total_steps=256, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.0))
    fit(resumed, ckpt_path=path, enable_checkpointing=True, limit_val_batches=1.0)
    assert 0 < begun < 256
    assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert torch.equal(resumed.generator.get_state(), straight.generator.get_state())
    lengths = [[episode[1] for episode in model.rollouts.episodes.ep_info_buffer] for model in (straight, resumed)]
    assert lengths[0] == lengths[1]


@pytest.mark.usefixtures("_here")
def test_training_does_not_wait_and_the_newest_snapshot_is_the_next(fit):
    """The first evaluation ends after training: of those that were due meanwhile, the last one follows."""
    logger = Kept()
    fit(cartpole(total_steps=640), logger=logger, callbacks=[AsyncEvaluation(every=1)])
    assert list(logger.evaluations) == [64, 640]


def packed(deed):
    model = PPO(Sleeper, {"parent": os.getpid(), "deed": deed})
    maker, space = model.env_factory, model.observation_space
    return Evaluation(model.policy, maker, space, 1, 1, True, 60.0, 0, (), False).pickled(), model.policy.state_dict()


def weights_of(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_an_evaluation_that_raises_or_hangs_or_dies_says_so():
    evaluation, state = packed("raise")
    evaluator = EvalProcess(evaluation, timeout_s=60.0)
    try:
        evaluator.submit(weights_of(state), 0, EnvOverrides())
        with pytest.raises(EvaluationFailed, match="ZeroDivisionError in step: the pole is at infinity"):
            evaluator.poll(60.0)
        os.kill(evaluator.process.pid, signal.SIGSTOP)
        evaluator.timeout_s = 0.1
        evaluator.submit(weights_of(state), 0, EnvOverrides())
        assert evaluator.poll(0.0) is None
        with pytest.raises(EvaluationFailed, match=r"took longer than timeout_s = 0.1 s"):
            evaluator.poll(0.2)
        os.kill(evaluator.process.pid, signal.SIGKILL)
        with pytest.raises(EvaluationFailed, match="its process ended by SIGKILL"):
            evaluator.poll(60.0)
    finally:
        evaluator.close()
    assert processes() == []


@pytest.mark.usefixtures("_here")
def test_an_evaluation_without_result_costs_one_warning_and_the_next_has_a_new_process(fit, monkeypatch):
    begun = []

    class FailsFirst(Here):
        def __init__(self, *args):
            super().__init__(*args)
            begun.append(self)

        def poll(self, wait_s):
            if len(begun) == 1:
                raise EvaluationFailed("its process ended by SIGKILL")
            return super().poll(wait_s)

    monkeypatch.setattr(async_evaluation, "EvalProcess", FailsFirst)
    logger, model = Kept(), cartpole()
    with pytest.warns(UserWarning, match="has no result") as caught:
        fit(model, logger=logger, callbacks=[AsyncEvaluation(every=2)])
    messages = [str(warning.message) for warning in caught if "evaluation" in str(warning.message)]
    assert messages == [
        "the evaluation at step 128 has no result (its process ended by SIGKILL): training continues, and the next "
        "evaluation has a new process"
    ]
    assert list(logger.evaluations) == [256]
    assert model.num_env_steps == 256
    assert len(begun) == 2


@pytest.mark.usefixtures("_here")
def test_where_no_process_can_be_had_training_continues(fit, monkeypatch):
    begun = []

    class Full(Here):
        def __init__(self, *args):
            super().__init__(*args)
            begun.append(self)
            if len(begun) > 1:
                raise BlockingIOError("Resource temporarily unavailable")

        def poll(self, wait_s):
            raise EvaluationFailed("its process ended by SIGKILL")

    monkeypatch.setattr(async_evaluation, "EvalProcess", Full)
    model = cartpole()
    with pytest.warns(UserWarning, match="has no result") as caught:
        fit(model, callbacks=[AsyncEvaluation(every=2)])
    assert "step 256 has no result (Resource temporarily unavailable): training" in str(caught[-1].message)
    assert model.num_env_steps == 256


@pytest.mark.usefixtures("_here")
def test_a_logger_that_fails_again_hides_no_error_and_costs_no_checkpoint(fit, tmp_path):
    class Breaks(Kept):
        def log_metrics(self, metrics, step=None):
            if "train/loss" not in metrics or step == 192:
                raise ConnectionError(f"no network at {step}")

    with (
        pytest.warns(UserWarning, match=r"the last evaluation was not logged \(ConnectionError: no network at 64\)"),
        pytest.raises(ConnectionError, match="no network at 192"),
    ):
        fit(cartpole(), logger=Breaks(), callbacks=[AsyncEvaluation(every=1)], enable_checkpointing=True)
    (last,) = tmp_path.rglob("last.ckpt")
    assert read_checkpoint(last)["state_dict"]["env_steps"] == 192


@pytest.mark.usefixtures("_here")
def test_an_error_in_training_loses_no_result(fit):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.num_env_steps == 128:
                raise ZeroDivisionError("planned")

    logger, model = Kept(), cartpole()
    beside = AsyncEvaluation(every=1)
    with pytest.raises(ZeroDivisionError, match="planned"):
        fit(model, logger=logger, callbacks=[beside, Fails()])
    assert list(logger.evaluations) == [64]


@pytest.mark.usefixtures("_here")
def test_an_interrupt_waits_for_what_is_under_way_and_begins_nothing(fit):
    class Interrupts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.num_env_steps == 128:
                os.kill(os.getpid(), signal.SIGINT)

    logger, model = Kept(), cartpole()
    fit(model, logger=logger, callbacks=[AsyncEvaluation(every=1), Interrupts()])
    assert model.agreed_stop_signal is signal.SIGINT
    assert model.num_env_steps == 192
    assert list(logger.evaluations) == [64]


@pytest.mark.usefixtures("_here")
def test_a_resumed_run_keeps_the_better_policy_of_before(fit, tmp_path):
    """It compares with the score that best.ckpt has, in its own folder."""

    class Worse(Callback):
        def on_train_start(self, trainer, pl_module):
            for parameter in pl_module.policy.parameters():
                parameter.data.zero_()  # always the same action: about 9 steps

    fit(cartpole(), logger=Kept(), callbacks=[AsyncEvaluation(every=2)], enable_checkpointing=True)
    (best,) = tmp_path.rglob("best.ckpt")
    before = best.read_bytes()
    again, logger = cartpole(total_steps=512, optimizer=partial(torch.optim.Adam, lr=0.0)), Kept()
    beside = [AsyncEvaluation(every=2), Worse()]
    fit(again, ckpt_path=best.with_name("last.ckpt"), logger=logger, callbacks=beside, enable_checkpointing=True)
    assert list(logger.evaluations) == [384, 512]
    assert best.read_bytes() == before


def test_an_error_does_not_wait_for_an_evaluation_that_hangs(fit):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.num_env_steps == 64:
                raise ZeroDivisionError("planned")

    model = cartpole(env=Sleeper, env_kwargs={"parent": os.getpid(), "deed": "sleep"})
    beside = AsyncEvaluation(every=1)
    beside.PATIENCE_S = 0.5
    with (
        pytest.warns(UserWarning, match="the evaluation at step 64 was given up"),
        pytest.raises(ZeroDivisionError, match="planned"),
    ):
        fit(model, callbacks=[beside, Fails()])
    assert processes() == []


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_run_that_is_ended(tmp_path, kind):
    """Even where nothing can be done any more in the process that was killed."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, lightning, time\n"
        "from test_async_evaluation import Sleeper\n"
        "from ppo_lightning import PPO\n"
        "from ppo_lightning.callbacks import AsyncEvaluation\n"
        "options = {'num_envs': 2, 'num_steps': 8, 'total_steps': 10**9, 'compile': False}\n"
        "model = PPO(Sleeper, {'parent': os.getpid(), 'deed': 'sleep'}, **options)\n"
        "class Says(lightning.Callback):\n"
        "    def on_train_epoch_end(self, trainer, pl_module):\n"
        "        if pl_module.num_env_steps == 160: print(trainer.callbacks[0].evaluator.process.pid, flush=True)\n"
        "lightning.Trainer(callbacks=[AsyncEvaluation(every=5), Says()], accelerator='cpu', logger=False,\n"
        "    enable_progress_bar=False, enable_checkpointing=False).fit(model)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        text=True,
    ) as run:
        assert run.stdout is not None
        evaluator = next(int(line) for line in run.stdout if line.strip().isdigit())
        run.send_signal(kind)
        run.wait(timeout=60)
    until = time.monotonic() + 60
    while _lives(evaluator) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _lives(evaluator)


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.long
def test_what_only_this_process_knows_is_sent(fit):
    """A class that was made here, and is registered here."""

    class Own(Uneven):
        pass

    gym.register("TestAsyncOwn-v0", entry_point=lambda: Own())
    try:
        logger, compare = Kept(), Compare()
        fit(cartpole(env="TestAsyncOwn-v0", total_steps=64), logger=logger, callbacks=[AsyncEvaluation(), compare])
        assert logger.evaluations == compare.evaluations
    finally:
        del gym.registry["TestAsyncOwn-v0"]


@pytest.mark.usefixtures("_here")
def test_it_takes_the_place_of_evaluations_that_training_waits_for(fit):
    logger, model = Kept(), cartpole(eval_interval=2)
    trainer = fit(model, logger=logger, callbacks=[AsyncEvaluation(), Wait()], limit_val_batches=1.0)
    assert list(logger.evaluations) == [128, 256]  # eval_interval, once each
    assert trainer.limit_val_batches == 1.0
    logger.evaluations.clear()
    trainer.validate(model, verbose=False)
    assert list(logger.evaluations) == [256]


@pytest.mark.usefixtures("_here")
def test_early_stopping_hears_of_evaluations_beside_training(fit):
    stop = EarlyStopping("eval/mean_reward", mode="max", stopping_threshold=1.0)
    logger, model = Kept(), cartpole(total_steps=640)
    fit(model, logger=logger, callbacks=[stop, AsyncEvaluation(every=2), Wait()])
    assert model.num_env_steps == 128
    assert list(logger.evaluations) == [128]


@pytest.mark.usefixtures("_here")
def test_a_curriculum_and_a_sweep_hear_of_evaluations_beside_training_on_the_level_of_the_snapshot(
    fit, tmp_path, monkeypatch
):
    monkeypatch.setattr(fit_process, "exit_with_parent", lambda: None)
    told, logger = tmp_path / "told.jsonl", Kept()
    levels = [Level({"length": 2}), Level({"length": 5}, metric="eval/mean_ep_length", at_least=2, times=2)]
    beside = [AsyncEvaluation(every=1), Wait(), fit_process.Progress(str(told), "eval/mean_ep_length")]
    model = cartpole(env=Hill, total_steps=320, num_eval_episodes=2)
    fit(model, logger=logger, callbacks=[Curriculum(levels, evaluation=True), *beside])
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(row["steps"], row["value"]) for row in rows] == [(64, 2), (128, 2), (192, 5), (256, 5), (320, 5)]
    assert {step: each["eval/mean_ep_length"] for step, each in logger.evaluations.items()} == {
        row["steps"]: row["value"] for row in rows
    }


@pytest.mark.usefixtures("_here")
def test_results_that_come_late_are_logged_at_the_step_of_their_snapshot(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_process, "exit_with_parent", lambda: None)
    told = tmp_path / "told.jsonl"
    fit(cartpole(), callbacks=[AsyncEvaluation(every=1), fit_process.Progress(str(told), "eval/mean_reward")])
    assert [json.loads(line)["steps"] for line in told.read_text().splitlines()] == [64, 256]


def test_the_process_recreates_environments_on_another_level():
    evaluation, state = packed("none")
    evaluator = EvalProcess(evaluation, timeout_s=60.0)
    try:
        for setting in (
            EnvOverrides(),
            EnvOverrides({"pay": 2.0}),
            EnvOverrides({"pay": 2.0}, {"length": 3}),
            EnvOverrides(),
        ):
            evaluator.submit(weights_of(state), 0, setting)
            assert (evaluator.poll(60.0) or {})["eval/mean_reward"] == setting.attributes.get(
                "pay", 1.0
            ) * setting.env_kwargs.get("length", 1)
    finally:
        evaluator.close()


def test_a_checkpoint_of_the_users_own_that_would_save_other_weights_is_refused(fit):
    own = ModelCheckpoint(monitor="eval/mean_reward", mode="max")
    with pytest.raises(InputError, match="would save what training has become"):
        fit(cartpole(), callbacks=[AsyncEvaluation(), own], enable_checkpointing=True)


@pytest.mark.parametrize("setting", [{"every": 0}, {"episodes": -1}, {"timeout_s": 0.0}])
def test_numbers_that_make_no_sense_are_refused(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"AsyncEvaluation: {name} must be more than 0"):
        AsyncEvaluation(**setting)


def test_a_vector_that_cannot_be_made_again_is_refused(fit):
    with pytest.raises(InputError, match=r"AsyncEvaluation needs environments of its own.*give a callable"):
        fit(PPO(SyncVectorEnv([Uneven] * 2)), callbacks=[AsyncEvaluation()])


def test_what_cannot_be_sent_is_refused_before_training(fit):
    import threading

    lock = threading.Lock()

    def make():
        assert lock
        return Uneven()

    with pytest.raises(InputError, match="cannot send the policy and make to another process"):
        fit(PPO(make), callbacks=[AsyncEvaluation()])


@pytest.mark.usefixtures("_here")
def test_the_command_line_has_it(tmp_path):
    from ppo_lightning.cli import main

    words = "fit --model.env CartPole-v1 --model.total_steps 256 --model.num_envs 2 --model.num_steps 64"
    beside = "--trainer.callbacks+=ppo_lightning.callbacks.AsyncEvaluation --trainer.callbacks.every=1"
    main(f"{words} --seed_everything 3 --trainer.accelerator cpu --trainer.enable_progress_bar false {beside}".split())
    run = tmp_path / "lightning_logs/version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]["every"] == 1
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("eval/mean_reward")
    steps = [row.split(",")[rows[0].split(",").index("step")] for row in rows[1:] if row.split(",")[column]]
    assert steps == ["128", "256"]
    best = PPO.load_from_checkpoint(run / "checkpoints/best.ckpt")
    assert best.num_env_steps in (128, 256)
