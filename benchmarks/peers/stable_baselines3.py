"""Stable-Baselines3's PPO: 64-64 tanh MLP or Nature CNN, its own vectors, its CSV logger; w7r: RecurrentPPO of sb3-contrib."""

import tempfile
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
    cartpole_without_velocities,
    run_from_arguments,
)


def vector(run: Run) -> Any:
    """The environments, as the documentation of Stable-Baselines3 makes them."""
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    size = run.size
    unchecked = {"disable_env_checker": True}
    if run.name == "w5":
        import ale_py  # registers the games

        run.notes["ale_py"] = ale_py.__version__
        return VecFrameStack(make_atari_env(size.env, size.num_envs, env_kwargs=unchecked), 4)
    if run.name == "w7r":
        return make_vec_env(cartpole_without_velocities, size.num_envs)
    if run.name == "w2":
        return vectorized(size.env, size.num_envs)
    return make_vec_env(size.env, size.num_envs, env_kwargs=unchecked)


def vectorized(env_id: str, num_envs: int) -> Any:
    """Gymnasium's vectorised CartPole as a VecEnv: about 1.4 times as fast as a DummyVecEnv of 64."""
    import gymnasium
    import numpy as np
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor

    class Vectorized(VecEnv):
        def __init__(self) -> None:
            self.vector: Any = gymnasium.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
            super().__init__(num_envs, self.vector.single_observation_space, self.vector.single_action_space)
            self.state = self.vector.unwrapped

        def reset(self) -> Any:
            return self.vector.reset()[0]

        def step_async(self, actions: Any) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            observation, reward, terminated, truncated, _ = self.vector.step(self.actions)
            done = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
            if done.any():
                # The vector resets one step later; a VecEnv resets at once, and keeps the last observation.
                for index in np.flatnonzero(done):
                    timeout = bool(truncated[index] and not terminated[index])
                    infos[index] = {"terminal_observation": observation[index], "TimeLimit.truncated": timeout}
                inner = self.state
                inner.state[:, done] = inner.np_random.uniform(inner.low, inner.high, (4, done.sum()))
                inner.steps[done] = 0
                inner.prev_done[:] = False
                observation = inner.state.T.astype(np.float32)
            return observation, reward, done, infos

        def close(self) -> None:
            self.vector.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self.vector, attr_name, None)] * num_envs

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * num_envs

    return VecMonitor(Vectorized())


def main() -> None:
    run = run_from_arguments("stable_baselines3")
    size = run.size
    if size.tensors:
        run.unsupported("Its environments and rollout buffer are NumPy arrays, there are none on tensors.")
        return
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure

    class Mark(BaseCallback):
        def _on_rollout_start(self) -> None:
            run.tick()

        def _on_step(self) -> bool:
            return True

    warnings.filterwarnings("ignore")
    torch.set_num_threads(run.threads)
    networks: dict[str, Any] = {"net_arch": {"pi": list(HIDDEN), "vf": list(HIDDEN)}, "activation_fn": torch.nn.Tanh}
    algorithm, policy = PPO, "CnnPolicy" if run.name == "w5" else "MlpPolicy"
    if run.name == "w7r":
        from sb3_contrib import RecurrentPPO

        algorithm, policy = RecurrentPPO, "MlpLstmPolicy"
        networks["lstm_hidden_size"] = 64
    model = algorithm(
        policy,
        vector(run),
        learning_rate=size.lr,
        n_steps=size.num_steps,
        batch_size=size.minibatch,
        n_epochs=size.epochs,
        gamma=GAMMA,
        gae_lambda=GAE_LAMBDA,
        clip_range=size.clip,
        ent_coef=size.ent_coef,
        vf_coef=VF_COEF,
        max_grad_norm=MAX_GRAD_NORM,
        policy_kwargs={"optimizer_kwargs": {"eps": ADAM_EPS}, **({} if run.name == "w5" else networks)},
        seed=0,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        model.set_logger(configure(folder, ["csv"]))
        model.learn(run.total * size.rollout, callback=Mark())
        run.end()
    run.report("stable_baselines3", "torch", "gymnasium", "numpy")


if __name__ == "__main__":
    main()
