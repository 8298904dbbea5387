"""PPO as a LightningModule: one hook per idea, in the order in which Lightning calls them."""

import copy
import inspect
import io
import math
import os
import random
import signal
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import ceil
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.algorithm.advantage import check_estimates, gae
from ppo_lightning.algorithm.loss import Loss, LossCoefficients, PPOLoss
from ppo_lightning.algorithm.minibatches import map_samples
from ppo_lightning.algorithm.optimizer_step import NonFiniteGradient, NonFiniteGuard, TorchBackend
from ppo_lightning.algorithm.reward_normalization import RewardNormalizer
from ppo_lightning.algorithm.update import Updater, UpdateResult
from ppo_lightning.callbacks import Interrupts, begin_writing, checkpoint_paths, defer_writing
from ppo_lightning.callbacks.events import tell
from ppo_lightning.checkpoint import (
    ANNEALED,
    KEY,
    RunSettings,
    foreign_names,
    missing,
    plain_contents,
    plain_data,
    read_verified,
    refuse_fewer_epochs,
    refuse_missing,
    refuse_names,
    refuse_other_optimizer,
    refuse_other_policy,
    refuse_other_spaces,
    refuse_weights_alone,
    verified,
)
from ppo_lightning.clock import Clock
from ppo_lightning.envs import Environments, EnvMaker, Halves, Setting, Supply, resolve
from ppo_lightning.envs.info import Sums, added
from ppo_lightning.envs.info import means as means_of
from ppo_lightning.envs.state import as_tensors
from ppo_lightning.envs.streams import streams_of_their_own
from ppo_lightning.errors import InputError
from ppo_lightning.evaluation import evaluate_episodes, said, summarize
from ppo_lightning.history import Records, summarize_records
from ppo_lightning.loggers import described_run, name_of, tolerant
from ppo_lightning.metric_names import MetricNames, renamed
from ppo_lightning.metrics import merged, norms_of, row_of
from ppo_lightning.parameters import (
    LIMITS,
    ONE_OR_MORE,
    Linear,
    PopArt,
    check_length,
    check_memory,
    check_samples,
    check_sequences,
    checked,
    make_optimizer,
    make_scheduler,
    physical_memory,
    plain_factory,
    schedule,
    try_schedule,
)
from ppo_lightning.policy import ActorCritic, Policy, RunningMoments, ValueNormalizer, in_eval_mode
from ppo_lightning.prediction import predict
from ppo_lightning.resume import carry_over, described, own_state
from ppo_lightning.rollout import EpisodeStatistics, RolloutDataset
from ppo_lightning.runs.ranks import CHECK_INTERVAL, LightningBackend, Ranks, can_bypass_strategy, fingerprint
from ppo_lightning.snapshot import Snapshot
from ppo_lightning.spaces import MASK, check_mask, describe, leaves, storage, without_mask
from ppo_lightning.streams import random_state, restore_random_state
from ppo_lightning.trainer import (
    attach_callbacks,
    begin_iterations_whole,
    find_checkpoints,
    gradient_hooks,
    log_over_environment_steps,
    refuse_longer_run,
    refuse_unsupported,
    refuse_what_misleads,
    replace_defaults,
    restore_modes,
    set_global_step,
    shorten_timeout,
    take_averages_out,
)


