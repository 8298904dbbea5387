"""PPO for people who train with Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_lightning.algorithm.advantage import gae as gae
    from ppo_lightning.algorithm.advantage import generalized_advantage as generalized_advantage
    from ppo_lightning.algorithm.loss import LossCoefficients as LossCoefficients
    from ppo_lightning.algorithm.loss import PPOLoss as PPOLoss
    from ppo_lightning.callbacks import PPOCallback as PPOCallback
    from ppo_lightning.errors import EnvironmentFault as EnvironmentFault
    from ppo_lightning.errors import InputError as InputError
    from ppo_lightning.parameters import Linear as Linear
    from ppo_lightning.parameters import PopArt as PopArt
    from ppo_lightning.policy import MLP as MLP
    from ppo_lightning.policy import ActorCritic as ActorCritic
    from ppo_lightning.policy import ImpalaCNN as ImpalaCNN
    from ppo_lightning.policy import NatureCNN as NatureCNN
    from ppo_lightning.policy import RecurrentLayer as RecurrentLayer
    from ppo_lightning.policy import RunningMoments as RunningMoments
    from ppo_lightning.policy import action_distribution as action_distribution
    from ppo_lightning.ppo import PPO as PPO
    from ppo_lightning.rollout.dataset import RolloutDataset as RolloutDataset

__version__ = "0.1.0"

MODULES = {
    "PPO": "ppo",
    "PPOCallback": "callbacks",
    **dict.fromkeys(("LossCoefficients", "PPOLoss"), "algorithm.loss"),
    **dict.fromkeys(("gae", "generalized_advantage"), "algorithm.advantage"),
    "RolloutDataset": "rollout.dataset",
    **dict.fromkeys(("EnvironmentFault", "InputError"), "errors"),
    **dict.fromkeys(("Linear", "PopArt"), "parameters"),
    **dict.fromkeys(("MLP", "ActorCritic", "ImpalaCNN", "RecurrentLayer", "NatureCNN"), "policy"),
    **dict.fromkeys(("RunningMoments", "action_distribution"), "policy"),
}
"""Where the public names are defined: they are imported when they are asked for, and the command line at once."""


if not TYPE_CHECKING:  # a checker then knows which names there are

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the package, when it is asked for."""
        module = f"{__name__}.{MODULES.get(name, name)}"
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
        globals()[name] = value = getattr(found, name) if name in MODULES else found
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
