"""What watches a run from outside."""

from ppo_lightning.callbacks.adaptive_lr import AdaptiveLearningRate as AdaptiveLearningRate
from ppo_lightning.callbacks.checkpoints import BestCheckpoint as BestCheckpoint
from ppo_lightning.callbacks.checkpoints import LastCheckpoint as LastCheckpoint
from ppo_lightning.callbacks.cleanup import CloseEnvironments as CloseEnvironments
from ppo_lightning.callbacks.curriculum import Curriculum as Curriculum
from ppo_lightning.callbacks.curriculum import Level as Level
from ppo_lightning.callbacks.dashboard import Dashboard as Dashboard
from ppo_lightning.callbacks.details import RolloutDetails as RolloutDetails
from ppo_lightning.callbacks.events import PPOCallback as PPOCallback
from ppo_lightning.callbacks.hardware import HardwareMonitor as HardwareMonitor
from ppo_lightning.callbacks.interrupts import Interrupts as Interrupts
from ppo_lightning.callbacks.notebook import NotebookDisplay as NotebookDisplay
from ppo_lightning.callbacks.processes import WatchProcesses as WatchProcesses
from ppo_lightning.callbacks.progress import StepProgressBar as StepProgressBar
from ppo_lightning.callbacks.stages import Stage as Stage
from ppo_lightning.callbacks.stages import Stages as Stages
