"""PPO as a LightningModule: Lightning's hooks in their order, then what users call.

train_dataloader: RolloutDataset.collect → Collector.collect (policy.act, step_async, step_wait). on_train_batch_start: rewards
are normalised, advantages estimated. training_step: update → Updater.update → plan_minibatches, run_epochs (step.gradient →
Objective → PPOLoss; step.apply → optimizer.step), then count and log_metrics (runs/module.py), metrics → iteration_metrics.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from lightning import Callback
from lightning.pytorch.cli import OptimizerCallable
from tensordict import TensorDict
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.algorithm.advantage import check_estimates, gae
from ppo_lightning.algorithm.loss import Loss, LossCoefficients, PPOLoss
from ppo_lightning.algorithm.minibatches import estimates, training_samples
from ppo_lightning.algorithm.optimizer_step import Backend, NonFiniteGradient, NonFiniteGuard, write_dump
from ppo_lightning.algorithm.reward_normalization import RewardNormalizer
from ppo_lightning.algorithm.update import Updater, UpdateResult
from ppo_lightning.callbacks.defaults import attach_callbacks
from ppo_lightning.callbacks.events import call_event
from ppo_lightning.callbacks.run_folder import begin_writing, defer_writing
from ppo_lightning.compiler import Compilation
from ppo_lightning.envs import EnvFactory, resolve
from ppo_lightning.metric_names import MetricNames
from ppo_lightning.metrics import iteration_metrics
from ppo_lightning.parameters import (
    LIMITS,
    Linear,
    PopArt,
    check_callable,
    check_length,
    check_memory,
    check_recompute,
    checked,
    make_optimizer,
    make_scheduler,
    plain_factory,
    schedule,
    try_schedule,
)
from ppo_lightning.policy import ActorCritic, Policy, RunningMoments
from ppo_lightning.rollout.dataset import RolloutDataset, check_rollout, rollout_memory
from ppo_lightning.runs.hyperparameters import defaults_of
from ppo_lightning.runs.module import RunModule
from ppo_lightning.runs.ranks import LightningBackend, can_bypass_strategy
from ppo_lightning.runs.schedules import Schedules
from ppo_lightning.runs.state import resolve_seed
from ppo_lightning.runs.trainer import (
    STOP_SIGNALS,
    check_supported_features,
    gradient_hooks,
    set_global_step,
    shorten_timeout,
)
from ppo_lightning.spaces import MASK, without_mask


class PPO(RunModule):
    """Proximal Policy Optimisation (Schulman et al. 2017) that trains on ``Trainer.fit``.

    One epoch is one policy iteration: a rollout of ``num_steps`` steps in each environment, its advantages, and
    ``update_epochs`` epochs of shuffled minibatches over it. ``total_steps`` is the only budget.

    Values have the types below; bools and strings are not accepted as numbers. A float that is whole is accepted as a whole
    number (``total_steps=1e6``), and NumPy and torch scalars become plain numbers.

    Args:
        env: Gymnasium id, VectorEnv, or callable that makes one; "module:Id-v0" imports the module first, and a callable may
            also make one single environment: in YAML a class by class_path, or a function as package.module.name. A
            VectorEnv's own number of environments wins over num_envs.
        env_kwargs: arguments for gymnasium.make, or for the callable.
        wrappers: Gymnasium wrappers of each environment; innermost first, in YAML by class_path.
        num_envs: environments per rank that are stepped together (count).
        vectorization: how environments run: sync (one after another, in this process), async (in worker processes),
            vector_entry_point (the environment's own vectorised version).
        num_workers: worker processes of async; the environments are split among them. null is one for each (count).
        num_steps: steps of each environment per rollout (steps).
        total_steps: environment steps to train for; of all ranks together, rounded up to whole iterations. Every schedule
            runs on it (steps).
        policy: class_path or callable that makes the network; given (observation_space, action_space), it returns one whose
            forward maps observations [B, …] to distribution parameters [B, P] and values [B]. The default, ActorCritic, has
            encoders for images and Dict observations, recurrent layers, and several distributions as options.
        normalize_observation: normalise observations by running moments; subtract their mean, divide by their standard
            deviation, clip at ±10: of a Dict the numeric entries, never images.
        normalize_reward: divide rewards by the discounted return's deviation; that is its running standard deviation, and
            the quotient is clipped at ±10. Reported returns stay in the environment's units.
        clip_reward: learn from the sign of rewards, as usual for Atari; reported returns stay in the environment's units.
        popart: {beta} normalises the critic's targets; its outputs are preserved (PopArt). null does not.
        gamma: discount factor (per environment step, 0 to 1).
        gae_lambda: how far advantages look ahead: 0 is the one-step TD error, 1 the whole return (dimensionless, 0 to 1).
        advantage_estimator: function of rollouts; a callable (rollout [T, N], *, gamma, gae_lambda) -> (advantage [T, N],
            value target [T, N]), in YAML a function as package.module.name, or a class by class_path. The rollout's
            ``reward`` is normalised or clipped already.
        recompute_advantages: estimate advantages again before each later epoch; not for recurrent networks.
        update_epochs: epochs over each rollout (count).
        num_minibatches: minibatches of each epoch (count).
        gradient_accumulation_steps: microbatches of each minibatch; its gradient is accumulated over them, where a minibatch
            does not fit into memory. The optimizer step is the same (count).
        sequence_length: steps of a recurrent policy's sequences; rollouts are split into them. null is num_steps (steps).
        loss: module or callable that returns scalars; given (batch, evaluate, coefficients), it returns them by name: loss is
            minimised, and all are logged as train/…. null is PPOLoss. Its parameters are trained with the policy's
            (docs/changing_the_algorithm.md).
        clip_range: largest change of a probability ratio; beyond it the objective is constant. A number, or {start, end} for
            a linear schedule over the run (dimensionless).
        clip_range_vf: largest change of a value; beyond it the critic's loss is constant (units of normalised rewards). null
            does not clip.
        normalize_advantage: normalise the advantages of each minibatch; their mean is 0 and their standard deviation 1 then:
            true over each rank's own samples, all_ranks over the samples of all ranks, which makes the result independent of
            their number.
        ent_coef: weight of the entropy bonus; a number, or {start, end} for a linear schedule over the run (advantage units
            per nat).
        vf_coef: weight of the critic's mean squared error; the error is not halved (dimensionless).
        max_grad_norm: largest Euclidean norm of the gradient; a gradient whose norm over all parameters is larger is scaled
            down to it. null does not clip.
        non_finite: what a gradient that is not finite does; raise ends the run, with unchanged parameters and a file to
            reproduce it, skip leaves the step out, 10 in a row at most.
        target_kl: approximate KL divergence that ends an update; the update ends before the step where it exceeds 1.5 times
            this (nats). null never does.
        optimizer: class_path or callable parameters -> optimizer; its learning rate falls linearly to 0 over
            total_steps unless lr_scheduler is given.
        lr_scheduler: class_path or callable optimizer -> scheduler; stepped once per iteration (ConstantLR with factor
            1 keeps the learning rate). null is linear to 0.
        eval_interval: iterations between evaluations; null makes at most 20 evaluations over the run.
        num_eval_episodes: episodes of each evaluation, exactly (count).
        eval_deterministic: evaluate the most probable action; false draws one.
        max_env_restarts: restarts of environments that fail; those that raise, or whose worker processes die or hang, are
            restarted so often in one run of this process, their episodes cut there. 0 ends the run (count).
        info_keys: keys of the environments' info that are logged; their scalars as env/…, beside reward_components, rewards,
            log and metrics, which are always logged where present.
        metric_names: whose names loggers receive: sb3, cleanrl, leanrl, apexrl, pufferlib or embodichain, with that
            system's signs and scales; monitors and reports keep Stable-Baselines3's.
        env_timeout_s: longest step or reset of async environments; a longer one is an error (seconds).
        compile: compile gradient steps and rollouts of tensors; each gradient step, and the rollouts of environments that
            are tensors, is one graph: several times as fast for small networks, after some ten seconds of compilation. auto
            does so where that is possible and pays off: on a CPU, in runs of 50,000 gradient steps or more, without
            convolutions.

    Raises:
        InputError: a value cannot be used; the message names it, and what to do.
    """

    @checked(skip=["env"], **LIMITS)
    def __init__(
        self,
        env: str | Callable[..., VectorEnv] | Callable[..., gym.Env] | VectorEnv,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[Callable[[gym.Env], gym.Env]] = (),
        num_envs: int = 8,
        vectorization: Literal["sync", "async", "vector_entry_point"] = "sync",
        num_workers: int | None = None,
        num_steps: int = 128,
        total_steps: int = 1_000_000,
        policy: Callable[[gym.Space, gym.Space], nn.Module] = ActorCritic,
        normalize_observation: bool = False,
        normalize_reward: bool = False,
        clip_reward: bool = False,
        popart: PopArt | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        advantage_estimator: Callable[..., tuple[Tensor, Tensor]] = gae,
        recompute_advantages: bool = False,
        update_epochs: int = 4,
        num_minibatches: int = 4,
        gradient_accumulation_steps: int = 1,
        sequence_length: int | None = None,
        loss: nn.Module | Callable[..., Any] | None = None,
        clip_range: float | Linear = 0.2,
        clip_range_vf: float | None = None,
        normalize_advantage: bool | Literal["all_ranks"] = True,
        ent_coef: float | Linear = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        non_finite: Literal["raise", "skip"] = "raise",
        target_kl: float | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-4, eps=1e-5, fused=True),
        lr_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        eval_interval: int | None = None,
        num_eval_episodes: int = 10,
        eval_deterministic: bool = True,
        max_env_restarts: int = 0,
        info_keys: Sequence[str] = (),
        metric_names: MetricNames = "sb3",
        env_timeout_s: float = 60.0,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        factory, wraps = plain_factory(resolve(env)), tuple(map(plain_factory, wrappers))
        super().__init__(
            EnvFactory(factory, env_kwargs or {}, wraps, vectorization, num_workers, max_env_restarts > 0),
            given,
            num_envs=num_envs,
            total_steps=total_steps,
            eval_interval=eval_interval,
            num_eval_episodes=num_eval_episodes,
            eval_deterministic=eval_deterministic,
            max_env_restarts=max_env_restarts,
            info_keys=info_keys,
            metric_names=metric_names,
            env_timeout_s=env_timeout_s,
        )
        seen = without_mask(self.observation_space)
        check_memory(rollout_memory(seen, num_steps, self.num_envs, update_epochs, num_eval_episodes))
        self.gamma, self.gae_lambda, self.num_minibatches = gamma, gae_lambda, num_minibatches
        self.clip_range_vf, self.vf_coef, self.recompute_advantages = clip_range_vf, vf_coef, recompute_advantages
        coefficients = schedule("clip_range", clip_range), schedule("ent_coef", ent_coef)
        self.schedules = Schedules(*coefficients, lr_scheduler=lr_scheduler is not None)
        self.optimizer, self.lr_scheduler = plain_factory(optimizer), plain_factory(lr_scheduler)
        self.policy = Policy(seen, self.action_space, policy, normalize_observation, popart)
        self.loss: Loss = PPOLoss() if loss is None else plain_factory(loss)
        check_callable("loss", self.loss, "batch", "evaluate", "coefficients")
        self.advantage_estimator = plain_factory(advantage_estimator)
        check_callable("advantage_estimator", self.advantage_estimator, "rollout", gamma=gamma, gae_lambda=gae_lambda)
        check_recompute(recompute_advantages, is_recurrent=bool(self.policy.state_size))
        self.reward_normalizer = RewardNormalizer(normalize=normalize_reward, sign=clip_reward, gamma=gamma)
        gradient_steps = ceil(total_steps / (num_steps * self.num_envs)) * update_epochs * num_minibatches
        compilation = Compilation.of(compile, gradient_steps, self.policy)
        self.guard = NonFiniteGuard(non_finite)
        self.updater = Updater(
            update_epochs=update_epochs,
            num_minibatches=num_minibatches,
            gradient_accumulation_steps=gradient_accumulation_steps,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            max_grad_norm=max_grad_norm,
            guard=self.guard,
            compilation=compilation,
        )
        try_schedule(*self._make_optimizer())  # refuses mistakes now; the run makes its own in configure_optimizers
        self.make_rollouts(num_steps, num_minibatches, sequence_length=sequence_length, compilation=compilation)
        # Lightning warns that it will train for 1,000 epochs; setup() replaces that limit by total_steps.
        warnings.filterwarnings("ignore", message="`max_epochs` was not set")

    # --- Lightning's hooks, in the order of a run ---------------------------------------------------------------------

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Attach our callbacks instead of Lightning's default progress bar and checkpoint; keep the user's."""
        check_supported_features(self.trainer, self)
        evaluates = self.env_factory.for_evaluation() is not None
        attach_callbacks(self.trainer, self.iterations_between_evaluations, evaluates=evaluates)
        shorten_timeout(self.trainer)  # before ranks meet
        defer_writing(self.trainer, self)
        return []

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, and the scheduler where one was given."""
        self.hyperparameters.check_trainable()
        self.policy.check_trainable()
        optimizer, scheduler = self._make_optimizer()
        if scheduler is None:
            return optimizer
        check_length(scheduler, ceil(self.total_steps / self.steps_per_iteration))
        return [optimizer], [scheduler]

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        optimizer = make_optimizer(self.optimizer, list(self.parameters()))
        return optimizer, make_scheduler(self.lr_scheduler, optimizer)

    @override
    def on_fit_start(self) -> None:
        """Begin a fit and open the run's files, since every check has passed."""
        self.begin_fit()
        self.guard.reset()
        begin_writing(self.trainer, self)

    @override
    def train_dataloader(self) -> RolloutDataset:
        """The rollouts themselves (length 1): without a DataLoader, each is collected after the last update."""
        return self.rollouts

    @override
    def on_train_start(self) -> None:
        """Resume, and prepare the updates."""
        self.resume()
        hooks = gradient_hooks(self.trainer, self, PPO)
        bypass = can_bypass_strategy(self.trainer, self.ranks) and not hooks
        backend = LightningBackend(self, self._optimizer, self.ranks, bypass=bypass)
        precision = str(self.trainer.precision)
        self.updater.prepare(
            self, self._optimizer, backend, world_size=self.ranks.world_size, hooks=hooks, precision=precision
        )

    @override
    def on_train_epoch_start(self) -> None:
        """Call the events of a new iteration and rollout."""
        call_event(self, "on_iteration_start")
        call_event(self, "on_rollout_start")

    @override
    @torch.no_grad()
    def on_train_batch_start(self, batch: TensorDict, batch_idx: int) -> None:
        """Add ``advantage`` and ``value_target`` [T, N] to the rollout, in place."""
        check_rollout(batch, self.policy_version)
        optimizer = None if self._trainer is None else self._optimizer
        if optimizer is not None:
            self.updater.refresh(optimizer)
        trained = self.updater.parameters or self.parameters()
        self.run_state.rollback.save([*trained, *dict(self.all_buffers()).values()], optimizer)
        self.trained_with_masks |= MASK in batch
        call_event(self, "on_rollout_end", batch)
        reward, done = batch["reward"], batch["terminated"] | batch["truncated"]
        self.rollouts.running_return = self.reward_normalizer.update(
            reward, done, batch["valid"], self.rollouts.running_return, self.ranks.gather
        )
        self.estimate_advantages(batch)
        if self.policy.value_normalizer is not None:
            targets = RunningMoments.batch_moments(batch["value_target"][batch["valid"]])
            self.policy.value_normalizer.merge(self.ranks.gather(targets))

    @override
    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        """Update the policy on the rollout, then count, log, and decide whether the run stops."""
        started, steps = time.perf_counter(), self.trainer.global_step
        learning_rate = self.schedules.set_learning_rate(self._optimizer, self.progress)
        call_event(self, "on_update_start", batch)
        update = self.update(batch)
        call_event(self, "on_update_end", update)
        self.count(batch, epochs=update.epochs)
        set_global_step(self.trainer, steps + 1)
        if self.lr_scheduler is not None:
            # Torch's scheduler looks for a call of the optimizer's step, which a compiled update does not make.
            cast(Any, self._optimizer)._opt_called = True
            scheduler = cast(torch.optim.lr_scheduler.LRScheduler, self.lr_schedulers())
            # Vectors that reset in a step of their own take a few more iterations than a OneCycleLR was made for.
            ends = isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR)
            if not ends or scheduler.last_epoch < scheduler.total_steps:
                scheduler.step()
        metrics = self.metrics(batch, update, seconds=time.perf_counter() - started, learning_rate=learning_rate)
        stops = self.num_env_steps >= self.total_steps or self.agreed_stop_signal in STOP_SIGNALS
        self.trainer.should_stop = self.trainer.should_stop or stops
        self.log_iteration(metrics)
        call_event(self, "on_iteration_end", metrics)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale and clip the gradients; never step on one that is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it within its step: too late for clipping
        assert self.updater.eager is not None
        self.updater.eager.clip(scaler)

    # --- steps of an iteration ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate_advantages(self, rollout: TensorDict) -> None:
        """Add ``advantage`` and ``value_target`` [T, N] to a rollout with values, in place."""
        scaled = rollout.copy().set("reward", self.reward_normalizer(rollout["reward"]))
        estimated = self.advantage_estimator(scaled, gamma=self.gamma, gae_lambda=self.gae_lambda)
        rollout["advantage"], rollout["value_target"] = check_estimates(estimated, rollout["reward"])

    def _recompute_advantages(self, rollout: TensorDict) -> dict[str, Any]:
        again = self.rollouts.with_present_values(rollout)
        self.estimate_advantages(again)
        return estimates(again, self.policy)

    @torch.no_grad()
    def training_samples(self, rollout: TensorDict) -> dict[str, Any]:
        """Samples [T · N] of a rollout, or sequences [B, L], normalised once; ``valid`` only where some do not count."""
        return training_samples(rollout, self.policy, self.rollouts.sequence_length)

    @property
    def coefficients(self) -> LossCoefficients:
        """Coefficients of the loss in this iteration, by their schedules."""
        clip_range, ent_coef = (self.schedules.at(name, self.progress) for name in ("clip_range", "ent_coef"))
        return LossCoefficients(clip_range, self.clip_range_vf, self.vf_coef, ent_coef)

    def update(self, rollout: TensorDict) -> UpdateResult:
        """Epochs of shuffled minibatches of the loss (Schulman et al. 2017, algorithm 1).

        Args:
            rollout: [T, N] with advantages.

        Raises:
            FloatingPointError: a gradient is not finite, and non_finite is raise.
        """
        try:
            samples = self.training_samples(rollout)
            recompute = partial(self._recompute_advantages, rollout) if self.recompute_advantages else None
            result = self.updater.update(
                samples, self.coefficients, self.generator, self.ranks.gather, self.schedules.changing, recompute
            )
        except NonFiniteGradient as error:
            folder = None if self._trainer is None else self.trainer.log_dir or self.trainer.default_root_dir
            message = write_dump(error, Path(folder or "."), int(self.iterations) + 1, self.ranks.rank)
            self.ranks.barrier()  # the first rank to end stops the other ranks before they have written theirs
            raise FloatingPointError(message) from None
        self.updater.warn_of_unreached()
        return result

    @torch.no_grad()
    def metrics(
        self, rollout: TensorDict, update: UpdateResult, *, seconds: float, learning_rate: float
    ) -> dict[str, float]:
        """Metrics of an iteration over all ranks; seconds are this rank's (docs/metrics.md).

        Args:
            rollout: [T, N].
            update: result of the update on it.
            seconds: duration of the update.
            learning_rate: of the first parameter group.
        """
        episodes, restarts = self.rollouts.episodes, self.env_provider.restarts.count
        return {
            **self.run_metrics(),
            **iteration_metrics(rollout, update, self.policy, episodes, restarts, self.ranks.gather),
            "time/update": seconds,
            "train/learning_rate": learning_rate,
            **self.updater.metrics(update),
            **self.schedule_metrics,
        }

    # --- what users call ----------------------------------------------------------------------------------------------

    def collect(self) -> TensorDict:
        """One rollout [T, N] with its ``advantage`` and ``value_target``; the next call overwrites it.

        For your own training loop; a Trainer calls it by itself. The first call seeds the run as ``fit`` does: by
        ``lightning.seed_everything``, else by a random seed that is kept in ``seed``.
        """
        if self.rollouts.environments is None:
            self.seed = resolve_seed(self.seed)
            self.generator.manual_seed(self._derive_seed("training"))
        rollout = self.rollouts.collect()
        self.on_train_batch_start(rollout, 0)
        return rollout

    def learn(self, rollout: TensorDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Update the policy on the rollout of :meth:`collect`, and count it.

        The learning rate falls linearly to 0, unless ``lr_scheduler`` was given: then step your own scheduler.

        Args:
            rollout: of the current policy.
            optimizer: over the model's parameters, the same one in every call.

        Returns:
            The logged metrics ``rollout/…``, ``time/…`` and ``train/…``, at ``num_env_steps``.

        Raises:
            FloatingPointError: a gradient is not finite, and non_finite is raise.
        """
        started = time.perf_counter()
        learning_rate = self.schedules.set_learning_rate(optimizer, self.progress)
        if self.updater.optimizer is optimizer:
            self.updater.refresh(optimizer)
        else:
            self.updater.prepare(self, optimizer, Backend(optimizer))
        update = self.update(rollout)
        self.count(rollout, epochs=update.epochs)
        return self.metrics(rollout, update, seconds=time.perf_counter() - started, learning_rate=learning_rate)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first parameter group, in the last update."""
        assert self.updater.optimizer is not None
        return self.updater.optimizer.param_groups[0]["lr"]


# The default optimizer is a lambda, which the command line can read and change; under a name it can be pickled too.
_adam = defaults_of(PPO)["optimizer"]
_adam.__qualname__ = "_adam"
