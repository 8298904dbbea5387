"""Videos of evaluation episodes."""

import ctypes.util
import importlib.util
import inspect
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
from gymnasium.wrappers import RecordVideo
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ppo_lightning.callbacks.processes import long_rank_zero_task
from ppo_lightning.callbacks.shutdown import GracefulShutdown
from ppo_lightning.envs import EnvFactory, VectorEnvAdapter
from ppo_lightning.envs.streams import temporarily_seeded
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.evaluation.episodes import evaluate_episodes
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import ONE_OR_MORE, checked
from ppo_lightning.policy import in_eval_mode
from ppo_lightning.runs.trainer import is_last_iteration
from ppo_lightning.spaces import without_mask

MAX_FRAMES = 1000
"""Longest video (frames), since all frames are in memory: 0.7 GB of MuJoCo's."""

TAG = "eval/video"
"""Name of the video in loggers."""

GIF_FPS, GIF_WIDTH = 10, 240
"""Frames per second and width (pixels) of the GIF for TensorBoard, which shows no videos and stores all in one file."""


def record(
    model: Any,
    folder: str | Path = "videos",
    episodes: int = 1,
    deterministic: bool | None = None,
    fps: int | None = None,
) -> Path:
    """Record the first episodes that ``model.evaluate()`` would run now, one after another.

    They run in a separate environment with the same arguments and wrappers, and do not change the random state of
    training. Without a display, MuJoCo renders by EGL, or by OSMesa if there is no EGL, unless ``MUJOCO_GL`` is set.

    Args:
        model: a :class:`PPO`, trained or loaded.
        folder: of the file; created if it is missing.
        episodes: number of episodes; the video has at most :data:`MAX_FRAMES` frames.
        deterministic: take the most probable actions; None is the model's ``eval_deterministic``.
        fps: frames per second; None takes the environment's metadata, else 30.

    Returns:
        The file, ``step_<environment steps>.mp4``.

    Raises:
        InputError: moviepy is not installed, or the environment renders no images.
        EnvironmentFault: the environment raised, as MuJoCo does if it cannot render.
        OSError: the file cannot be written.
    """
    module = cast(PPOModule, model)
    file = Path(folder).resolve() / f"step_{module.num_env_steps}.mp4"
    record_to(file, model, episodes=episodes, deterministic=deterministic, fps=fps)
    return file


