"""RSL-RL's PPO: everything is tensors, its environments as well."""

import contextlib
import io
from typing import Any

from common import (
    GAE_LAMBDA,
    GAMMA,
    HIDDEN,
    MAX_GRAD_NORM,
    VF_COEF,
    Run,
    run_from_arguments,
    tensor_environments,
)


def adapter(run: Run) -> Any:
    """A Gymnasium vector, of tensors or of arrays, as RSL-RL's VecEnv."""
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode
    from rsl_rl.env import VecEnv
    from tensordict import TensorDict

    size = run.size
    if size.tensors:
        vector: Any = tensor_environments().Pendulum(size.num_envs)
        limit = vector.max_episode_steps
    else:
        kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
        vector = gymnasium.make_vec(size.env, size.num_envs, "sync", vector_kwargs=kwargs, disable_env_checker=True)
        limit = gymnasium.spec(size.env).max_episode_steps

    def tensor(array: Any) -> torch.Tensor:
        return torch.as_tensor(array, dtype=torch.float32)

    class Adapter(VecEnv):
        def __init__(self) -> None:
            self.num_envs, self.num_actions = size.num_envs, vector.single_action_space.shape[0]
            self.max_episode_length, self.device, self.cfg = limit, "cpu", {}
            self.episode_length_buf = torch.zeros(size.num_envs, dtype=torch.long)
            self.observation = self.wrapped(vector.reset(seed=0)[0])

        def wrapped(self, observation: Any) -> TensorDict:
            return TensorDict({"policy": tensor(observation)}, batch_size=size.num_envs)

        def get_observations(self) -> TensorDict:
            return self.observation

        def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
            observation, reward, terminated, truncated, _ = vector.step(actions if size.tensors else actions.numpy())
            terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
            self.observation = self.wrapped(observation)
            return self.observation, tensor(reward), terminated | truncated, {"time_outs": truncated}

    return Adapter()


def main() -> None:
    run = run_from_arguments("rsl_rl")
    size = run.size
    if run.name not in {"w3", "w4"}:
        run.unsupported("Its policies are Gaussian (or Beta), so actions must be continuous.")
        return
    import torch
    from rsl_rl.runners import OnPolicyRunner

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    network = {"class_name": "MLPModel", "hidden_dims": list(HIDDEN), "activation": "tanh"}
    settings: dict[str, Any] = {
        "num_steps_per_env": size.num_steps,
        "save_interval": 10**9,
        "check_for_nan": False,
        # Compiled networks are faster on large batches only, here as on w4.
        "torch_compile_mode": "default" if size.tensors else None,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**network, "distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"}},
        "critic": network,
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": size.epochs,
            "num_mini_batches": size.minibatches,
            "learning_rate": size.lr,
            "schedule": "fixed",
            "desired_kl": None,
            "gamma": GAMMA,
            "lam": GAE_LAMBDA,
            "clip_param": size.clip,
            "entropy_coef": size.ent_coef,
            "value_loss_coef": VF_COEF,
            "max_grad_norm": MAX_GRAD_NORM,
            "normalize_advantage_per_mini_batch": True,
        },
    }
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(adapter(run), settings, log_dir=None, device="cpu")
        run.begin()
        runner.learn(run.warm_up)
        run.warm()
        runner.learn(run.iterations)
        run.end()
    run.report("rsl-rl-lib", "torch", "gymnasium", "numpy", "tensordict")


if __name__ == "__main__":
    main()
