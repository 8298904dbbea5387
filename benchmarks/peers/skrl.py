"""skrl's PPO: its sequential trainer, random memory and Gymnasium wrapper; no TensorBoard, no checkpoints."""

import logging
import tempfile
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


def environment(run: Run) -> Any:
    """The environments in skrl's wrapper."""
    import gymnasium
    import torch
    from gymnasium.vector import AutoresetMode
    from skrl.envs.wrappers.torch import Wrapper, wrap_env

    size = run.size
    if run.name == "w2":
        made = gymnasium.make_vec(size.env, size.num_envs, vectorization_mode="vector_entry_point")
        return wrap_env(made, wrapper="gymnasium", verbose=False)
    if not size.tensors:
        kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
        made = gymnasium.make_vec(size.env, size.num_envs, "sync", vector_kwargs=kwargs, disable_env_checker=True)
        return wrap_env(made, wrapper="gymnasium", verbose=False)
    discrete = size.env.startswith("CartPole")
    classes = tensor_environments()
    vector = (classes.CartPole if discrete else classes.Pendulum)(size.num_envs)

    class Tensors(Wrapper):
        """Tensors in and out, which skrl's wrapper for Gymnasium would turn into arrays and back."""

        observation_space = vector.single_observation_space
        action_space = vector.single_action_space
        observation: Any = None

        def reset(self) -> tuple[torch.Tensor, dict[str, Any]]:
            if self.observation is None:
                self.observation = vector.reset(seed=0)[0]
            return self.observation, {}

        def step(self, actions: torch.Tensor) -> Any:
            observation, reward, terminated, truncated, _ = vector.step(actions.squeeze(-1) if discrete else actions)
            self.observation = observation
            columns = (each.unsqueeze(-1) for each in (reward, terminated, truncated))
            return (observation, *columns, {})

        def state(self) -> None:
            return None

        def render(self, *args: Any, **kwargs: Any) -> None:
            return None

        def close(self) -> None:
            return None

    return Tensors(vector)


def main() -> None:
    run = run_from_arguments("skrl")
    size = run.size
    if run.name in {"w1t", "w5", "w7r"}:
        reason = {
            "w1t": "On tensors its environments are those of w3 and w3c.",
            "w5": "It has no Atari wrappers and stores flat float32 observations, so no fair settings are known.",
            "w7r": "Its recurrent PPO needs models of one's own, for which no fair settings are known.",
        }
        run.unsupported(reason[run.name])
        return
    import torch
    from skrl import logger
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
    from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
    from skrl.utils import set_seed
    from torch import nn

    logger.setLevel(logging.ERROR)
    torch.set_num_threads(run.threads)
    set_seed(0)
    env = environment(run)
    spaces: dict[str, Any] = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "device": "cpu",
    }

    def network(inputs: int, outputs: int) -> nn.Sequential:
        first, second = HIDDEN
        return nn.Sequential(
            nn.Linear(inputs, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, outputs)
        )

    class Gaussian(GaussianMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            GaussianMixin.__init__(self)
            self.network = network(self.num_observations, self.num_actions)
            self.log_std = nn.Parameter(torch.zeros(self.num_actions))

        def compute(self, inputs: dict[str, Any], role: str = "") -> Any:
            return self.network(inputs["observations"]), {"log_std": self.log_std}

    class Categorical(CategoricalMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            CategoricalMixin.__init__(self)
            self.network = network(self.num_observations, self.num_actions)

        def compute(self, inputs: dict[str, Any], role: str = "") -> Any:
            return self.network(inputs["observations"]), {}

    class Value(DeterministicMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.network = network(self.num_observations, 1)

        def compute(self, inputs: dict[str, Any], role: str = "") -> Any:
            return self.network(inputs["observations"]), {}

    discrete = size.env.startswith("CartPole")
    with tempfile.TemporaryDirectory() as folder:
        settings = PPO_CFG(
            rollouts=size.num_steps,
            learning_epochs=size.epochs,
            mini_batches=size.minibatches,
            discount_factor=GAMMA,
            gae_lambda=GAE_LAMBDA,
            learning_rate=size.lr,
            grad_norm_clip=MAX_GRAD_NORM,
            ratio_clip=size.clip,
            value_clip=size.clip,
            entropy_loss_scale=size.ent_coef,
            value_loss_scale=VF_COEF,
        )
        settings.experiment.directory = folder
        settings.experiment.write_interval = settings.experiment.checkpoint_interval = 0
        agent = PPO(
            models={"policy": Categorical() if discrete else Gaussian(), "value": Value()},
            memory=RandomMemory(memory_size=size.num_steps, num_envs=size.num_envs, device="cpu"),
            cfg=settings,
            **spaces,
        )
        agent.optimizer.param_groups[0]["eps"] = ADAM_EPS  # of which its settings say nothing
        options = SequentialTrainerCfg(headless=True, disable_progressbar=True, close_environment_at_exit=False)
        trainer = SequentialTrainer(env=env, agents=agent, cfg=options)
        run.begin()
        options.timesteps = run.warm_up * size.num_steps
        trainer.train()
        run.warm()
        options.timesteps = run.iterations * size.num_steps
        trainer.train()
        run.end()
    run.report("skrl", "torch", "gymnasium", "numpy")


if __name__ == "__main__":
    main()