def record_to(
    file: Path, model: Any, *, episodes: int = 1, deterministic: bool | None = None, fps: int | None = None
) -> Tensor:
    """As :func:`record`, to this file.

    Returns:
        [episodes, 5], as of :func:`~ppo_lightning.evaluation.episodes.evaluate_episodes`.
    """
    if importlib.util.find_spec("moviepy") is None:
        raise InputError('a video needs moviepy: pip install "ppo-lightning[video]"')
    module = cast(PPOModule, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    choose_renderer()
    with temporarily_seeded(module.seed or 0), tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as unfinished:
        with _recorded_environment(module, f"{unfinished}/frames", fps) as environments:
            found = run_episodes(module, environments, episodes=episodes, deterministic=deterministic)
        (made,) = Path(unfinished, "frames").glob("*.mp4")
        made.replace(file)
    return found


def run_episodes(
    module: PPOModule,
    environments: VectorEnvAdapter,
    *,
    episodes: int = 1,
    deterministic: bool | None = None,
    skip: int = 0,
) -> Tensor:
    """The first episodes that ``model.evaluate()`` would run now, or with ``skip`` others; [episodes, 5]."""
    with in_eval_mode(module.policy), module.autocast():
        return evaluate_episodes(
            module.policy,
            environments,
            without_mask(module.observation_space),
            num_episodes=episodes,
            seed=module.evaluation_seed() + skip,
            max_steps=module.steps_per_eval_episode,
            deterministic=module.eval_deterministic if deterministic is None else deterministic,
        )


def rendering_environment(
    module: PPOModule, mode: str, wrap: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]
) -> VectorEnvAdapter:
    """One evaluation environment that renders.

    Args:
        module: whose environment it is.
        mode: of rendering, rgb_array or human.
        wrap: around it.

    Raises:
        InputError: the environment does not render so.
        EnvironmentFault: it raised, as MuJoCo does if it cannot render.
    """

    def wrapped(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        if env.render_mode != mode:
            env.close()
            what = "no images" if mode == "rgb_array" else "in no window"
            raise InputError(f"{module.env_factory.name} renders {what}: it must take render_mode={mode}, and apply it")
        return wrap(env)

    try:
        overrides = module.env_provider.eval_overrides
        factory = overrides.apply_to(_rendering_factory(module.env_factory, mode, wrapped))
        return VectorEnvAdapter(factory, 1, module.env_timeout_s, attributes=overrides.attributes)
    except EnvironmentFault as fault:
        raise fault.__cause__ if isinstance(fault.__cause__, InputError) else fault from None


@contextmanager
def _recorded_environment(module: PPOModule, folder: str, fps: int | None) -> Iterator[VectorEnvAdapter]:
    """One evaluation environment; its video is in the folder afterwards, unless there was an error."""
    recorders: list[RecordVideo] = []

    def recorded(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        # One recording of all episodes, since only the length of a recording can be limited.
        recorders.append(RecordVideo(env, folder, lambda episode: episode == 0, video_length=MAX_FRAMES, fps=fps))
        return recorders[0]

    environments = rendering_environment(module, "rgb_array", recorded)
    try:
        yield environments
        if recorders[0].recording:
            del recorders[0].recorded_frames[-1]  # the reset after the last episode
    except BaseException:  # skip encoding half a video
        for recorder in recorders:
            recorder.recording = False
        raise
    finally:
        try:
            environments.close()  # encodes the video
        finally:
            for recorder in recorders:
                recorder.recorded_frames = []


def _rendering_factory(maker: EnvFactory, mode: str, wrap: Callable[[Any], Any]) -> EnvFactory:
    """A factory of one environment that renders, with the wrappers of evaluation and one more."""
    again = maker.for_evaluation()
    if again is None:
        raise InputError(f"{maker.name} was given as a VectorEnv, which cannot be created again: give a callable")
    draws = {**again.env_kwargs, "render_mode": mode}
    if not isinstance(again.env, str):
        _, _, vector = again.infer_spaces(1)
        if vector is not None:
            vector.close()
            raise InputError(f"{again.name} creates a VectorEnv, and videos need single environments")
        parameters = inspect.signature(cast(Any, again.env)).parameters
        if "render_mode" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            draws = again.env_kwargs  # it may render without the argument
    return replace(again, env_kwargs=draws, wrappers=(*again.wrappers, wrap), vectorization="sync", restarts=False)


def choose_renderer() -> None:
    """Without a display, let MuJoCo render by EGL, else by OSMesa, and pygame by its dummy driver."""
    if sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame searches for a display and warns
    if "MUJOCO_GL" in os.environ:
        return
    egl_is_missing = ctypes.util.find_library("EGL") is None and ctypes.util.find_library("OSMesa") is not None
    os.environ["MUJOCO_GL"] = "osmesa" if egl_is_missing else "egl"


class EvaluationVideo(Callback):
    """Records evaluations: ``videos/step_<environment steps>.mp4`` in the run's folder, and in loggers that show videos.

    It runs after every ``every`` evaluations and after the last one, in a separate environment, and records the episodes of
    the evaluation's first environment. Training is bit-identical with and without it. If training does not evaluate itself
    (:class:`AsyncEvaluation`, ``limit_val_batches: 0``), ``eval_interval`` counts. A failure is a warning, and the run
    continues without further videos. The first rank records.

    Args:
        every: evaluations between videos; a validation is always recorded.
        episodes: per video, which has at most :data:`MAX_FRAMES` frames.
        folder: of the files; None is ``videos`` in the run's folder.
        fps: frames per second; None takes the environment's metadata.

    Raises:
        InputError: a number is not positive.
    """

    @checked("EvaluationVideo: {}", every=ONE_OR_MORE, episodes=ONE_OR_MORE, fps=ONE_OR_MORE)
    def __init__(
        self, every: int = 1, episodes: int = 1, folder: str | Path | None = None, fps: int | None = None
    ) -> None:
        self.every, self.episodes, self.folder, self.fps = every, episodes, folder, fps
        self._evaluations = 0
        self._gave_up = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluations, self._gave_up = 0, False

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record right after the evaluation, while weights are those that it had (:class:`WeightAveraging`)."""
        if not trainer.sanity_checking:
            self._on_evaluation(trainer, cast(PPOModule, pl_module))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        due = is_last_iteration(trainer) or module.policy_version % module.iterations_between_evaluations == 0
        if due and trainer.limit_val_batches == 0 and module.agreed_stop_signal not in GracefulShutdown.SIGNALS:
            self._on_evaluation(trainer, module)

    def _on_evaluation(self, trainer: Trainer, module: PPOModule) -> None:
        self._evaluations += 1
        if trainer.state.fn == TrainerFn.FITTING and self._evaluations % self.every and not is_last_iteration(trainer):
            return
        folder = _run_folder(trainer) / "videos" if self.folder is None else self.folder
        with long_rank_zero_task(trainer):
            if trainer.is_global_zero and not self._gave_up:
                self._record(trainer, module, folder)

    def _record(self, trainer: Trainer, module: PPOModule, folder: str | Path) -> None:
        started = time.perf_counter()
        try:
            video = record(module, folder, self.episodes, fps=self.fps)
            for logger in trainer.loggers:
                log_video(logger, video, module.num_env_steps)
        except Exception as error:  # of a driver, encoder, environment, disk or network: no reason to fail the run
            self._gave_up = True
            drawn = f"; MuJoCo renders by MUJOCO_GL={os.environ.get('MUJOCO_GL')}" if "mujoco" in sys.modules else ""
            rank_zero_warn(
                f"no video of step {module.num_env_steps:,}: {_first_line(error)}{drawn}; training continues without videos "
                "(see docs/evaluation.md)"
            )
        module.exclude_from_fps(time.perf_counter() - started)


def _first_line(error: Exception) -> str:
    """The first line of an error, with its type unless it is ours; encoders write pages."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _run_folder(trainer: Trainer) -> Path:
    """The loggers' folder; without loggers the validated checkpoint's; else the Trainer's default."""
    folder = trainer.log_dir  # a broadcast, in which all ranks take part
    checkpoints = Path(str(trainer.ckpt_path)).resolve().parent
    if not trainer.loggers and trainer.ckpt_path and checkpoints.name == "checkpoints" and checkpoints.is_dir():
        return checkpoints.parent
    return Path(folder or trainer.default_root_dir)


@singledispatch
def log_video(logger: Logger, video: Path, step: int) -> None:
    """Send a video to a logger, if it supports videos.

    Args:
        logger: of the run.
        video: an mp4 file.
        step: environment steps.
    """


@log_video.register
def _(logger: TensorBoardLogger, video: Path, step: int) -> None:
    # torch's add_video imports a module that moviepy 2 has removed; this is what it would write.
    from tensorboard.compat.proto import summary_pb2

    data, width, height = to_gif(video)
    Summary = cast(Any, summary_pb2).Summary  # noqa: N806 - a class, created at import
    image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=3)
    writer = cast(Any, logger.experiment)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=TAG, image=image)]), step)


