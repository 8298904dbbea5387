"""PPO for people who train with Lightning."""

from ppo_lightning.advantage import generalized_advantage as generalized_advantage
from ppo_lightning.errors import EnvironmentFault as EnvironmentFault
from ppo_lightning.errors import InputError as InputError
from ppo_lightning.loss import PPOLoss as PPOLoss
from ppo_lightning.parameters import Linear as Linear
from ppo_lightning.parameters import PopArt as PopArt
from ppo_lightning.policy import MLP as MLP
from ppo_lightning.policy import ActorCritic as ActorCritic
from ppo_lightning.policy import ImpalaCNN as ImpalaCNN
from ppo_lightning.policy import Memory as Memory
from ppo_lightning.policy import NatureCNN as NatureCNN
from ppo_lightning.policy import RunningMoments as RunningMoments
from ppo_lightning.policy import action_distribution as action_distribution
from ppo_lightning.ppo import PPO as PPO
from ppo_lightning.rollout import RolloutDataset as RolloutDataset

__version__ = "0.1.0"
