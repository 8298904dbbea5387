"""CleanRL is scripts to copy, not a package: this is the loop of its PPO scripts, told anew for Gymnasium 1.

Rollout tensors, one environment step at a time, GAE in a Python loop, shuffled minibatches, clipped value loss, a linearly
annealed learning rate; eager torch on the CPU. Metrics are worked out as there, and written nowhere.
"""

from typing import Any

from common import ADAM_EPS, GAE_LAMBDA, GAMMA, HIDDEN, MAX_GRAD_NORM, VF_COEF, Run, run_from_arguments

run = run_from_arguments("cleanrl")
if run.size.tensors:
    run.unsupported(
        "Its scripts keep environments and what they return in NumPy (the variants on JAX or Isaac differ)."
    )
    raise SystemExit
if run.name == "w7r":
    run.unsupported("Its recurrent script is for images.")
    raise SystemExit

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributions import Categorical, Normal  # noqa: E402


def single(run: Run) -> gym.Env[Any, Any]:
    """One environment with the wrappers of CleanRL's scripts, less the normalisation that no peer does here."""
    if run.name == "w5":
        import ale_py
        from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformReward

        gym.register_envs(ale_py)
        env = gym.wrappers.RecordEpisodeStatistics(gym.make(run.size.env, disable_env_checker=True))
        env = AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84, terminal_on_life_loss=True)
        return FrameStackObservation(TransformReward(env, np.sign), 4)
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(run.size.env, disable_env_checker=True))
    return gym.wrappers.ClipAction(env) if isinstance(env.action_space, gym.spaces.Box) else env