@log_video.register
def _(logger: WandbLogger, video: Path, step: int) -> None:
    logger.log_video(TAG, [str(video)], step=step, format=["mp4"])


@log_video.register
def _(logger: MLFlowLogger, video: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(video), "videos")


@log_video.register
def _(logger: CometLogger, video: Path, step: int) -> None:
    cast(Any, logger.experiment).log_video(str(video), name=TAG, step=step)


@contextmanager
def open_video(video: Path) -> Iterator[Any]:
    """A video as moviepy's clip, with all its pipes closed at the end."""
    from moviepy import VideoFileClip

    with VideoFileClip(str(video), audio=False) as clip:
        process = cast(Any, clip).reader.proc
        try:
            yield clip
        finally:  # moviepy leaves them open
            process.stdout.close()
            process.stderr.close()


def to_gif(video: Path) -> tuple[bytes, int, int]:
    """A video as a small GIF: its bytes, width and height (pixels)."""
    from PIL import Image

    with open_video(video) as clip:
        width = min(GIF_WIDTH, clip.w)
        size = width, round(clip.h * width / clip.w)
        frames = [Image.fromarray(frame).resize(size) for frame in clip.iter_frames(fps=GIF_FPS)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=1000 // GIF_FPS, loop=0)
    return buffer.getvalue(), *size
