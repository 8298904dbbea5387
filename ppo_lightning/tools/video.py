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
from typing_extensions import override

from ppo_lightning.callbacks.interrupts import Interrupts
from ppo_lightning.callbacks.processes import others_wait
from ppo_lightning.envs import EnvFactory, Environments
from ppo_lightning.envs.streams import streams_of_their_own
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.evaluation.episodes import evaluate_episodes
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import ONE_OR_MORE, checked
from ppo_lightning.spaces import without_mask

MAX_FRAMES = 1000
"""Where a video ends, though episodes go on: all its frames are in memory, 0.7 GB of MuJoCo's."""

TAG = "eval/video"
"""Under which loggers show it."""

GIF_FPS, GIF_WIDTH = 10, 240
"""Frames per second and pixels of the animation that TensorBoard shows: it knows no video, and keeps all in one file."""


def record(
    model: Any,
    folder: str | Path = "videos",
    episodes: int = 1,
    deterministic: bool | None = None,
    fps: int | None = None,
) -> Path:
    """Record the first episodes of the evaluation that ``model.evaluate()`` makes now, one after another.

    The environment is one of its own, with the same arguments and wrappers. No random numbers of training move. Without a
    display, MuJoCo draws by EGL, or by OSMesa where there is no EGL, unless ``MUJOCO_GL`` says otherwise.

    Args:
        model: a :class:`PPO`, trained or loaded.
        folder: where the file is written, made where it is missing.
        episodes: how many; the video ends after :data:`MAX_FRAMES` frames in any case.
        deterministic: take the most probable actions; None is the model's ``eval_deterministic``.
        fps: frames per second; None is what the environment says in its metadata, else 30.

    Returns:
        The file, ``step_<environment steps>.mp4``.

    Raises:
        InputError: moviepy is not installed, or the environment has no pictures.
        EnvironmentFault: the environment raised, as MuJoCo does where it cannot draw.
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("moviepy") is None:
        raise InputError('a video needs moviepy: pip install "ppo-lightning[video]"')
    module = cast(PPOModule, model)
    file = Path(folder).resolve() / f"step_{module.num_env_steps}.mp4"
    file.parent.mkdir(parents=True, exist_ok=True)
    choose_renderer()
    seed = module.evaluation_seed()
    with streams_of_their_own(module.seed or 0), tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as unfinished:
        recorders: list[RecordVideo] = []

        def recorded(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
            if env.render_mode != "rgb_array":
                env.close()
                raise InputError(
                    f"{module.env_factory.name} has no pictures: it must take render_mode=rgb_array, and be made with it"
                )
            # One recording of all episodes, since its length can be limited.
            place, first = f"{unfinished}/frames", lambda episode: episode == 0
            recorders.append(RecordVideo(env, place, first, video_length=MAX_FRAMES, fps=fps))
            return recorders[0]

        try:
            setting = module.env_provider.eval_overrides
            maker = setting.apply_to(_drawing(module.env_factory, recorded))
            environments = Environments(maker, 1, module.env_timeout_s, attributes=setting.attributes)
        except EnvironmentFault as fault:
            raise fault.__cause__ if isinstance(fault.__cause__, InputError) else fault from None
        try:
            with module.autocast():
                evaluate_episodes(
                    module.policy,
                    environments,
                    without_mask(module.observation_space),
                    num_episodes=episodes,
                    seed=seed,
                    max_steps=module.steps_per_eval_episode,
                    deterministic=module.eval_deterministic if deterministic is None else deterministic,
                )
            if recorders[0].recording:
                del recorders[0].recorded_frames[-1]  # of the reset after the last episode
        except BaseException:  # whatever it is, and it goes on from here: half a video is not worth encoding
            for recorder in recorders:
                recorder.recording = False
            raise
        finally:
            try:
                environments.close()  # which encodes
            finally:
                for recorder in recorders:
                    recorder.recorded_frames = []
        (made,) = Path(unfinished, "frames").glob("*.mp4")
        made.replace(file)
    return file


def _drawing(maker: EnvFactory, recorded: Callable[[Any], Any]) -> EnvFactory:
    """A recipe for one environment that draws and is recorded, wrapped as those that are evaluated."""
    again = maker.again()
    if again is None:
        raise InputError(f"{maker.name} was given as a VectorEnv, of which no other can be made: give a callable")
    draws = {**again.env_kwargs, "render_mode": "rgb_array"}
    if not isinstance(again.env, str):
        _, _, vector = again.probe(1)
        if vector is not None:
            vector.close()
            raise InputError(f"{again.name} makes a VectorEnv, and videos are of single environments")
        parameters = inspect.signature(cast(Any, again.env)).parameters
        if "render_mode" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            draws = again.env_kwargs  # it may draw all the same
    return replace(again, env_kwargs=draws, wrappers=(*again.wrappers, recorded), vectorization="sync", restarts=False)


def choose_renderer() -> None:
    """Where there is no display, let MuJoCo and pygame draw without: by EGL, with a graphics card or not, else by OSMesa."""
    if sys.platform != "linux" or os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}:
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a display, and complain
    if "MUJOCO_GL" in os.environ:
        return
    egl_is_missing = ctypes.util.find_library("EGL") is None and ctypes.util.find_library("OSMesa") is not None
    os.environ["MUJOCO_GL"] = "osmesa" if egl_is_missing else "egl"


class EvaluationVideo(Callback):
    """Records evaluations: ``videos/step_<environment steps>.mp4`` in the run's folder, and in loggers that show videos.

    After every so many evaluations, and the last, episodes are recorded in an environment of its own: those that the first
    environment of that evaluation has run. Training is the same, to the bit, with and without. Where evaluations are not
    training's own (:class:`AsyncEvaluation`, ``limit_val_batches: 0``), ``eval_interval`` counts. What fails costs a
    warning, and the run goes on without further videos. Of several processes the first records.

    Args:
        every: evaluations between videos; a validation is always recorded.
        episodes: of a video, which ends after :data:`MAX_FRAMES` frames in any case.
        folder: where files are written; None is ``videos`` in the run's folder.
        fps: frames per second; None is what the environment says.

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
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluated(trainer, cast(PPOModule, pl_module))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        due = _ends(trainer) or module.policy_version % module.iterations_between_evaluations == 0
        if due and trainer.limit_val_batches == 0 and module.agreed_stop_signal not in Interrupts.SIGNALS:
            self._evaluated(trainer, module)

    def _evaluated(self, trainer: Trainer, module: PPOModule) -> None:
        self._evaluations += 1
        if trainer.state.fn == TrainerFn.FITTING and self._evaluations % self.every and not _ends(trainer):
            return
        folder = _run_folder(trainer) / "videos" if self.folder is None else self.folder
        with others_wait(trainer):
            if trainer.is_global_zero and not self._gave_up:
                self._record(trainer, module, folder)

    def _record(self, trainer: Trainer, module: PPOModule, folder: str | Path) -> None:
        started = time.perf_counter()
        try:
            video = record(module, folder, self.episodes, fps=self.fps)
            for logger in trainer.loggers:
                show(logger, video, module.num_env_steps)
        except Exception as error:  # of drivers, encoders, environments, disks and networks: a video is worth no run
            self._gave_up = True
            drawn = f"; MuJoCo draws by MUJOCO_GL={os.environ.get('MUJOCO_GL')}" if "mujoco" in sys.modules else ""
            rank_zero_warn(
                f"no video of step {module.num_env_steps:,}: {_told(error)}{drawn}; the run goes on without videos "
                "(docs/evaluation.md says what they need)"
            )
        module.exclude_from_fps(time.perf_counter() - started)


