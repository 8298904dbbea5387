"""The policy: encoding, normalisation, network, distribution."""

from ppo_lightning.policy.actor_critic import ActorCritic as ActorCritic
from ppo_lightning.policy.distributions import ActionDistribution as ActionDistribution
from ppo_lightning.policy.distributions import action_distribution as action_distribution
from ppo_lightning.policy.distributions import stack as stack
from ppo_lightning.policy.encoders import MLP as MLP
from ppo_lightning.policy.encoders import ImpalaCNN as ImpalaCNN
from ppo_lightning.policy.encoders import NatureCNN as NatureCNN
from ppo_lightning.policy.moments import RunningMoments as RunningMoments
from ppo_lightning.policy.moments import ValueNormalizer as ValueNormalizer
from ppo_lightning.policy.moments import statistics_of as statistics_of
from ppo_lightning.policy.policy import CLIP as CLIP
from ppo_lightning.policy.policy import Network as Network
from ppo_lightning.policy.policy import Policy as Policy
from ppo_lightning.policy.policy import PolicyOutput as PolicyOutput
from ppo_lightning.policy.policy import in_eval_mode as in_eval_mode
from ppo_lightning.policy.recurrent import RecurrentLayer as RecurrentLayer
