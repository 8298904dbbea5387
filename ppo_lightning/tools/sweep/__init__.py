"""Search for hyperparameters: ``python -m ppo_lightning sweep``, and :func:`sweep` from Python."""

from ppo_lightning.tools.sweep.objective import SweepOptions as SweepOptions
from ppo_lightning.tools.sweep.search import SweepResult as SweepResult
from ppo_lightning.tools.sweep.search import main as main
from ppo_lightning.tools.sweep.search import sweep as sweep
