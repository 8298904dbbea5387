"""Gymnasium environments, single or vectorised, behind one interface."""

from ppo_lightning.envs.make import EnvFactory as EnvFactory
from ppo_lightning.envs.make import EnvSource as EnvSource
from ppo_lightning.envs.make import Vectorization as Vectorization
from ppo_lightning.envs.make import resolve as resolve
from ppo_lightning.envs.overrides import EnvOverrides as EnvOverrides
from ppo_lightning.envs.provider import EnvProvider as EnvProvider
from ppo_lightning.envs.tensor import TensorEnv as TensorEnv
from ppo_lightning.envs.third_party import EnvPool as EnvPool
from ppo_lightning.envs.third_party import Simulator as Simulator
from ppo_lightning.envs.vector import Environments as Environments
from ppo_lightning.envs.vector import Halves as Halves
from ppo_lightning.envs.vector import Restarts as Restarts
from ppo_lightning.envs.vector import Transition as Transition
