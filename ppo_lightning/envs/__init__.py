"""Gymnasium environments, single or vectorised, behind one interface."""

from ppo_lightning.envs.double_buffered import DoubleBufferedEnvs as DoubleBufferedEnvs
from ppo_lightning.envs.double_buffered import VectorEnvs as VectorEnvs
from ppo_lightning.envs.make import EnvFactory as EnvFactory
from ppo_lightning.envs.make import EnvSource as EnvSource
from ppo_lightning.envs.make import Vectorization as Vectorization
from ppo_lightning.envs.make import resolve as resolve
from ppo_lightning.envs.provider import EnvOverrides as EnvOverrides
from ppo_lightning.envs.provider import EnvProvider as EnvProvider
from ppo_lightning.envs.tensor import TensorEnv as TensorEnv
from ppo_lightning.envs.third_party import EnvPool as EnvPool
from ppo_lightning.envs.third_party import IsaacLabVectorEnv as IsaacLabVectorEnv
from ppo_lightning.envs.third_party import isaac_lab_env as isaac_lab_env
from ppo_lightning.envs.third_party import mjlab_env as mjlab_env
from ppo_lightning.envs.vector import RestartBudget as RestartBudget
from ppo_lightning.envs.vector import Transition as Transition
from ppo_lightning.envs.vector import VectorEnvAdapter as VectorEnvAdapter
