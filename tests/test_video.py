"""Videos: of the episodes that were evaluated, in every place, never in training's way (fault F30)."""

import io
import os
import signal
import sys
import time
from ctypes.util import find_library
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from probes import Probe, Recall, Uneven
from processes import fit as fit_process
from processes import forked
from test_async_evaluation import Here
from torch.testing import assert_close

from ppo_lightning import PPO, EnvironmentFault, InputError
from ppo_lightning.callbacks import AsyncEvaluation, EvaluationVideo, async_evaluation, processes, record
from ppo_lightning.cli import main
from ppo_lightning.envs import EnvOverrides
from ppo_lightning.tools import video
from ppo_lightning.tools.video import open_video


class Drawn(Probe):
    """Episodes of a random length, in pictures that get brighter; it draws from everybody's random numbers."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.length = 0, int(self.np_random.integers(2, 9))
        return self.see(0.0), {}

    def step(self, action):
        self.steps += 1
        np.random.random()  # noqa: NPY002
        torch.rand(1)
        return self.see(0.0), 1.0, self.steps == self.length, False, {}

    def render(self):
        return np.full((32, 48, 3), 20 * self.steps, np.uint8)


class Levelled(Drawn):
    """Episodes of a given length, in pictures of one shade."""

    def __init__(self, render_mode: str | None = None, length: int = 2) -> None:
        super().__init__(render_mode)
        self.given, self.shade = length, 1

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.length = self.given
        return result

    def render(self):
        return np.full((32, 48, 3), 20 * self.shade, np.uint8)


def drawn(**kwargs):
    model = PPO(**{"env": Drawn, "num_envs": 2, "num_steps": 16, "total_steps": 128, "eval_interval": 1, **kwargs})
    model.seed = 5
    return model


def brightness(file):
    """Of each frame, in units of steps."""
    with open_video(file) as clip:
        return clip.fps, [round(float(frame.mean()) / 20) for frame in clip.iter_frames()]


def test_a_video_shows_the_episodes_of_the_evaluation_whole_and_nothing_else(tmp_path):
    model = drawn(num_envs=1)
    file = record(model, tmp_path / "videos", episodes=3)
    assert file == tmp_path / "videos/step_0.mp4"
    fps, seen = brightness(file)
    lengths, starts = [], [index for index, step in enumerate(seen) if step == 0]
    for begin, end in zip(starts, [*starts[1:], len(seen)], strict=True):
        assert seen[begin:end] == list(range(end - begin))
        lengths.append(end - begin - 1)
    assert fps == 25
    assert len(lengths) == 3
    assert np.mean(lengths) == pytest.approx(model.evaluate(3)["eval/mean_ep_length"])
    assert os.listdir(tmp_path / "videos") == ["step_0.mp4"]
    assert brightness(record(model, tmp_path, fps=10))[0] == 10


def test_a_video_of_long_episodes_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 4)
    assert len(brightness(record(drawn(), tmp_path, episodes=9))[1]) == 5


def test_training_is_the_same_with_and_without(fit):
    runs = []
    for callbacks in ([], [EvaluationVideo()]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = drawn()
        fit(model, callbacks=callbacks, limit_val_batches=1.0)
        random = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())  # noqa: NPY002
        runs.append((model.state_dict(), random, model.generator.get_state()))
    assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_every_second_evaluation_and_the_last_are_recorded(fit, tmp_path):
    names = lambda: sorted(int(path.stem[5:]) for path in (tmp_path / "videos").iterdir())  # noqa: E731
    fit(drawn(total_steps=160), callbacks=[EvaluationVideo(every=2)], limit_val_batches=1.0)
    assert names() == [64, 128, 160]


def test_beside_async_evaluations_the_interval_counts(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(async_evaluation, "EvalProcess", Here)
    fit(drawn(eval_interval=3), callbacks=[AsyncEvaluation(), EvaluationVideo()])
    assert sorted(os.listdir(tmp_path / "videos")) == ["step_128.mp4", "step_96.mp4"]


def test_a_validation_from_the_command_line_records_beside_the_checkpoint(tmp_path, capsys):
    quiet = "--trainer.accelerator cpu --trainer.enable_progress_bar false"
    own = "--model.env test_video.Drawn --model.num_envs 2 --model.num_steps 16 --model.total_steps 64"
    main(f"fit {own} --seed_everything 3 {quiet}".split())
    run = tmp_path / "lightning_logs/version_0"
    assert not (run / "videos").exists()
    main(
        f"validate {own} {quiet} --ckpt_path {run}/checkpoints/last.ckpt "
        "--trainer.callbacks+=ppo_lightning.callbacks.EvaluationVideo --trainer.callbacks.episodes=2".split()
    )
    assert os.listdir(run / "videos") == ["step_64.mp4"]


def headless(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL", "SDL_VIDEODRIVER"):
        monkeypatch.setenv(name, "")  # so that it is taken back, too
        monkeypatch.delenv(name)


@pytest.mark.skipif(not (find_library("EGL") or find_library("OSMesa")), reason="no library here draws off screen")
def test_mujoco_draws_without_a_display_though_it_was_imported_before(tmp_path, monkeypatch):
    headless(monkeypatch)
    model = PPO("InvertedPendulum-v5", {"width": 64, "height": 48})
    assert "mujoco" in sys.modules
    file = record(model, tmp_path)
    assert os.environ["MUJOCO_GL"] in ("egl", "osmesa")
    assert 2 < len(brightness(file)[1]) < 100


@pytest.mark.parametrize("env", ["CartPole-v1", "LunarLander-v3"])
def test_pygame_draws_without_a_display(tmp_path, monkeypatch, env):
    headless(monkeypatch)
    monkeypatch.setattr(video, "MAX_FRAMES", 5)
    assert len(brightness(record(PPO(env), tmp_path))[1]) == 6


@pytest.mark.parametrize(
    ("libraries", "known", "chosen"),
    [
        ({"EGL", "OSMesa"}, {}, "egl"),
        ({"OSMesa"}, {}, "osmesa"),
        (set(), {}, "egl"),  # which says what is missing
        ({"EGL"}, {"MUJOCO_GL": "osmesa"}, "osmesa"),
        ({"EGL"}, {"DISPLAY": ":0"}, None),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems draw without")
def test_how_mujoco_draws_is_chosen_by_what_is_there(monkeypatch, libraries, known, chosen):
    headless(monkeypatch)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    video.choose_renderer()
    assert os.environ.get("MUJOCO_GL") == chosen


class Blind(Drawn):
    def render(self):
        raise ZeroDivisionError("no light")


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no render mode", "Uneven renders no images: it must take render_mode=rgb_array"),
        ("cannot draw", "EnvironmentFault: environment 0 raised ZeroDivisionError in reset: no light"),
        ("no library", r'a video needs moviepy: pip install "ppo-lightning\[video\]"'),
        ("no encoder", "FileNotFoundError: .*no_such_program"),
        ("disk full", r"OSError: \[Errno 28\] No space left on device"),
        ("not a folder", "FileExistsError"),
    ],
)
def test_what_fails_costs_one_warning_and_no_training(fit, tmp_path, monkeypatch, fault, reason):
    folder = tmp_path / "videos"
    match fault:
        case "no library":
            monkeypatch.setitem(sys.modules, "moviepy", None)
        case "no encoder":
            monkeypatch.setattr("moviepy.video.io.ffmpeg_writer.FFMPEG_BINARY", str(tmp_path / "no_such_program"))
        case "disk full":
            monkeypatch.setattr(Path, "replace", full)
        case "not a folder":
            folder.touch()
    env = {"no render mode": Uneven, "cannot draw": Blind}.get(fault, Drawn)
    model = drawn(env=env)
    with pytest.warns(UserWarning, match=f"no video of step 32: {reason}.*training continues without videos") as caught:
        fit(model, callbacks=[EvaluationVideo()], limit_val_batches=1.0)
    assert len([warning for warning in caught if "video" in str(warning.message)]) == 1
    assert model.num_env_steps == 128
    assert folder.is_file() or not folder.exists() or list(folder.iterdir()) == []


def test_asked_for_by_itself_it_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="Recall renders no images"):
        record(PPO(Recall), tmp_path)
    with pytest.raises(EnvironmentFault, match="no light"):
        record(drawn(env=Blind), tmp_path)
    with pytest.raises(InputError, match="given as a VectorEnv, which cannot be created again"):
        record(PPO(SyncVectorEnv([Drawn])), tmp_path)
    with pytest.raises(InputError, match="creates a VectorEnv, and videos need single environments"):
        record(PPO(lambda num_envs: SyncVectorEnv([Drawn] * num_envs)), tmp_path)


@pytest.mark.parametrize("setting", [{"every": 0}, {"episodes": 0}, {"fps": 0}])
def test_numbers_that_make_no_sense_are_refused(setting):
    (name,) = setting
    with pytest.raises(InputError, match=f"EvaluationVideo: {name} must be 1 or more, got 0"):
        EvaluationVideo(**setting)


def test_wrappers_of_the_run_are_around_what_is_recorded_and_a_vectorised_env_is_recorded_alone(tmp_path):
    model = PPO("CartPole-v1", vectorization="vector_entry_point", num_envs=1)
    assert len(brightness(record(model, tmp_path))[1]) > 8
    short = partial(gym.wrappers.TimeLimit, max_episode_steps=7)
    assert len(brightness(record(PPO("CartPole-v1", wrappers=[short], vectorization="async"), tmp_path))[1]) == 8


def test_tensorboard_shows_it_as_an_animation(fit, tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, "", "run")
    fit(drawn(eval_interval=4), logger=logger, callbacks=[EvaluationVideo()], limit_val_batches=1.0)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    (shown,) = events.Images("eval/video")
    picture = Image.open(io.BytesIO(shown.encoded_image_string))
    assert (shown.step, picture.format, picture.size) == (128, "GIF", (48, 32))
    assert getattr(picture, "n_frames") > 2  # noqa: B009 - of animations only
    assert (tmp_path / "run/videos/step_128.mp4").exists()


def test_weights_and_biases_shows_it(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(
        drawn(eval_interval=4),
        logger=[CSVLogger(tmp_path), logger],
        callbacks=[EvaluationVideo()],
        limit_val_batches=1.0,
    )
    logger.experiment.finish()
    assert len(list(tmp_path.rglob("wandb/**/media/videos/eval/video_*.mp4"))) == 1


@pytest.mark.long
def test_mlflow_keeps_it(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    fit(drawn(eval_interval=4), logger=logger, callbacks=[EvaluationVideo()], limit_val_batches=1.0)
    assert len(list(tmp_path.rglob("artifacts/videos/step_128.mp4"))) == 1


def test_comet_is_given_it():
    given = []

    class Offline(CometLogger):
        """Has an experiment that calls no server."""

        experiment = SimpleNamespace(log_video=lambda file, **kwargs: given.append((file, kwargs)))

        def __init__(self):
            pass

    video.log_video(Offline(), Path("step_3.mp4"), 3)
    assert given == [("step_3.mp4", {"name": "eval/video", "step": 3})]


class Slow(Drawn):
    def render(self):
        time.sleep(2.0)
        return super().render()


@pytest.mark.long
def test_the_other_processes_wait_for_a_video_beyond_their_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "KEEPALIVE_S", 1.0)

    def run(rank):
        strategy = DDPStrategy(timeout=timedelta(seconds=4))
        model = drawn(env=Slow, total_steps=192, eval_interval=2)
        fit_process(model, callbacks=[EvaluationVideo()], strategy=strategy, devices=2, limit_val_batches=1.0)
        return model.num_env_steps

    assert forked(run) == [192, 192]
    assert sorted(os.listdir(tmp_path / "videos")) == ["step_128.mp4", "step_192.mp4"]


def test_an_interrupted_run_records_nothing_more(fit, tmp_path):
    class Interrupts(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.num_env_steps == 64:
                os.kill(os.getpid(), signal.SIGINT)

    model = drawn()
    fit(model, callbacks=[EvaluationVideo(), Interrupts()])  # beside evaluations that are not training's own
    assert model.num_env_steps == 96
    assert sorted(os.listdir(tmp_path / "videos")) == ["step_32.mp4", "step_64.mp4"]


def test_a_video_is_of_the_level_that_is_evaluated(tmp_path):
    model = drawn(env=Levelled)
    model.env_provider.set_eval_overrides(EnvOverrides({"shade": 3}, {"length": 5}))
    assert brightness(record(model, tmp_path))[1] == [3] * 6
    assert model.evaluate(1)["eval/mean_ep_length"] == 5


@pytest.mark.long
def test_of_two_processes_the_first_evaluates_and_records_and_both_know_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(async_evaluation, "EvalProcess", Here)

    def run(rank, callbacks=None):
        torch.manual_seed(0)
        model = drawn(total_steps=256)
        beside = [AsyncEvaluation(every=2), EvaluationVideo(every=2)] if callbacks is None else callbacks
        settings = {"strategy": "ddp", "devices": 2, "default_root_dir": tmp_path, "enable_checkpointing": True}
        trainer = fit_process(model, callbacks=beside, **settings)
        scores = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
        best = [one.best_model_path for one in trainer.checkpoint_callbacks]
        return model.policy.state_dict(), scores, best

    first, second = forked(run)
    assert first[1] == second[1]
    assert first[1]["eval/mean_reward"] > 0
    assert first[2] == second[2]
    assert sorted(os.listdir(tmp_path / "videos")) == ["step_128.mp4", "step_256.mp4"]
    best = PPO.load_from_checkpoint(first[2][0], env=Drawn)
    assert best.num_env_steps in (128, 256)
    without = forked(partial(run, callbacks=[]))
    assert_close(without[0][0], first[0], rtol=0, atol=0)


def test_a_video_is_recorded_without_dropout_and_of_the_averaged_weights(fit, tmp_path, monkeypatch):
    seen = []
    original = video.run_episodes

    def watched(module, environments, **how):
        act = type(module.policy).act

        def watch(policy, *given, **more):
            seen.append((policy.training, next(policy.parameters()).detach().clone()))
            return act(policy, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(type(module.policy), "act", watch)
            return original(module, environments, **how)

    evaluated = []

    class Hears(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            evaluated.append(next(pl_module.policy.parameters()).detach().clone())

    monkeypatch.setattr(video, "run_episodes", watched)
    model = PPO(
        "CartPole-v1", num_envs=2, num_steps=16, total_steps=64, num_minibatches=2, eval_interval=1, num_eval_episodes=1
    )
    average = EMAWeightAveraging(update_every_n_steps=1, decay=0.5)
    fit(model, callbacks=[average, video.EvaluationVideo(), Hears()], limit_val_batches=1)
    assert not any(training for training, _ in seen)
    assert torch.equal(seen[-1][1], evaluated[-1])
    assert not torch.equal(seen[0][1], seen[-1][1])