class PPO(LightningModule):
    """Proximal Policy Optimisation (Schulman et al. 2017) that trains on ``Trainer.fit``.

    One epoch is one policy iteration: a rollout of ``num_steps`` steps in each environment, its advantages, and
    ``update_epochs`` passes of shuffled minibatches over it. ``total_steps`` is the only budget.

    Values have the types below: a bool is no number, and a string is neither. A float that is whole is accepted as a whole
    number (``total_steps=1e6``), and NumPy and torch scalars become plain numbers.

    Args:
        env: Gymnasium id ("module:Id-v0" imports the module first), a VectorEnv, or a callable that makes one (or one
            single environment); in YAML a class by class_path, or a function as package.module.name. A VectorEnv's own
            number of environments wins over num_envs.
        env_kwargs: arguments for gymnasium.make, or for the callable.
        wrappers: Gymnasium wrappers by class_path, around each environment, innermost first.
        num_envs: environments per process that are stepped together (count).
        vectorization: how environments run: sync (one after another, in this process), async (one worker process
            each), vector_entry_point (the environment's own vectorised version).
        num_steps: steps of each environment per rollout (steps).
        total_steps: environment steps to train for, over all environments and processes, rounded up to whole
            iterations; every schedule runs on it (steps).
        policy: class_path or callable (observation_space, action_space) -> network, whose forward maps observations
            [B, …] to distribution parameters [B, P] and values [B]. The default, ActorCritic, has encoders for pictures
            and Dict observations, memory, and several distributions as options.
        normalize_observation: subtract the running mean of observations, divide by their standard deviation, clip at
            ±10; of a Dict the parts that are numbers, pictures never.
        normalize_reward: divide rewards by the standard deviation of the discounted return, clip at ±10; reported
            returns stay in the environment's units.
        clip_reward: learn from the sign of rewards, -1, 0 or 1, as is the custom for Atari; reported returns stay in the
            environment's units.
        popart: {beta} normalises what the critic learns while preserving its output; null does not.
        gamma: discount factor (per environment step, 0 to 1).
        gae_lambda: how far advantages look ahead: 0 is the one-step TD error, 1 the whole return (dimensionless, 0 to 1).
        advantage_estimator: callable (rollout [T, N], *, gamma, gae_lambda) -> (advantage [T, N], value target [T, N]); in
            YAML a function as package.module.name, or a class by class_path. ``reward`` is as it is learnt from.
        update_epochs: passes over each rollout (count).
        num_minibatches: pieces into which each pass cuts the rollout (count).
        gradient_accumulation_steps: parts in which the gradient of a minibatch is accumulated, for one that does not fit into
            memory whole; the step is the same (count).
        sequence_length: of a policy with memory, the steps into which rollouts are cut, so that minibatches keep time
            whole; null is num_steps (steps).
        loss: module or callable (batch, evaluate, coefficients) -> scalars by name, of which loss is minimised and all are
            logged as train/…; null is PPOLoss. Its parameters are trained with the policy's (docs/changing_the_algorithm.md).
        clip_range: change of an action's probability ratio beyond which the objective pays no more; a number, or
            {start, end} for a line over the run (dimensionless).
        clip_range_vf: change of a value beyond which the critic is not pulled, in (normalised) reward units; null does
            not clip.
        normalize_advantage: give the advantages of each minibatch mean 0 and standard deviation 1: true by those of
            each process's own samples, all_ranks by those of all processes' together, so that it makes no difference how
            many processes there are. In one process both are the same.
        ent_coef: weight of the entropy bonus; a number, or {start, end} for a line over the run (advantage units per
            nat).
        vf_coef: weight of the critic's mean squared error in the loss (dimensionless).
        max_grad_norm: gradients are scaled down to this Euclidean norm over all parameters; null does not clip.
        non_finite: what to do about a gradient whose norm is not finite: raise ends the run, with a file to reproduce it
            and the parameters as they were before; skip leaves the step out, 10 in a row at most.
        target_kl: end an update, before the step, when the approximate KL divergence exceeds 1.5 times this (nats);
            null never does.
        optimizer: class_path or callable parameters -> optimizer; its learning rate falls linearly to 0 over
            total_steps unless lr_scheduler is given.
        lr_scheduler: class_path or callable optimizer -> scheduler, stepped once per iteration (ConstantLR with factor
            1 keeps the learning rate); null is linear to 0.
        eval_interval: iterations between evaluations; null makes 20 evaluations over the run.
        num_eval_episodes: episodes of each evaluation, exactly (count).
        eval_deterministic: evaluate the most probable action instead of drawing one.
        env_restarts: how often environments that raise, or whose worker processes die or hang, may be made anew in one
            run of this process, their episodes cut there; 0 ends the run (count).
        log_info: keys of the environments' info whose numbers are logged as env/…, beside reward_components, rewards, log
            and metrics, which are logged where they are given.
        metric_names: whose names loggers receive: sb3, cleanrl, leanrl, apexrl, pufferlib or embodichain, with that
            system's signs and scales; monitors and reports keep Stable-Baselines3's.
        env_timeout_s: a step or reset of async environments that takes longer is an error (seconds).
        compile: run each gradient step, and the rollouts of environments that are tensors, as one compiled graph:
            several times as fast for small networks, after some ten seconds of compilation.

    Raises:
        InputError: a value cannot be used; the sentence says which, and what to do.
    """

    policy: Policy
    env_steps: Tensor
    iterations: Tensor
    n_updates: Tensor

    @checked(skip=["env"], **LIMITS)
    def __init__(
        self,
        env: str | Callable[..., VectorEnv] | Callable[..., gym.Env] | VectorEnv,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[Callable[[gym.Env], gym.Env]] = (),
        num_envs: int = 8,
        vectorization: Literal["sync", "async", "vector_entry_point"] = "sync",
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
        env_restarts: int = 0,
        log_info: Sequence[str] = (),
        metric_names: MetricNames = "sb3",
        env_timeout_s: float = 60.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        given = {name: value for name, value in locals().items() if name in _PARAMETERS}
        self.env_maker = EnvMaker(
            plain_factory(resolve(env)),
            env_kwargs or {},
            tuple(map(plain_factory, wrappers)),
            vectorization,
            restarts=env_restarts > 0,
        )
        self._remember_hyperparameters(given)
        self.supply = Supply(
            self.env_maker,
            num_envs,
            timeout_s=env_timeout_s,
            restarts=env_restarts,
            log_info=tuple(log_info),
        )
        self.observation_space, self.action_space = self.supply.observation_space, self.supply.action_space
        check_mask(self.observation_space, self.action_space)
        seen = without_mask(self.observation_space)
        self.num_envs = self.supply.num_envs
        self.num_steps = num_steps
        self.total_steps = total_steps
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.update_epochs = update_epochs
        self.num_minibatches = num_minibatches
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clip_range = schedule("clip_range", clip_range)
        self.clip_range_vf = clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.ent_coef = schedule("ent_coef", ent_coef)
        self.vf_coef = vf_coef
        self.max_grad_norm = max_grad_norm
        self.guard = NonFiniteGuard(non_finite)
        self.target_kl = target_kl
        self.lr_schedule: Linear | None = None
        """Learning rate by callbacks that steer, in the place of the line from the optimiser's own to 0."""
        self.steered: dict[str, float] = {}
        """What callbacks that steer log with each iteration."""
        self.optimizer = plain_factory(optimizer)
        self.lr_scheduler = plain_factory(lr_scheduler)
        self.eval_interval = eval_interval
        self.num_eval_episodes = num_eval_episodes
        self.eval_deterministic = eval_deterministic
        self.restarts = self.supply.restarts
        self.log_info = tuple(log_info)
        self.metric_names = metric_names
        self.env_timeout_s = env_timeout_s
        self.compiles = compile
        check_samples(self.num_steps, self.num_envs, self.num_minibatches)
        check_memory(self._memory_needs())

        self.policy = Policy(seen, self.action_space, policy, normalize_observation, popart)
        self.loss: Loss = PPOLoss() if loss is None else plain_factory(loss)
        self.advantage_estimator = plain_factory(advantage_estimator)
        self.sequence_length = self._sequences_of(sequence_length, self.num_steps)
        self.reward_normalizer = RewardNormalizer(normalize=normalize_reward, sign=clip_reward, gamma=gamma)
        self.updater = Updater(
            self.policy,
            self.loss,
            update_epochs=update_epochs,
            num_minibatches=num_minibatches,
            gradient_accumulation_steps=gradient_accumulation_steps,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            max_grad_norm=max_grad_norm,
            guard=self.guard,
            compile=compile,
        )
        self.register_buffer("env_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

        try_schedule(*self._make_optimizer())  # refuses mistakes now; the run makes its own in configure_optimizers

        self.seed: int | None = None
        self.generator = torch.Generator()
        self.rollouts = RolloutDataset(self, self.num_steps, seen)
        self._goes_on: list[dict[str, Any]] | None = None
        """State of each process of the run that goes on here, until training starts."""
        self._before = Snapshot()
        self.ranks = Ranks()
        self._without_others = False
        self.signalled: signal.Signals | None = None
        """The signal that asked this process to end."""
        self.interrupted: signal.Signals | None = None
        """The signal by which the run ends, as all processes have agreed."""
        self._paused: dict[str, Any] | None = None
        """State of the optimiser and of this process after the last fit."""
        self._clock = Clock()
        self.run_folder: Path | None = None
        """Where the last fit kept its files, which another fit of this model may replace."""
        self.records = Records()
        """What the run was like so far; kept by :class:`~ppo_lightning.callbacks.RunSummary`."""
        self._was_scheduled = True
        self._trained_with_masks = self._said_that_masks_miss = False
        self._resumed: dict[str, Any] | None = None
        """The checkpoint that a fit resumes, until it has its optimizer."""
        self._saved_logs = 0.0
        self.learning_rate = 0.0
        """Of the update that is logged."""
        # Lightning warns that it will train for 1,000 epochs; setup() replaces that limit by total_steps.
        warnings.filterwarnings("ignore", message="`max_epochs` was not set")

    # --- Lightning's hooks, in the order of a run ---------------------------------------------------------------------

    @LightningModule.trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Attach a Trainer, and let it find the checkpoints of earlier runs."""
        cast(Any, LightningModule.trainer).fset(self, trainer)
        self.ranks = Ranks(trainer)
        if isinstance(trainer, Trainer):
            find_checkpoints(trainer)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """What every run needs: the bar, best and last checkpoint, and the end of all simulators.

        Lightning's own default bar and checkpoint give way; callbacks that the user made stay.
        """
        refuse_unsupported(self.trainer, self)
        attach_callbacks(
            self.trainer, self.iterations_between_evaluations, evaluates=self.env_maker.again() is not None
        )
        shorten_timeout(self.trainer)  # before processes meet
        defer_writing(self.trainer, self)
        return []

    @override
    def setup(self, stage: str) -> None:
        """Agree on a seed, refuse what would mislead, and replace Lightning's defaults by those that suit PPO."""
        trainer: Any = self.trainer
        trainer.strategy.checkpoint_io = verified(trainer.strategy.checkpoint_io)
        trainer.loggers = [tolerant(logger) for logger in trainer.loggers]
        log_over_environment_steps(trainer)
        self.seed = trainer.strategy.broadcast(self._known_seed())
        if stage != "fit":
            return
        refuse_what_misleads(trainer, running_moments=bool(self.policy.moments or self.reward_normalizer.moments))
        remaining = self.total_steps - self.num_env_steps
        refuse_longer_run(trainer, ceil(remaining / (self.num_steps * self.num_envs * self.ranks.world_size)))
        self._check_val_every_n_epoch = trainer.check_val_every_n_epoch
        replace_defaults(trainer, self.iterations_between_evaluations)
        if self.env_maker.again() is None:
            rank_zero_info(
                f"no evaluations: {self.env_maker.name} was given as a VectorEnv, and evaluation needs environments of its "
                "own; give a callable that makes it instead"
            )
            trainer.limit_val_batches = 0

    @override
    def configure_optimizers(self) -> Any:
        """The optimiser over all parameters, and the scheduler where one was given."""
        if self._missing:
            raise missing(self._missing[0])
        if not self.policy.halves.any():
            raise InputError(
                f"the outputs of the network {type(self.policy.network).__name__} depend on none of its parameters that "
                "learn: there is nothing to train"
            )
        optimizer, scheduler = self._make_optimizer()
        if scheduler is not None:
            check_length(scheduler, ceil(self.total_steps / (self.num_steps * self.num_envs * self.ranks.world_size)))
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        optimizer = make_optimizer(self.optimizer, list(self.parameters()))
        return optimizer, make_scheduler(self.lr_scheduler, optimizer)

    @override
    def on_fit_start(self) -> None:
        """Seed this process's own stream, and leave at once where nothing is left to train."""
        scheduler = next((config.scheduler for config in self.trainer.lr_scheduler_configs), None)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            refuse_other_optimizer(resumed, self._optimizer, scheduler)
        rank_zero_info(f"seed {self.seed}")
        self._hparams_initial = self._described()  # which Lightning gives to loggers next
        self._settings = RunSettings(self._optimizer, scheduler)
        self.generator.manual_seed(self._stream("training", self.num_env_steps))
        self.restarts.count = 0
        self.guard.reset()
        self._clock = Clock()
        if self.num_env_steps >= self.total_steps:
            rank_zero_info(
                f"{self.num_env_steps:,} environment steps are trained already, total_steps is {self.total_steps:,}: "
                "raise total_steps to go on"
            )
            self.trainer.should_stop = True
        begin_writing(self.trainer, self)

    @override
    def on_train_epoch_start(self) -> None:
        """Tell that an iteration begins, and with it a rollout."""
        self._tell("on_iteration_start")
        self._tell("on_rollout_start")

    @override
    def train_dataloader(self) -> RolloutDataset:
        """The rollouts themselves: sized (1), no DataLoader, so that each is collected after the last update."""
        return self.rollouts

    @override
    def on_train_start(self) -> None:
        """Go on where the run was; find out whether a gradient step concerns anybody else."""
        begin_iterations_whole(self.trainer, self.policy_version)
        self._go_on()
        self._settings.restore(scheduled=self._was_scheduled)
        hooks = gradient_hooks(self.trainer, self, PPO)
        self.ranks.share_memory([one for group in self._optimizer.param_groups for one in group["params"]])
        bypass = can_bypass_strategy(self.trainer, self.ranks) and not hooks
        self.updater.prepare(
            self,
            self._optimizer,
            LightningBackend(self, self._optimizer, self.ranks, bypass=bypass),
            world_size=self.ranks.world_size,
            hooks=hooks,
            precision=str(self.trainer.precision),
        )

    @override
    @torch.no_grad()
    def on_train_batch_start(self, batch: TensorDict, batch_idx: int) -> None:
        """Add ``advantage`` and ``value_target`` [T, N] to the rollout, in place."""
        if not (isinstance(batch, TensorDict) and "policy_version" in batch):
            raise InputError(
                f"training got a batch of another loader ({type(batch).__name__}), and PPO collects its own rollouts: leave "
                "train_dataloaders out of Trainer.fit"
            )
        optimizer = None if self._trainer is None else self._optimizer
        if optimizer is not None:
            self.updater.follow(optimizer)
        trained = self.updater.parameters or self.parameters()
        self._before.keep([*trained, *dict(super().named_buffers()).values()], optimizer)
        if batch["policy_version"] != self.policy_version:
            raise InputError(
                f"the rollout was collected with policy {batch['policy_version']}, this is policy {self.policy_version}: "
                "something fetched it ahead of the update; pass train_dataloader() on as it is, in no DataLoader"
            )
        self._trained_with_masks |= MASK in batch
        self._tell("on_rollout_end", batch)
        done = batch["terminated"] | batch["truncated"]
        self.rollouts.discounted = self.reward_normalizer.update(
            batch["reward"], done, batch["valid"], self.rollouts.discounted, self.ranks.gather
        )
        learnt_from = batch.copy().set("reward", self.reward_normalizer(batch["reward"]))
        estimates = self.advantage_estimator(learnt_from, gamma=self.gamma, gae_lambda=self.gae_lambda)
        batch["advantage"], batch["value_target"] = check_estimates(estimates, batch["reward"])
        if self.policy.value_normalizer is not None:
            targets = RunningMoments.batch_moments(batch["value_target"][batch["valid"]])
            self.policy.value_normalizer.merge(self.ranks.gather(targets))

    @override
    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        """Update the policy on the rollout; then count, log, and say when to stop."""
        started, steps = time.perf_counter(), self.trainer.global_step
        self.anneal(self._optimizer)
        self.learning_rate = self._optimizer.param_groups[0]["lr"]
        self._tell("on_update_start", batch)
        update = self.update(batch)
        self._tell("on_update_end", update)
        self.count(batch, update.epochs)
        self.rollouts.pending = False
        self._before.forget()
        set_global_step(self.trainer, steps + 1)
        if self.lr_scheduler is not None:
            # Torch's scheduler looks for a call of the optimizer's step, which a compiled update does not make.
            cast(Any, self._optimizer)._opt_called = True
            cast(torch.optim.lr_scheduler.LRScheduler, self.lr_schedulers()).step()
        metrics = self.metrics(batch, update, seconds=time.perf_counter() - started)
        self.log_metrics(metrics)
        self._tell("on_iteration_end", metrics)
        if self.num_env_steps >= self.total_steps:
            self.trainer.should_stop = True
        if self.interrupted in Interrupts.SIGNALS:
            self.trainer.should_stop = True
            self.trainer.check_val_every_n_epoch = sys.maxsize  # there is no time for an evaluation
        elif self.trainer.should_stop or self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1  # the final policy is evaluated, whatever the interval

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, unscaled by now in any precision; never step on one that is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimiser would do it within its step: too late for clipping
        assert self.updater.eager is not None
        self.updater.eager.clip(scaler)

    @override
    def on_fit_end(self) -> None:
        """Give the Trainer back the evaluation interval that it came with; keep what another fit goes on from."""
        self.trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        self._pause()

    @override
    def val_dataloader(self) -> Sequence[int]:
        """One batch: one evaluation."""
        return range(1)

    @override
    def test_dataloader(self) -> Sequence[int]:
        """One batch: one evaluation."""
        return range(1)

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Evaluate on environments of its own, and log ``eval/…`` at the current environment step."""
        self._log_evaluation("evaluation")

    def _log_evaluation(self, purpose: str) -> None:
        started = time.perf_counter()
        try:
            statistics = self._evaluate(self.num_eval_episodes, self.eval_deterministic, purpose)
        except BaseException:
            take_averages_out(self.trainer)
            raise
        # All processes have gathered the same statistics; sync_dist tells Lightning so.
        renames = bool(self.loggers) and self.metric_names != "sb3"
        self.log_dict(statistics, sync_dist=self.trainer.world_size > 1, logger=False if renames else None)
        if renames:
            self.send(statistics)
        self.leave_out(time.perf_counter() - started)

    @override
    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """As Lightning's; an iteration and an evaluation are one batch each, so that no size has to be found in a rollout."""
        super().log(name, value, *args, batch_size=batch_size or 1, **kwargs)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Give loggers and monitors more numbers of this iteration; a ``self.log`` of each costs more than an update.

        Args:
            metrics: under our names, the same in all processes.
            step: environment steps that they are of; None is now.
        """
        self.send(metrics, step)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)  # one by one they take five times as long
        self.trainer.callback_metrics.update(zip(metrics, values.unbind(), strict=True))

    def send(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Give loggers metrics under the names that are wanted.

        Args:
            metrics: under our names.
            step: environment steps that they are of; None is now.
        """
        numbers = {name: value for name, value in metrics.items() if not math.isnan(value)}
        named = renamed(numbers, self.metric_names)
        late = time.monotonic() - self._saved_logs >= LOGS_SAVED_S
        for logger in self.loggers:
            logger.log_metrics(named, step=self.num_env_steps if step is None else step)
            if late:  # Lightning's CSVLogger would keep all rows in memory
                logger.save()
        if late:
            self._saved_logs = time.monotonic()

    def _tell(self, event: str, *given: Any) -> None:
        if self._trainer is not None:
            tell(self.trainer, self, event, *given)

    @override
    def test_step(self, batch: int, batch_idx: int) -> None:
        """The same as a validation, over other episodes: those of validations have chosen the best checkpoint."""
        self._log_evaluation("test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a policy needs beyond weights: what it was trained on, and with which seed."""
        checkpoint["hyper_parameters"]["total_steps"] = self.total_steps  # it may have been raised since
        # A callback may have put averages in the place of weights; counters and statistics are those of the run.
        weights = dict(
            [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        ).keys()
        own = {name: value for name, value in self.state_dict().items() if name not in weights}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **own}
        own = self._run_state()
        states = [own]
        if self.ranks.world_size > 1 and not self._without_others:  # every process comes here, one of them writes
            states = [own] * self.ranks.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[KEY] = {
            "processes": as_tensors(states),
            "observation_space": describe(self.observation_space),
            "action_space": describe(self.action_space),
            "distribution": self.policy.distribution.describe(),
            "optimizer": [type(one).__name__ for one in self.trainer.optimizers],
            "lr_scheduler": [type(config.scheduler).__name__ for config in self.trainer.lr_scheduler_configs],
            "seed": self.seed,
            "episodes": list(self.rollouts.episodes.window),
            "not_saved": self._not_saved,
            "masked": self._trained_with_masks,
        }

    @override
    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers that are weights: all but counters, other whole numbers, and running statistics.

        What averages or exchanges weights (``WeightAveraging``, ``AveragedModel``) walks through ``parameters()`` and
        ``buffers()``. The average of a counter is no counter, and moments fit no other count. ``state_dict`` has all.
        """
        kinds = RunningMoments | ValueNormalizer
        statistics = [one for module in self.modules() if isinstance(module, kinds) for one in module.buffers()]
        left_out = {id(one) for one in statistics}
        for name, one in super().named_buffers(prefix, recurse, remove_duplicate):
            if one.is_floating_point() and id(one) not in left_out:
                yield name, one

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint for other spaces before its weights are touched.

        Raises:
            InputError: the checkpoint is not ours, or its spaces differ from the environment's.
        """
        ours = refuse_other_spaces(checkpoint, self.observation_space, self.action_space, self.env_maker.name)
        self._missing = refuse_missing(ours, _passed.get().union(self._given))
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if not fits and not any(name.startswith("loss.") for name in self.state_dict()):  # to act without it
            weights = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: one for name, one in weights if not name.startswith("loss.")}
        refuse_other_policy(checkpoint, self.state_dict(), self.policy.distribution.describe())
        if fits:
            refuse_weights_alone(checkpoint)
            refuse_fewer_epochs(checkpoint, self.trainer.max_epochs)
            self._resumed = checkpoint
        self._was_scheduled = bool(checkpoint.get("lr_schedulers"))
        self._trained_with_masks = ours.get("masked", False)
        self._goes_on, self._paused = ours["processes"], None
        if "PL_GLOBAL_SEED" not in os.environ:  # else seed_everything has been asked for another
            self.seed = ours["seed"]
        self.rollouts.episodes.window.clear()
        self.rollouts.episodes.window.extend(tuple(episode) for episode in ours["episodes"])

    def rewind(self) -> None:
        """Take back what an update or an evaluation that did not end has changed: the end of an iteration is saved."""
        restore_modes(self.trainer)
        self._before.restore()
        self._pause()

    def _pause(self) -> None:
        """Keep what another fit of this model goes on from."""
        if self.trainer.optimizers:
            never_begun, self._goes_on = self._goes_on, None
            begun = never_begun is None or len(never_begun) != self.ranks.world_size
            self._paused = {
                "optimizer": copy.deepcopy(self._optimizer.state_dict()),
                "parameters": [one for group in self._optimizer.param_groups for one in group["params"]],
                "kind": type(self._optimizer),
                "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
                **(self._run_state() if begun else cast(Any, never_begun)[self.ranks.rank]),
            }
            self.rollouts.saved = self._paused["rollouts"]

    @contextmanager
    def without_others(self) -> Iterator[None]:
        """Save the state of this process alone: of other processes, environments and random numbers begin anew."""
        self._without_others = True
        try:
            yield
        finally:
            self._without_others = False

    def _run_state(self) -> dict[str, Any]:
        """What this process's next rollout depends on, besides the module and its optimiser."""
        return {
            "environment": described(self.hparams, self.num_envs),
            "random": random_state(self.generator),
            "rollouts": self.rollouts.state(),
        }

    def _go_on(self) -> None:
        """Take up the random streams, environments and episodes of the run that goes on."""
        states, self._goes_on = self._goes_on, None
        paused, self._paused = self._paused, None
        if paused is not None:
            states = [paused] * self.ranks.world_size  # each process has its own
            if type(self._optimizer) is paused["kind"]:
                carry_over(paused["optimizer"], paused["parameters"], self._optimizer)
            else:
                kind = type(self._optimizer).__name__
                rank_zero_info(
                    f"the last fit used {paused['kind'].__name__}, this one uses {kind}: it starts without state"
                )
            for config, state in zip(self.trainer.lr_scheduler_configs, paused["schedulers"], strict=False):
                if state.keys() == config.scheduler.state_dict().keys():
                    config.scheduler.load_state_dict(state)
        if states is None:
            return
        self.rollouts.saved = None
        own = own_state(states, self.ranks.rank, self.ranks.world_size, described(self.hparams, self.num_envs))
        if own is None:
            return
        restore_random_state(own["random"], self.generator)
        self.rollouts.saved = own["rollouts"]
        if own["rollouts"] is None:
            rank_zero_info(
                f"environments begin anew: {self.env_maker.name} has no get_state and set_state, or was saved within a rollout"
            )

    # --- the parts of a training step ---------------------------------------------------------------------------------

    def update(self, rollout: TensorDict) -> UpdateResult:
        """Epochs of shuffled minibatches of the loss (Schulman et al. 2017, algorithm 1).

        Args:
            rollout: [T, N] with advantages.

        Raises:
            FloatingPointError: a gradient is not finite, and such steps are not skipped.
        """
        try:
            samples = self.training_samples(rollout)
            result = self.updater.update(samples, self.coefficients, self.generator, self.ranks.gather)
        except NonFiniteGradient as error:
            raise FloatingPointError(self._dump_non_finite(error)) from None
        self.updater.warn_of_unreached()
        return result

    @property
    def coefficients(self) -> LossCoefficients:
        """Of the loss in this iteration, where their schedules are."""
        progress = self.progress_share
        return LossCoefficients(
            clip_range=self.clip_range.at(progress),
            clip_range_vf=self.clip_range_vf,
            vf_coef=self.vf_coef,
            ent_coef=self.ent_coef.at(progress),
        )

    def anneal(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this iteration, where no scheduler does: from its initial value linearly to 0.

        Where a callback steers it, it is the rate of the first parameter group; others keep their ratio to that one. A
        group whose rate something else has set since the last iteration keeps it: the optimizer notes so, and checkpoints
        with it.

        Raises:
            InputError: a callback steers the rate, and something else has set it too.
        """
        if self.lr_schedule is None and self.lr_scheduler is not None:
            return
        for index, group in enumerate(optimizer.param_groups):
            group.setdefault("initial_lr", group["lr"])
            if group.setdefault(ANNEALED, group["lr"]) not in (None, group["lr"]):
                if self.lr_schedule is not None:
                    raise InputError(
                        f"two callbacks set the learning rate of parameter group {index}: {group[ANNEALED]:g} was set by "
                        f"Stages, AdaptiveLearningRate or HealthMonitor, and {group['lr']:g} by another one; remove one"
                    )
                group[ANNEALED] = None
                rank_zero_info(
                    f"the learning rate of parameter group {index} was set to {group['lr']:g} by a callback: the linear "
                    "schedule ends here, and the rate stays what callbacks set"
                )
            if group[ANNEALED] is None:
                continue
            if self.lr_schedule is None:
                rate = group["initial_lr"] * (1 - self.progress_share)
            else:
                ratio = group["initial_lr"] / optimizer.param_groups[0]["initial_lr"]
                rate = self.lr_schedule.at(self.progress_share) * ratio
            group["lr"] = group[ANNEALED] = rate

    @torch.no_grad()
    def training_samples(self, rollout: TensorDict) -> dict[str, Any]:
        """Samples [T · N] of a rollout, or of a recurrent policy its sequences [B, L], by the rollout's keys.

        ``observation`` is what the network sees and values are as the loss compares them: normalised once, not per epoch.
        ``valid`` is there only where some samples do not count.
        """
        keys = [key for key in rollout.keys() if key not in ("observation", "policy_version")]  # noqa: SIM118
        samples = rollout.select(*keys).flatten().to_dict()
        samples["observation"] = self.policy.features(rollout["observation"].flatten(0, 1))
        if self.policy.value_normalizer is not None:
            for key in ("value_target", "state_value"):
                samples[key] = self.policy.value_normalizer.normalize(samples[key])
        if bool(samples["valid"].all()):
            del samples["valid"]
        if self.policy.state_size:
            length, num_envs = cast(int, self.sequence_length), rollout.shape[1]
            samples = map_samples(lambda leaf: to_sequences(leaf, length, num_envs), samples)
        return samples

    def _dump_non_finite(self, error: NonFiniteGradient) -> str:
        """Write what a gradient was computed from, as plain tensors; a sentence about it."""
        trainer, iteration = self._trainer, int(self.iterations) + 1
        folder = Path("." if trainer is None else trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.ranks.rank
        file = folder / ("non_finite.pt" if rank == 0 else f"non_finite_rank_{rank}.pt")
        torch.save({"norm": error.norm, "iteration": iteration, **error.contents}, file)
        self.ranks.barrier()  # the first process to end stops the others before they have written theirs
        times = f" {error.consecutive} times in a row" if error.consecutive > 1 else ""
        return (
            f"the gradient's norm is {error.norm}{times} in iteration {iteration}, the step was not taken: lower the learning "
            "rate, or look for observations or rewards of extreme size (normalize_observation, normalize_reward); "
            f"{file} holds what it was computed from"
        )

    @torch.no_grad()
    def count(self, batch: TensorDict, epochs: int) -> None:
        """Take in the rollout: steps and episodes of all processes, and the moments of its observations."""
        valid = batch["valid"]
        if self.policy.moments is not None:
            seen = self.policy.numbers(batch["observation"][valid])
            self.policy.moments.merge(self.ranks.gather(RunningMoments.batch_moments(seen)))
        self.iterations += 1
        self.n_updates += epochs
        compares = self.ranks.world_size > 1 and self.policy_version % CHECK_INTERVAL == 0
        # One gather for all that is counted: some numbers, then the newest episodes, padded to a full window.
        window = EpisodeStatistics.WINDOW
        episodes = self.rollouts.episodes
        finished = torch.cat([episodes.finished, episodes.steps[:, None]], 1)[-window:]
        prints = fingerprint(self.updater.parameters) if compares else (0, 0)
        says = bool(self.rollouts.logged)
        numbers = [int(valid.sum()), len(finished), self.signalled or 0, *prints, says]
        packed = torch.zeros(len(numbers) + 5 * window, dtype=torch.float64)  # on the CPU: not every device has float64
        packed[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        packed[len(numbers) : len(numbers) + finished.numel()] = finished.flatten()
        rows = self.ranks.gather(packed).view(-1, len(packed))
        for row in rows:
            self.env_steps += int(row[0])
            if row[2]:
                self.interrupted = signal.Signals(int(row[2]))
        ended = torch.cat([row[len(numbers) :].view(window, 5)[: int(row[1])] for row in rows])
        if self.ranks.world_size > 1:  # as of one process: by step, then environment
            ended = ended[ended[:, 4].argsort(stable=True)]
        episodes.record(ended[:, :4])
        if compares:
            self.ranks.check_in_sync(rows[:, 3:5], self.policy_version)
        if rows[:, 5].any():
            self.rollouts.logged = added(self.ranks.gather_objects(self.rollouts.logged))

    @torch.no_grad()
    def metrics(self, batch: TensorDict, update: UpdateResult, seconds: float) -> dict[str, float]:
        """What is logged of an iteration: of all processes, but for seconds, which are this one's (docs/metrics.md).

        Args:
            batch: the rollout.
            update: what was done with it.
            seconds: how long that took.
        """
        std = self.policy.std(batch[-1]) if self.policy.distribution.has_std else None
        clipped = self.policy.distribution.clipped(batch["action"])
        row = row_of(batch, update, std, self.rollouts.episodes.finished, self.restarts.count, clipped)
        episodes = self.rollouts.episodes.means()
        metrics = {
            **episodes,
            **means_of(self.rollouts.logged),
            **self._clock.iterated(self.num_env_steps),
            **merged(self.ranks.gather(row).view(self.ranks.world_size, -1), update.names),
            **norms_of(update),
            "time/iterations": int(self.iterations),
            "time/total_timesteps": self.num_env_steps,
            "time/collect": self.rollouts.collect_seconds,
            "time/update": seconds,
            "train/clip_range": update.coefficients.clip_range,
            "train/learning_rate": self.learning_rate,
            "train/n_updates": int(self.n_updates),
            **self.steered,
        }
        absent = {
            "rollout/successes": "rollout/success_rate" not in episodes,
            "rollout/failures": "rollout/fail_rate" not in episodes,
            "time/env_restarts": not metrics["time/env_restarts"],
            "train/std": std is None,
            "rollout/clipped_actions": clipped is None,
        }
        for name in absent:
            if absent[name]:
                del metrics[name]
        if self.guard.skipped:
            metrics["train/skipped_steps"] = self.guard.skipped
        if update.coefficients.clip_range_vf is not None:
            metrics["train/clip_range_vf"] = update.coefficients.clip_range_vf
        if self.target_kl is not None:
            metrics["train/early_stopped"] = float(update.stopped)
        return metrics

    # --- what the outside asks ----------------------------------------------------------------------------------------

    @property
    def num_env_steps(self) -> int:
        """Environment steps trained on so far, over all environments and processes."""
        return int(self.env_steps)

    @property
    def policy_version(self) -> int:
        """Number of updates that made the policy what it is."""
        return int(self.iterations)

    @property
    def progress_share(self) -> float:
        """Share of ``total_steps`` that is behind, 0 to 1."""
        return min(1.0, self.num_env_steps / self.total_steps)

    @property
    def iterations_between_evaluations(self) -> int:
        """``eval_interval``, or what makes 20 evaluations over the run."""
        if self.eval_interval is not None:
            return self.eval_interval
        return max(1, ceil(self.total_steps / (self.num_steps * self.num_envs * self.ranks.world_size)) // 20)

    @property
    def steps_per_eval_episode(self) -> int:
        """Steps that an evaluation episode may take where the environment has no time limit.

        All episodes together take no more steps than the training between two evaluations.
        """
        steps = self.iterations_between_evaluations * self.num_steps * self.num_envs * self.ranks.world_size
        return steps // self.num_eval_episodes

    def progress(self) -> dict[str, str]:
        """What the progress bar shows beside the steps."""
        shown = {}
        if self._clock.fps is not None:
            shown["fps"] = f"{self._clock.fps:,.0f}"
        mean = self.rollouts.episodes.means().get("rollout/ep_rew_mean")
        if mean is not None:
            shown["return"] = f"{mean:.4g}"
        return shown

    def summary(self) -> dict[str, Any]:
        """The run so far, its parts before resuming included: steps, seconds, metrics and their histories, checkpoints.

        Returns:
            EmbodiChain's keys and ApexRL's, as :func:`~ppo_lightning.history.summarize_records` has them.
        """
        return summarize_records(
            self.records,
            env_steps=self.num_env_steps,
            iterations=self.policy_version,
            episodes=self.rollouts.episodes.window,
            **checkpoint_paths(self._trainer),
        )

    def predict(
        self,
        observation: Any,
        deterministic: bool = True,
        state: Any = None,
        action_mask: Any = None,
    ) -> Any:
        """Action for one observation, or actions for a batch of them; numpy in, numpy out, as the environment takes them.

        A policy with memory returns the pair (action, state): pass the state on with the next observation of the
        episode, and None with the first.

        Args:
            observation: [*shape], or [B, *shape] of the observation space, unnormalised; of a Dict or Tuple the parts.
            deterministic: the most probable action; else one is drawn, with torch's global generator.
            state: of the memory, as the call before returned it; None at the start of an episode.
            action_mask: [M], or [B, M], 1 or True where an action is allowed, else 0 or False; one that is part of the
                observation is read from there. Without one all actions are allowed, with one warning where the policy
                was trained with masks.

        Raises:
            InputError: the observation, state or mask is not of its space, or fits neither.
        """
        is_masked = action_mask is not None or without_mask(self.observation_space) is not self.observation_space
        if self._trained_with_masks and not is_masked and not self._said_that_masks_miss:
            self._said_that_masks_miss = True
            rank_zero_warn(
                f"predict got no action_mask, though the policy was trained with masks of {self.env_maker.name}: all actions "
                "are allowed, also those that are impossible; pass action_mask as the environment gives it"
            )
        with in_eval_mode(self.policy), self.autocast():
            return predict(
                self.policy,
                self.observation_space,
                self.action_space,
                observation,
                deterministic=deterministic,
                state=state,
                action_mask=action_mask,
            )

    @checked(num_episodes=ONE_OR_MORE)
    def evaluate(self, num_episodes: int | None = None, deterministic: bool | None = None) -> dict[str, float]:
        """Run exactly ``num_episodes`` episodes on environments of their own, shared among all processes.

        Training is not disturbed: neither its environments nor its random numbers move. The episodes depend on the seed
        and the environment steps trained so far, so the same checkpoint gives the same result.

        Args:
            num_episodes: default ``num_eval_episodes``.
            deterministic: default ``eval_deterministic``.

        Returns:
            ``eval/mean_reward``, ``std_reward``, ``min_reward``, ``max_reward``, ``mean_ep_length``, ``success_rate`` where the
            environment says whether an episode succeeded, and ``cut_episodes`` where an environment without a time limit did
            not end some within ``steps_per_eval_episode``: they count as they stood.

        Raises:
            InputError: the environment was given as a VectorEnv that cannot be made again.
        """
        wanted = self.num_eval_episodes if num_episodes is None else num_episodes
        return self._evaluate(wanted, self.eval_deterministic if deterministic is None else deterministic, "evaluation")

    def evaluation_seed(self, purpose: str = "evaluation") -> int:
        """Seed of the episodes of an evaluation, which depends on the run's seed and the environment steps so far."""
        if self.seed is None:
            self.seed = self._known_seed()
        return self._stream(purpose, self.num_env_steps)

    def leave_out(self, seconds: float) -> None:
        """Leave time that was spent beside training out of ``time/fps``."""
        self._clock.evaluated(seconds)

    def _evaluate(self, wanted: int, deterministic: bool, purpose: str) -> dict[str, float]:
        world = self.ranks.world_size
        shares = [(wanted + world - 1 - rank) // world for rank in range(world)]
        logged: Sums = {}
        share, seed = shares[self.ranks.rank], self.evaluation_seed(purpose)
        episodes = torch.zeros(shares[0], 5, dtype=torch.float64)
        if share:
            assert self.seed is not None
            with streams_of_their_own(self.seed):
                environments = self.supply.for_evaluation(min(self.num_envs, share))
            try:
                with in_eval_mode(self.policy), self.autocast():
                    episodes[:share] = evaluate_episodes(
                        self.policy,
                        environments,
                        without_mask(self.observation_space),
                        num_episodes=share,
                        seed=seed,
                        deterministic=deterministic,
                        max_steps=self.steps_per_eval_episode,
                    )
            except BaseException:
                self.supply.close_evaluation()  # another evaluation makes new ones
                raise
            logged = environments.logged.take_evaluation()
        rows = self.ranks.gather(torch.cat([episodes.flatten(), episodes.new_tensor([bool(logged)])])).view(world, -1)
        if rows[:, -1].any():
            logged = added(self.ranks.gather_objects(logged))
        each = [row[:-1].view(-1, 5)[:own] for row, own in zip(rows, shares, strict=True)]
        return {**summarize(torch.cat(each)), **said(logged)}

    @override
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "PPO":
        """A model with the weights and hyperparameters of a checkpoint; keywords replace hyperparameters.

        Raises:
            InputError: the file is damaged, not ours, needs something that it cannot hold, or names something that no
                file may.
        """
        data = read_verified(checkpoint_path)
        contents = plain_contents(data, checkpoint_path)
        refuse_missing(contents[KEY], kwargs)
        # Acting needs neither of these, and their names may be functions, which a file may not choose.
        foreign = foreign_names(contents["hyper_parameters"]).keys() & {"loss", "advantage_estimator"} - kwargs.keys()
        refuse_names(contents["hyper_parameters"], {*kwargs, *foreign})
        token = _passed.set(frozenset(kwargs))
        try:
            defaults = {name: _PARAMETERS[name] for name in foreign}
            given = {**kwargs, **defaults, "weights_only": True}
            model = super().load_from_checkpoint(io.BytesIO(data), *args, **given)
            model._missing.extend(foreign)
            return model
        except ArgumentError as error:  # of jsonargparse, which makes what the command line has saved
            raise InputError(
                f"{checkpoint_path} has hyperparameters that PPO cannot use ({' '.join(str(error).split())}): give others"
            ) from error
        finally:
            _passed.reset(token)

    # --- a loop without a Trainer -------------------------------------------------------------------------------------

    def collect(self) -> TensorDict:
        """One rollout [T, N] with its ``advantage`` and ``value_target``; the next call overwrites it.

        For loops of your own: under a Trainer this is done already. The first call seeds what draws random numbers, as
        ``fit`` does: by ``lightning.seed_everything``, else by a seed that is drawn and kept in ``seed``.
        """
        if self.rollouts.environments is None:
            self.seed = self._known_seed()
            self.generator.manual_seed(self._stream("training", self.num_env_steps))
        rollout = self.rollouts.collect()
        self.on_train_batch_start(rollout, 0)
        return rollout

    def learn(self, rollout: TensorDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Update the policy on what :meth:`collect` gave, count it, and say what happened.

        The learning rate falls linearly to 0, unless ``lr_scheduler`` was given: then step one of your own.

        Args:
            rollout: of the policy as it is now.
            optimizer: over the policy's parameters, the same one in every call.

        Returns:
            The numbers that loggers get, ``rollout/…``, ``time/…`` and ``train/…``, at ``num_env_steps``.

        Raises:
            FloatingPointError: a gradient is not finite, and that is not to be skipped.
        """
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.anneal(optimizer)
        self.learning_rate = optimizer.param_groups[0]["lr"]
        if self.updater.optimizer is optimizer:
            self.updater.follow(optimizer)
        else:
            self.updater.prepare(self, optimizer, TorchBackend(optimizer))
        update = self.update(rollout)
        self.count(rollout, update.epochs)
        self.rollouts.pending = False
        self._before.forget()
        return self.metrics(rollout, update, seconds=time.perf_counter() - started)

    def keep_environments(self) -> None:
        """Keep the state of environments that are between two rollouts, before they are closed."""
        self.rollouts.saved = self.rollouts.state()

    def close_environments(self) -> None:
        """Stop all simulators and their worker processes; whatever needs them next starts new ones."""
        self.rollouts.close()
        self.supply.close_evaluation()

    # --- what collecting asks -----------------------------------------------------------------------------------------

    def make_environments(self) -> Environments | Halves:
        """The environments to train on; worker processes in two halves."""
        if self.device.type == "cpu":
            check_memory(self._memory_needs(), physical_memory())
        environments = self.supply.for_training()
        if environments.inserts_rows and self.sequence_length == 1:
            environments.close()
            raise InputError(
                f"{self.env_maker.name} spends a step on every reset (NEXT_STEP), of which sequences of one step may "
                "consist: raise sequence_length to 2 or more"
            )
        try:
            self._check_rows(environments, self.num_steps)
        except InputError:
            environments.close()
            raise
        return environments

    def steer_environments(self, setting: Setting, *, anew: bool) -> None:
        """Change the environments of training between two rollouts.

        Attributes change where the environments are; with other arguments they are made anew and begin new episodes.

        Args:
            setting: how they differ from those that the run was given.
            anew: this is a change. False puts a run that goes on back to where it was.

        Raises:
            InputError: the environments have not what is to be set, or other spaces when made with these arguments.
        """
        before, self.supply.setting = self.supply.setting, setting
        if anew and setting.env_kwargs != before.env_kwargs:
            self.supply.check_spaces(setting)
            self.rollouts.close()
            self.rollouts.saved = None
        elif setting.attributes != before.attributes:
            self.rollouts.steer(setting.attributes)

    def steer_evaluations(self, setting: Setting) -> None:
        """Evaluate on environments that differ so from those that the run was given."""
        self.supply.steer_evaluations(setting)

    def resize_rollouts(self, num_steps: int) -> None:
        """Collect rollouts of another length from now on; the episodes go on.

        Args:
            num_steps: steps of each environment per rollout (steps).

        Raises:
            InputError: they cannot be cut into minibatches or sequences.
        """
        sequence_length = self.check_rollouts(num_steps)
        if num_steps != self.num_steps:
            self.num_steps, self.sequence_length = num_steps, sequence_length
            self.rollouts.resize(num_steps)

    def check_rollouts(self, num_steps: int) -> int | None:
        """Refuse a length of rollouts that cannot be cut; else the steps of a sequence, None without memory.

        Raises:
            InputError: it cannot be cut into minibatches or sequences.
        """
        check_samples(num_steps, self.num_envs, self.num_minibatches)
        if self.rollouts.environments is not None:
            self._check_rows(self.rollouts.environments, num_steps)
        return self._sequences_of(self.hparams["sequence_length"], num_steps)

    def _memory_needs(self) -> dict[str, int]:
        samples = self.num_steps * self.num_envs
        seen = [storage(leaf) for leaf in leaves(self.observation_space).values()]
        sample = sum(math.prod(shape) * dtype.itemsize for shape, dtype in seen)
        return {
            f"num_steps · num_envs = {self.num_steps} · {self.num_envs}": samples * sample,
            f"update_epochs = {self.update_epochs}": self.update_epochs * samples * 8,  # the order of each epoch
            f"num_eval_episodes = {self.num_eval_episodes}": self.num_eval_episodes * 32,
        }

    def _sequences_of(self, given: int | None, num_steps: int) -> int | None:
        memory = bool(self.policy.state_size)
        return check_sequences(given, num_steps, self.num_envs, self.num_minibatches, memory=memory)

    def _check_rows(self, environments: Environments | Halves, num_steps: int) -> None:
        rows = (num_steps // 2 if environments.inserts_rows else num_steps) * environments.num_envs
        if not self.policy.state_size and self.num_minibatches > rows:
            raise InputError(
                f"{self.env_maker.name} spends a step on every reset (NEXT_STEP), which can leave {rows} of "
                f"num_steps · num_envs = {num_steps} · {environments.num_envs} samples: num_minibatches = "
                f"{self.num_minibatches} is too many, lower it or raise num_steps"
            )

    def environment_seed(self) -> int:
        """Seed of this process's first environment; a run that goes on gets other episodes than the one before."""
        if self.seed is None:
            self.seed = self._known_seed()
        return self.seed + self.num_env_steps + self.ranks.rank * self.num_envs

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision in which updates run, for what is computed outside of training_step, with weights as they are."""
        if self._trainer is None:
            yield
            return
        with self.trainer.precision_plugin.forward_context():
            # Lightning casts weights in every call, since in training they change: here they do not.
            torch.set_autocast_cache_enabled(True)
            yield

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))

    def _known_seed(self) -> int:
        """The seed of this run: what it had before, else that of ``seed_everything``, else one that is drawn."""
        if self.seed is not None:
            return self.seed
        given = os.environ.get("PL_GLOBAL_SEED")
        return random.SystemRandom().randrange(2**31) if given is None else int(given)

    def _stream(self, purpose: str, step: int) -> int:
        """Seed of a stream of random numbers that no other purpose, process or moment of the run shares."""
        assert self.seed is not None
        words = [self.seed, sum(purpose.encode()), self.ranks.rank, step]
        return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)

    @override
    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "ranks": Ranks()}
        # A generator does not survive the way into a spawned process, nor does the tensor that holds its state.
        state["generator"] = self.generator.get_state().numpy().tobytes()
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> "PPO":
        """A copy with weights and counters of its own; a VectorEnv that the user made is the same in both."""
        if self.env_maker.is_instance:
            memo[id(self.env_maker.env)] = self.env_maker.env
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        saved, self.generator = bytearray(state["generator"]), torch.Generator()
        self.generator.set_state(torch.frombuffer(saved, dtype=torch.uint8))

    def _described(self) -> dict[str, Any]:
        """What loggers are told of a run."""
        named = {**self.hparams, **self._names, "total_steps": self.total_steps}
        return described_run(named, self._optimizer, seed=self.seed, processes=self.ranks.world_size)

    def _remember_hyperparameters(self, given: dict[str, Any]) -> None:
        """Keep what is plain data in the checkpoint, and the names of what is not.

        Under LightningCLI, Lightning keeps the parsed configuration instead, in which classes are paths.
        """
        self._missing: list[str] = []  # of a checkpoint that was loaded
        self._names: dict[str, str] = {}  # of what is no plain data, for loggers
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
            self._not_saved: list[str] = []
            self._given = set(given)
            return
        plain = plain_data(given)
        self.save_hyperparameters(plain)
        self._names = {name: name_of(value) for name, value in given.items() if name not in plain}
        changed = {name for name, value in given.items() if value is not _PARAMETERS[name]}
        self._not_saved = sorted(changed - plain.keys())
        self._given = changed


LOGS_SAVED_S = 10.0
"""Seconds after which loggers write what they have: a run that is killed loses no more."""

_passed: ContextVar[frozenset[str]] = ContextVar("passed", default=frozenset())
"""Hyperparameters that load_from_checkpoint was given, be they equal to the defaults or not."""


def to_sequences(rows: Tensor, length: int, num_envs: int) -> Tensor:
    """A tensor [T · N, …] of T steps of N environments, as sequences [T · N / L, L, …] of single environments."""
    return rows.view(-1, length, num_envs, *rows.shape[1:]).transpose(1, 2).reshape(-1, length, *rows.shape[1:])


_PARAMETERS = {
    name: parameter.default for name, parameter in inspect.signature(PPO.__init__).parameters.items() if name != "self"
}
# The default optimiser is a lambda, which the command line can read and change; under a name it can be pickled too.
_adam = _PARAMETERS["optimizer"]
_adam.__qualname__ = "_adam"
