"""Callbacks of every run, and optional ones. The callbacks of ``tools`` are public here too, and imported on first use."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning import Callback

from ppo_lightning.callbacks.async_evaluation import AsyncEvaluation as AsyncEvaluation
from ppo_lightning.callbacks.checkpoints import BestCheckpoint as BestCheckpoint
from ppo_lightning.callbacks.checkpoints import LastCheckpoint as LastCheckpoint
from ppo_lightning.callbacks.curriculum import Curriculum as Curriculum
from ppo_lightning.callbacks.curriculum import Level as Level
from ppo_lightning.callbacks.events import EvaluationCallback as EvaluationCallback
from ppo_lightning.callbacks.events import PPOCallback as PPOCallback
from ppo_lightning.callbacks.processes import RankFailureReporter as RankFailureReporter
from ppo_lightning.callbacks.progress import StepProgressBar as StepProgressBar
from ppo_lightning.callbacks.shutdown import CloseEnvironments as CloseEnvironments
from ppo_lightning.callbacks.shutdown import FinalEvaluation as FinalEvaluation
from ppo_lightning.callbacks.shutdown import GracefulShutdown as GracefulShutdown
from ppo_lightning.callbacks.stages import AdaptiveLearningRate as AdaptiveLearningRate
from ppo_lightning.callbacks.stages import Stage as Stage
from ppo_lightning.callbacks.stages import Stages as Stages
from ppo_lightning.callbacks.summary import ParameterSummary as ParameterSummary
from ppo_lightning.callbacks.summary import RunSummary as RunSummary

if TYPE_CHECKING:
    from ppo_lightning.tools.dashboard import Dashboard as Dashboard
    from ppo_lightning.tools.diagnosis import Thresholds as Thresholds
    from ppo_lightning.tools.hardware import HardwareMonitor as HardwareMonitor
    from ppo_lightning.tools.health import HealthMonitor as HealthMonitor
    from ppo_lightning.tools.notebook import NotebookDisplay as NotebookDisplay
    from ppo_lightning.tools.report import RunReport as RunReport
    from ppo_lightning.tools.rollout_details import RolloutDetails as RolloutDetails
    from ppo_lightning.tools.video import EvaluationVideo as EvaluationVideo
    from ppo_lightning.tools.video import record as record

TOOLS = {
    "Dashboard": "dashboard",
    "EvaluationVideo": "video",
    "HardwareMonitor": "hardware",
    "HealthMonitor": "health",
    "NotebookDisplay": "notebook",
    "RolloutDetails": "rollout_details",
    "RunReport": "report",
    "Thresholds": "diagnosis",
    "record": "video",
}
"""Public names that modules of ``ppo_lightning.tools`` define. The package works without that folder."""


def has_tools() -> bool:
    """Whether the folder ``ppo_lightning/tools`` exists."""
    spec = find_spec("ppo_lightning.tools")
    return spec is not None and spec.origin is not None


def load_tools() -> None:
    """Import the callbacks of ``tools``: jsonargparse resolves short class names among imported classes only."""
    for name in TOOLS if has_tools() else ():
        __getattr__(name)


def default_tools() -> list[Callback]:
    """The callbacks of ``tools`` that every run gets."""
    return [__getattr__(name)() for name in ("HealthMonitor", "RunReport")] if has_tools() else []


def __getattr__(name: str) -> Any:
    """Import a public name of ``tools`` on first use."""
    if name not in TOOLS or not has_tools():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"ppo_lightning.tools.{TOOLS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *TOOLS})
