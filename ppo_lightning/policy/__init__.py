"""The policy: encoding, normalisation, network, distribution."""

from ppo_lightning.policy.actor_critic import ActorCritic as ActorCritic
from ppo_lightning.policy.moments import RunningMoments as RunningMoments
from ppo_lightning.policy.policy import CLIP as CLIP
from ppo_lightning.policy.policy import Network as Network
from ppo_lightning.policy.policy import Policy as Policy
