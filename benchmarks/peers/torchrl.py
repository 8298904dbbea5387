"""TorchRL's parts put together as in its PPO recipes: collector, GAE, clipped loss, buffer without replacement."""

import warnings
from typing import Any

from common import (
    ADAM_EPS,
    GAE_LAMBDA,
    GAMMA,
    HIDDEN,
    MAX_GRAD_NORM,
    VF_COEF,
    Run,
    run_from_arguments,
    tensor_environments,
)


def arrays(run: Run) -> Any:
    """Gymnasium's vectors; those that do not reset by themselves are the ones that TorchRL prefers."""
    import gymnasium
    import numpy as np
    from gymnasium.vector import AutoresetMode, VectorWrapper
    from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv

    size = run.size

    class Masked(VectorWrapper):
        """The vectorised CartPole without autoreset: resets come by mask."""

        autoreset_mode = AutoresetMode.DISABLED

        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.state = env.unwrapped

        def step(self, actions: Any) -> Any:
            result = self.env.step(actions)
            self.state.prev_done[:] = False
            return result

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            mask = (options or {}).get("reset_mask")
            if mask is None:
                return self.env.reset(seed=seed)
            inner = self.state
            inner.state[:, mask] = inner.np_random.uniform(inner.low, inner.high, (4, mask.sum()))
            inner.steps[mask] = 0
            return inner.state.T.astype(np.float32), {}

    if run.name == "w2":
        made: Any = Masked(gymnasium.make_vec(size.env, size.num_envs, vectorization_mode="vector_entry_point"))
    else:
        kwargs = {"autoreset_mode": AutoresetMode.DISABLED}
        made = gymnasium.make_vec(size.env, size.num_envs, "sync", vector_kwargs=kwargs, disable_env_checker=True)
    env = GymWrapper(made, categorical_action_encoding=True)
    single = made.single_observation_space.dtype == np.float32
    return env if single else TransformedEnv(env, DoubleToFloat(in_keys=["observation"]))


def tensors(run: Run) -> Any:
    """The tensor environments as TorchRL's own: it resets them by mask."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import Bounded, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase

    count, discrete = run.size.num_envs, run.size.env.startswith("CartPole")
    classes = tensor_environments()
    vector = (classes.CartPole if discrete else classes.Pendulum)(count)
    limit = vector.max_episode_steps

    class Tensors(EnvBase):
        def __init__(self) -> None:
            super().__init__(device="cpu", batch_size=[count])
            shape = (count, *vector.single_observation_space.shape)
            self.observation_spec = Composite(observation=Unbounded(shape), shape=(count,))
            space = vector.single_action_space
            if discrete:
                self.action_spec = Categorical(2, shape=(count,), dtype=torch.int64)
            else:
                self.action_spec = Bounded(float(space.low[0]), float(space.high[0]), shape=(count, 1))
            self.reward_spec = Unbounded((count, 1))
            flag = Categorical(2, shape=(count, 1), dtype=torch.bool)
            self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(count,))
            self.state = vector.initial_state(vector.reset_noise())
            self.elapsed = torch.zeros(count, dtype=torch.int32)

        def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
            mask = None if tensordict is None else tensordict.get("_reset", None)
            fresh = vector.initial_state(vector.reset_noise())
            if mask is None:
                self.state, self.elapsed = fresh, torch.zeros_like(self.elapsed)
            else:
                mask = mask.view(count)
                self.state = torch.where(mask.unsqueeze(-1), fresh, self.state)
                self.elapsed = self.elapsed.masked_fill(mask, 0)
            no = torch.zeros(count, 1, dtype=torch.bool)
            values = {"observation": vector.observe(self.state), "done": no, "terminated": no, "truncated": no.clone()}
            return TensorDict(values, batch_size=[count])

        def _step(self, tensordict: Any) -> Any:
            self.state, reward, terminated = vector.dynamics(self.state, tensordict["action"])
            self.elapsed = self.elapsed + 1
            truncated = (self.elapsed >= limit) & ~terminated
            values = {
                "observation": vector.observe(self.state),
                "reward": reward.unsqueeze(-1),
                "done": (terminated | truncated).unsqueeze(-1),
                "terminated": terminated.unsqueeze(-1),
                "truncated": truncated.unsqueeze(-1),
            }
            return TensorDict(values, batch_size=[count])

        def _set_seed(self, seed: int | None) -> None:
            vector.generator.manual_seed(seed or 0)

    return Tensors()


def main() -> None:
    run = run_from_arguments("torchrl")
    size = run.size
    if run.name in {"w1t", "w5", "w7r"}:
        reason = {
            "w1t": "On tensors its environments are those of w3 and w3c.",
            "w5": "Its Atari transforms make another pipeline of frames than the one that is compared.",
            "w7r": "Its LSTM needs a pipeline of one's own, for which no fair settings are known.",
        }
        run.unsupported(reason[run.name])
        return
    warnings.filterwarnings("ignore")
    import torch
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torch import nn
    from torch.distributions import Categorical
    from torchrl.collectors import Collector
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(False)
    env = tensors(run) if size.tensors else arrays(run)
    env.set_seed(0)
    discrete = size.env.startswith("CartPole")
    inputs = env.observation_spec["observation"].shape[-1]
    common: dict[str, Any] = {"num_cells": list(HIDDEN), "activation_class": nn.Tanh}
    if discrete:
        network: nn.Module = MLP(in_features=inputs, out_features=2, **common)
    else:
        outputs = env.action_spec.shape[-1]
        network = nn.Sequential(
            MLP(in_features=inputs, out_features=outputs, **common),
            AddStateIndependentNormalScale(outputs, scale_lb=1e-8),
        )
    keys = ["logits"] if discrete else ["loc", "scale"]
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=keys),
        in_keys=keys,
        spec=env.action_spec,
        safe=False,
        distribution_class=Categorical if discrete else IndependentNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(MLP(in_features=inputs, out_features=1, **common), in_keys=["observation"])
    collector = Collector(
        env,
        actor,
        frames_per_batch=size.rollout,
        total_frames=run.total * size.rollout,
        device="cpu",
        track_traj_ids=False,
        trust_policy=True,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(size.rollout),
        sampler=SamplerWithoutReplacement(),
        batch_size=size.minibatch,
    )
    estimate = GAE(gamma=GAMMA, lmbda=GAE_LAMBDA, value_network=critic, average_gae=False)
    loss_module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=size.clip,
        entropy_bonus=size.ent_coef > 0,
        entropy_coeff=size.ent_coef,
        critic_coeff=VF_COEF,
        loss_critic_type="l2",
        normalize_advantage=True,
        log_explained_variance=False,
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=size.lr, eps=ADAM_EPS)

    def update(batch: Any) -> None:
        losses = loss_module(batch)
        loss = losses["loss_objective"] + losses["loss_critic"]
        if size.ent_coef > 0:
            loss = loss + losses["loss_entropy"]
        loss.backward()
        nn.utils.clip_grad_norm_(loss_module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # As the recipes do with their option `compile`. Compiling the policy and GAE too gains nothing more here.
    update = torch.compile(update)
    batches = iter(collector)
    for _ in range(run.total):
        run.tick()
        data = next(batches)
        with torch.no_grad():
            data = estimate(data)
        buffer.empty()
        buffer.extend(data.reshape(-1))
        for _ in range(size.epochs):
            for batch in buffer:
                update(batch)
    run.end()
    collector.shutdown()
    run.report("torchrl", "torch", "tensordict", "gymnasium", "numpy")


if __name__ == "__main__":
    main()