def vector(run: Run) -> gym.vector.VectorEnv:
    """All environments."""
    if run.name == "w2":
        made = gym.make_vec(run.size.env, run.size.num_envs, vectorization_mode="vector_entry_point")
        return gym.wrappers.vector.RecordEpisodeStatistics(made)
    return SyncVectorEnv([lambda: single(run)] * run.size.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def layer(module: Any, gain: float = 2**0.5) -> Any:
    """A layer with orthogonal weights and no bias to begin with."""
    nn.init.orthogonal_(module.weight, gain)
    nn.init.zeros_(module.bias)
    return module


def tanh_network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    first, second = HIDDEN
    return nn.Sequential(
        layer(nn.Linear(inputs, first)),
        nn.Tanh(),
        layer(nn.Linear(first, second)),
        nn.Tanh(),
        layer(nn.Linear(second, outputs), gain),
    )


class Agent(nn.Module):
    """Actor and critic: apart for vectors, on one Nature CNN for images."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__()
        space, shape = env.single_action_space, env.single_observation_space.shape
        assert shape is not None
        self.discrete = isinstance(space, gym.spaces.Discrete)
        outputs = int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape or ()))
        self.features: nn.Module | None = None
        if len(shape) == 3:
            self.features = nn.Sequential(
                layer(nn.Conv2d(shape[0], 32, 8, stride=4)),
                nn.ReLU(),
                layer(nn.Conv2d(32, 64, 4, stride=2)),
                nn.ReLU(),
                layer(nn.Conv2d(64, 64, 3)),
                nn.ReLU(),
                nn.Flatten(),
                layer(nn.Linear(64 * 7 * 7, 512)),
                nn.ReLU(),
            )
            self.actor, self.critic = layer(nn.Linear(512, outputs), 0.01), layer(nn.Linear(512, 1), 1.0)
        else:
            self.actor, self.critic = tanh_network(shape[0], outputs, 0.01), tanh_network(shape[0], 1, 1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(1, outputs))

    def value(self, observation: Tensor) -> Tensor:
        """What the critic says."""
        return self.critic(observation if self.features is None else self.features(observation / 255.0))

    def forward(self, observation: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Action, its log-probability, entropy, value."""
        hidden = observation if self.features is None else self.features(observation / 255.0)
        if self.discrete:
            categorical = Categorical(logits=self.actor(hidden))
            if action is None:
                action = categorical.sample()
            return action, categorical.log_prob(action), categorical.entropy(), self.critic(hidden)
        mean = self.actor(hidden)
        normal = Normal(mean, self.log_std.expand_as(mean).exp())
        if action is None:
            action = normal.sample()
        return action, normal.log_prob(action).sum(1), normal.entropy().sum(1), self.critic(hidden)


def train(run: Run) -> None:
    size = run.size
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.set_num_threads(run.threads)
    env = vector(run)
    agent = Agent(env)
    optimizer = torch.optim.Adam(agent.parameters(), lr=size.lr, eps=ADAM_EPS)
    steps, num_envs, clip = size.num_steps, size.num_envs, size.clip
    obs_shape, act_shape = env.single_observation_space.shape or (), env.single_action_space.shape or ()
    observations = torch.zeros((steps, num_envs, *obs_shape))
    actions = torch.zeros((steps, num_envs, *act_shape))
    log_probs, rewards, dones, values = (torch.zeros(steps, num_envs) for _ in range(4))
    next_observation = torch.as_tensor(env.reset(seed=0)[0], dtype=torch.float32)
    next_done = torch.zeros(num_envs)
    returns: list[float] = []

    for iteration in range(run.total):
        run.tick()
        optimizer.param_groups[0]["lr"] = size.lr * (1 - iteration / run.total)
        for step in range(steps):
            observations[step], dones[step] = next_observation, next_done
            with torch.no_grad():
                action, log_prob, _, value = agent(next_observation)
            values[step], actions[step], log_probs[step] = value.flatten(), action, log_prob
            received, reward, terminated, truncated, info = env.step(action.numpy())
            rewards[step] = torch.as_tensor(reward, dtype=torch.float32)
            done = np.logical_or(terminated, truncated)
            next_observation = torch.as_tensor(received, dtype=torch.float32)
            next_done = torch.as_tensor(done, dtype=torch.float32)
            if done.any():
                episode = info.get("final_info", info).get("episode")
                if episode is not None:
                    returns.extend(episode["r"][done].tolist())

        with torch.no_grad():
            next_value = agent.value(next_observation).flatten()
            advantages, running = torch.zeros_like(rewards), torch.zeros(num_envs)
            for step in reversed(range(steps)):
                last = step == steps - 1
                alive = 1.0 - (next_done if last else dones[step + 1])
                following = next_value if last else values[step + 1]
                delta = rewards[step] + GAMMA * following * alive - values[step]
                advantages[step] = running = delta + GAMMA * GAE_LAMBDA * alive * running
            targets = advantages + values

        b_observations = observations.reshape(-1, *obs_shape)
        b_actions = actions.reshape(-1, *act_shape)
        b_log_probs, b_advantages = log_probs.reshape(-1), advantages.reshape(-1)
        b_targets, b_values = targets.reshape(-1), values.reshape(-1)
        order, clipped = np.arange(size.rollout), []
        for _ in range(size.epochs):
            np.random.shuffle(order)  # noqa: NPY002
            for start in range(0, size.rollout, size.minibatch):
                rows = order[start : start + size.minibatch]
                chosen = b_actions[rows].long() if agent.discrete else b_actions[rows]
                _, new_log_prob, entropy, new_value = agent(b_observations[rows], chosen)
                log_ratio = new_log_prob - b_log_probs[rows]
                ratio = log_ratio.exp()
                with torch.no_grad():
                    old_kl, kl = (-log_ratio).mean(), ((ratio - 1) - log_ratio).mean()
                    clipped.append(((ratio - 1).abs() > clip).float().mean().item())
                advantage = b_advantages[rows]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                new_value = new_value.view(-1)
                near = b_values[rows] + (new_value - b_values[rows]).clamp(-clip, clip)
                squares = torch.max((new_value - b_targets[rows]) ** 2, (near - b_targets[rows]) ** 2)
                value_loss = 0.5 * squares.mean()
                loss = policy_loss - size.ent_coef * entropy.mean() + VF_COEF * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                optimizer.step()

        predicted, true = b_values.numpy(), b_targets.numpy()
        spread = np.var(true)
        metrics = {
            "explained_variance": np.nan if spread == 0 else 1 - np.var(true - predicted) / spread,
            "clip_fraction": np.mean(clipped),
            "losses": [each.item() for each in (policy_loss, value_loss, entropy.mean(), old_kl, kl)],
        }
        assert metrics["losses"]
    run.end()
    run.notes["mean_return"] = float(np.mean(returns[-100:])) if returns else None
    env.close()
    run.report("torch", "gymnasium", "numpy")


train(run)
