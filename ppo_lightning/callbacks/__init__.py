"""What watches a run from outside."""

from ppo_lightning.callbacks.checkpoints import BestCheckpoint as BestCheckpoint
from ppo_lightning.callbacks.checkpoints import LastCheckpoint as LastCheckpoint
from ppo_lightning.callbacks.cleanup import CloseEnvironments as CloseEnvironments
from ppo_lightning.callbacks.details import RolloutDetails as RolloutDetails
from ppo_lightning.callbacks.events import PPOCallback as PPOCallback
from ppo_lightning.callbacks.interrupts import Interrupts as Interrupts
from ppo_lightning.callbacks.processes import WatchProcesses as WatchProcesses
from ppo_lightning.callbacks.progress import StepProgressBar as StepProgressBar