def _ends(trainer: Trainer) -> bool:
    return trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs


def _told(error: Exception) -> str:
    """The first line of an error, with its type where that is not ours; encoders write pages."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _run_folder(trainer: Trainer) -> Path:
    """Of the loggers; without them of the checkpoint that is validated; else the folder for everything."""
    folder = trainer.log_dir  # all processes ask: the answer is broadcast
    checkpoints = Path(str(trainer.ckpt_path)).resolve().parent
    if not trainer.loggers and trainer.ckpt_path and checkpoints.name == "checkpoints" and checkpoints.is_dir():
        return checkpoints.parent
    return Path(folder or trainer.default_root_dir)


@singledispatch
def show(logger: Logger, video: Path, step: int) -> None:
    """Send a video to a logger; one that has no place for videos leaves it.

    Args:
        logger: of the run.
        video: an mp4 file.
        step: environment steps.
    """


@show.register
def _(logger: TensorBoardLogger, video: Path, step: int) -> None:
    # torch's add_video asks for a module that moviepy 2 has no more; what it would write is this.
    from tensorboard.compat.proto import summary_pb2

    data, width, height = animation(video)
    Summary = cast(Any, summary_pb2).Summary  # noqa: N806 - it is a class, made when its module is imported
    image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=3)
    writer = cast(Any, logger.experiment)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=TAG, image=image)]), step)


@show.register
def _(logger: WandbLogger, video: Path, step: int) -> None:
    logger.log_video(TAG, [str(video)], step=step, format=["mp4"])


@show.register
def _(logger: MLFlowLogger, video: Path, step: int) -> None:
    logger.experiment.log_artifact(logger.run_id, str(video), "videos")


@show.register
def _(logger: CometLogger, video: Path, step: int) -> None:
    cast(Any, logger.experiment).log_video(str(video), name=TAG, step=step)


@contextmanager
def opened(video: Path) -> Iterator[Any]:
    """A video as moviepy's clip, with nothing of it left open."""
    from moviepy import VideoFileClip

    with VideoFileClip(str(video), audio=False) as clip:
        process = cast(Any, clip).reader.proc
        try:
            yield clip
        finally:  # moviepy leaves the pipes of a process that has ended
            process.stdout.close()
            process.stderr.close()


def animation(video: Path) -> tuple[bytes, int, int]:
    """A video as a small GIF: its bytes, width and height (pixels)."""
    from PIL import Image

    with opened(video) as clip:
        width = min(GIF_WIDTH, clip.w)
        size = width, round(clip.h * width / clip.w)
        frames = [Image.fromarray(frame).resize(size) for frame in clip.iter_frames(fps=GIF_FPS)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=1000 // GIF_FPS, loop=0)
    return buffer.getvalue(), *size
