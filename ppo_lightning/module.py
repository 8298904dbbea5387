"""What callbacks and rollouts use of a PPO module, as a type."""

import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from gymnasium import Space

if TYPE_CHECKING:
    from ppo_lightning.envs import EnvFactory, EnvProvider
    from ppo_lightning.policy import Policy
    from ppo_lightning.rollout.dataset import RolloutDataset
    from ppo_lightning.runs.clock import Clock
    from ppo_lightning.runs.history import Records
    from ppo_lightning.runs.ranks import Ranks
    from ppo_lightning.runs.schedules import Schedules
    from ppo_lightning.runs.state import RunState


class PPOModule(Protocol):
    """A :class:`~ppo_lightning.PPO`, whose attributes are described there."""

    policy: "Policy"
    env_factory: "EnvFactory"
    env_provider: "EnvProvider"
    rollouts: "RolloutDataset"
    ranks: "Ranks"
    run_state: "RunState"
    schedules: "Schedules"
    schedule_metrics: dict[str, float]
    records: "Records"
    clock: "Clock"
    generator: torch.Generator
    observation_space: Space[Any]
    action_space: Space[Any]
    total_steps: int
    num_minibatches: int
    num_eval_episodes: int
    eval_deterministic: bool
    env_timeout_s: float
    info_keys: tuple[str, ...]
    seed: Any  # an int once it is drawn
    run_folder: Path | None
    stop_signal: signal.Signals | None
    agreed_stop_signal: signal.Signals | None

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        ...

    @property
    def hparams(self) -> Any:
        """Hyperparameters by name."""
        ...

    @property
    def num_envs(self) -> int:
        """Environments of this rank."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps of each environment per rollout."""
        ...

    @property
    def num_env_steps(self) -> int:
        """Environment steps so far, of all ranks."""
        ...

    @property
    def policy_version(self) -> int:
        """Iterations so far."""
        ...

    @property
    def iterations_between_evaluations(self) -> int:
        """Iterations."""
        ...

    @property
    def steps_per_eval_episode(self) -> int:
        """Steps that an evaluation episode may take where the environment has no time limit."""
        ...

    def evaluation_seed(self, purpose: str = "evaluation") -> int:
        """Seed of the episodes of an evaluation now."""
        ...

    def environment_seed(self) -> int:
        """Seed of this rank's first environment."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of updates."""
        ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics of this iteration."""

    def exclude_from_fps(self, seconds: float) -> None:
        """Leave time out of ``time/fps``."""

    def summary(self) -> dict[str, Any]:
        """The run so far."""
        ...

    def close_environments(self) -> None:
        """Stop all simulators."""

    def rollback_update(self) -> None:
        """Undo an update that did not end."""
