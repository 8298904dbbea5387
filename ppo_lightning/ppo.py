"""PPO as a LightningModule: Lightning's hooks in their order, then what users call."""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from signal import Signals
from typing import Any, Literal, cast

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict import TensorDict
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.algorithm.advantage import check_estimates, gae
from ppo_lightning.algorithm.loss import Loss, LossCoefficients, PPOLoss
from ppo_lightning.algorithm.minibatches import map_samples, to_sequences
from ppo_lightning.algorithm.optimizer_step import NonFiniteGradient, NonFiniteGuard, TorchBackend, write_dump
from ppo_lightning.algorithm.reward_normalization import RewardNormalizer
from ppo_lightning.algorithm.schedules import Schedules
from ppo_lightning.algorithm.update import Updater, UpdateResult
from ppo_lightning.callbacks import begin_writing, checkpoint_paths, defer_writing
from ppo_lightning.callbacks.events import tell
from ppo_lightning.envs import EnvFactory, EnvProvider, resolve
from ppo_lightning.envs.info import added
from ppo_lightning.envs.info import means as means_of
from ppo_lightning.errors import InputError
from ppo_lightning.evaluation.evaluator import evaluate_over_ranks
from ppo_lightning.metric_names import MetricNames
from ppo_lightning.metrics import iteration_metrics
from ppo_lightning.parameters import (
    LIMITS,
    ONE_OR_MORE,
    Linear,
    PopArt,
    check_length,
    check_memory,
    checked,
    make_optimizer,
    make_scheduler,
    plain_factory,
    schedule,
    try_schedule,
)
from ppo_lightning.policy import ActorCritic, Policy, RunningMoments, in_eval_mode, statistics_of
from ppo_lightning.policy.prediction import predict
from ppo_lightning.rollout.dataset import EpisodeStatistics, RolloutDataset
from ppo_lightning.runs.checkpoint import KEY, OptimizerHparams, check_checkpoint, checkpoint_contents, with_run_buffers
from ppo_lightning.runs.clock import Clock
from ppo_lightning.runs.counts import Counts, exchange_counts
from ppo_lightning.runs.history import Records, summarize_records
from ppo_lightning.runs.hyperparameters import Hyperparameters, defaults_of, loading
from ppo_lightning.runs.loggers import MetricWriter
from ppo_lightning.runs.ranks import CHECK_INTERVAL, LightningBackend, Ranks, can_bypass_strategy, fingerprint
from ppo_lightning.runs.seeding import derive_seed, resolve_seed, seed_of_checkpoint
from ppo_lightning.runs.state import RunState, env_signature
from ppo_lightning.spaces import MASK, check_mask, without_mask
from ppo_lightning.trainer import (
    attach_callbacks,
    check_trainer,
    end_iteration,
    find_checkpoints,
    gradient_hooks,
    prepare_trainer,
    refuse_unsupported,
    restart_epoch,
    restore_modes,
    shorten_timeout,
    take_averages_out,
)


class PPO(LightningModule):
    """Proximal Policy Optimisation (Schulman et al. 2017) that trains on ``Trainer.fit``.

    One epoch is one policy iteration: a rollout of ``num_steps`` steps in each environment, its advantages, and
    ``update_epochs`` epochs of shuffled minibatches over it. ``total_steps`` is the only budget.

    Values have the types below; a bool is not a number, and a string is neither. A float that is whole is accepted as a whole
    number (``total_steps=1e6``), and NumPy and torch scalars become plain numbers.

    Args:
        env: Gymnasium id ("module:Id-v0" imports the module first), a VectorEnv, or a callable that makes one (or one
            single environment); in YAML a class by class_path, or a function as package.module.name. A VectorEnv's own
            number of environments wins over num_envs.
        env_kwargs: arguments for gymnasium.make, or for the callable.
        wrappers: Gymnasium wrappers by class_path, around each environment, innermost first.
        num_envs: environments per rank that are stepped together (count).
        vectorization: how environments run: sync (one after another, in this process), async (one worker process
            each), vector_entry_point (the environment's own vectorised version).
        num_steps: steps of each environment per rollout (steps).
        total_steps: environment steps to train for, over all environments and ranks, rounded up to whole
            iterations; every schedule runs on it (steps).
        policy: class_path or callable (observation_space, action_space) -> network, whose forward maps observations
            [B, …] to distribution parameters [B, P] and values [B]. The default, ActorCritic, has encoders for images
            and Dict observations, recurrent layers, and several distributions as options.
        normalize_observation: subtract the running mean of observations, divide by their standard deviation, clip at
            ±10; of a Dict the numeric parts, never images.
        normalize_reward: divide rewards by the standard deviation of the discounted return, clip at ±10; reported
            returns stay in the environment's units.
        clip_reward: learn from the sign of rewards, -1, 0 or 1, as is the custom for Atari; reported returns stay in the
            environment's units.
        popart: {beta} normalises what the critic learns while preserving its output; null does not.
        gamma: discount factor (per environment step, 0 to 1).
        gae_lambda: how far advantages look ahead: 0 is the one-step TD error, 1 the whole return (dimensionless, 0 to 1).
        advantage_estimator: callable (rollout [T, N], *, gamma, gae_lambda) -> (advantage [T, N], value target [T, N]); in
            YAML a function as package.module.name, or a class by class_path. ``reward`` is as it is learnt from.
        update_epochs: epochs over each rollout (count).
        num_minibatches: minibatches of each epoch (count).
        gradient_accumulation_steps: parts in which the gradient of a minibatch is accumulated, for one that does not fit into
            memory whole; the step is the same (count).
        sequence_length: of a recurrent policy, the steps of the sequences into which rollouts are split; null is num_steps
            (steps).
        loss: module or callable (batch, evaluate, coefficients) -> scalars by name, of which loss is minimised and all are
            logged as train/…; null is PPOLoss. Its parameters are trained with the policy's (docs/changing_the_algorithm.md).
        clip_range: change of an action's probability ratio beyond which the objective is constant; a number, or
            {start, end} for a linear schedule over the run (dimensionless).
        clip_range_vf: change of a value beyond which the critic's loss is constant, in (normalised) reward units; null does
            not clip.
        normalize_advantage: give the advantages of each minibatch mean 0 and standard deviation 1: true by those of
            each rank's own samples, all_ranks by those of all ranks' together, so that the number of ranks makes no
            difference. On one rank both are the same.
        ent_coef: weight of the entropy bonus; a number, or {start, end} for a linear schedule over the run (advantage units
            per nat).
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
        max_env_restarts: how often environments that raise, or whose worker processes die or hang, may be restarted in one
            run of this process, their episodes cut there; 0 ends the run (count).
        info_keys: keys of the environments' info whose numbers are logged as env/…, beside reward_components, rewards, log
            and metrics, which are logged where they are given.
        metric_names: whose names loggers receive: sb3, cleanrl, leanrl, apexrl, pufferlib or embodichain, with that
            system's signs and scales; monitors and reports keep Stable-Baselines3's.
        env_timeout_s: a step or reset of async environments that takes longer is an error (seconds).
        compile: run each gradient step, and the rollouts of environments that are tensors, as one compiled graph:
            several times as fast for small networks, after some ten seconds of compilation.

    Raises:
        InputError: a value cannot be used; the sentence says which, and what to do.
    """

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
        max_env_restarts: int = 0,
        info_keys: Sequence[str] = (),
        metric_names: MetricNames = "sb3",
        env_timeout_s: float = 60.0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        factory, wraps = plain_factory(resolve(env)), tuple(map(plain_factory, wrappers))
        self.env_factory = EnvFactory(factory, env_kwargs or {}, wraps, vectorization, restarts=max_env_restarts > 0)
        self.hyperparameters = Hyperparameters(self, given)
        self.info_keys, self.env_timeout_s = tuple(info_keys), env_timeout_s
        self.env_provider = EnvProvider(
            self.env_factory, num_envs, timeout_s=env_timeout_s, restarts=max_env_restarts, info_keys=self.info_keys
        )
        self.observation_space, self.action_space = self.env_provider.observation_space, self.env_provider.action_space
        check_mask(self.observation_space, self.action_space)
        self.total_steps, self.gamma, self.gae_lambda = total_steps, gamma, gae_lambda
        self.update_epochs, self.num_minibatches = update_epochs, num_minibatches
        self.clip_range_vf, self.vf_coef, self.target_kl = clip_range_vf, vf_coef, target_kl
        self.schedules = Schedules(
            schedule("clip_range", clip_range), schedule("ent_coef", ent_coef), lr_scheduler=lr_scheduler is not None
        )
        self.schedule_metrics: dict[str, float] = {}
        """What callbacks that change schedules or environments log with each iteration."""
        self.optimizer, self.lr_scheduler = plain_factory(optimizer), plain_factory(lr_scheduler)
        self.eval_interval, self.num_eval_episodes = eval_interval, num_eval_episodes
        self.eval_deterministic, self.metric_writer = eval_deterministic, MetricWriter(metric_names)
        check_memory(
            {f"update_epochs = {update_epochs}": update_epochs * num_steps * self.num_envs * 8}
        )  # permutations
        check_memory({f"num_eval_episodes = {num_eval_episodes}": num_eval_episodes * 32})

        seen = without_mask(self.observation_space)
        self.policy = Policy(seen, self.action_space, policy, normalize_observation, popart)
        self.loss: Loss = PPOLoss() if loss is None else plain_factory(loss)
        self.advantage_estimator = plain_factory(advantage_estimator)
        self.reward_normalizer = RewardNormalizer(normalize=normalize_reward, sign=clip_reward, gamma=gamma)
        self.guard = NonFiniteGuard(non_finite)
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
        for counter in ("env_steps", "iterations", "n_updates"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64))
        try_schedule(*self._make_optimizer())  # refuses mistakes now; the run makes its own in configure_optimizers

        self.seed: int | None = None
        self.generator = torch.Generator()
        self.rollouts = RolloutDataset(
            self,
            self.env_provider,
            num_steps=num_steps,
            num_minibatches=num_minibatches,
            sequence_length=sequence_length,
            compile=compile,
        )
        signature = env_signature(self.hparams, self.num_envs)
        self.run_state = RunState(self.rollouts, self.generator, signature, self.env_factory.name)
        self.ranks, self.records, self.clock = Ranks(), Records(), Clock()
        self.stop_signal: Signals | None = None
        """The signal that asked this process to stop."""
        self.agreed_stop_signal: Signals | None = None
        """The signal by which the run stops, as all ranks have agreed."""
        self.trained_with_masks = self._warned_of_masks = False
        self.run_folder: Path | None = None
        """Where the last fit kept its files, which another fit of this model may replace."""
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
        """Attach what every run needs, in the place of Lightning's default bar and checkpoint; the user's callbacks stay."""
        refuse_unsupported(self.trainer, self)
        evaluates = self.env_factory.again() is not None
        attach_callbacks(self.trainer, self.iterations_between_evaluations, evaluates=evaluates)
        shorten_timeout(self.trainer)  # before ranks meet
        defer_writing(self.trainer, self)
        return []

    @override
    def setup(self, stage: str) -> None:
        """Agree on a seed, refuse what would mislead, and replace Lightning's defaults by those that suit PPO."""
        prepare_trainer(self.trainer)
        self.seed = self.trainer.strategy.broadcast(resolve_seed(self.seed))
        if stage == "fit":
            has_moments = bool(self.policy.moments or self.reward_normalizer.moments)
            remaining = ceil((self.total_steps - self.num_env_steps) / self.steps_per_iteration)
            self._check_val_every_n_epoch = check_trainer(
                self.trainer, remaining, self.iterations_between_evaluations, running_moments=has_moments
            )
            if self.env_factory.again() is None:
                rank_zero_info(
                    f"no evaluations: {self.env_factory.name} was given as a VectorEnv, and evaluation needs environments of "
                    "its own; give a callable that makes it instead"
                )
                cast(Any, self.trainer).limit_val_batches = 0

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

    @override
    def on_fit_start(self) -> None:
        """Check a checkpoint's optimizer, seed this rank's generator, and stop at once where nothing is left to train."""
        scheduler = next((config.scheduler for config in self.trainer.lr_scheduler_configs), None)
        self._optimizer_hparams = OptimizerHparams(self._optimizer, scheduler, self.run_state.take_checkpoint())
        rank_zero_info(f"seed {self.seed}")
        more = {"total_steps": self.total_steps, "seed": self.seed, "processes": self.ranks.world_size}
        self._hparams_initial = self.hyperparameters.for_loggers(self._optimizer, **more)  # Lightning logs these next
        self.generator.manual_seed(self._derive_seed("training"))
        self.env_provider.restarts.count = 0
        self.guard.reset()
        self.clock = Clock()
        if self.num_env_steps >= self.total_steps:
            rank_zero_info(
                f"{self.num_env_steps:,} environment steps are trained already, total_steps is {self.total_steps:,}: "
                "raise total_steps to continue"
            )
            self.trainer.should_stop = True
        begin_writing(self.trainer, self)

    @override
    def train_dataloader(self) -> RolloutDataset:
        """The rollouts themselves: sized (1), no DataLoader, so that each is collected after the last update."""
        return self.rollouts

    @override
    def on_train_start(self) -> None:
        """Resume, share memory between ranks, and prepare the updates."""
        restart_epoch(self.trainer, self.policy_version)
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self.run_state.resume(self._optimizer, schedulers, self.ranks)
        self._optimizer_hparams.restore()
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
    def on_train_epoch_start(self) -> None:
        """Call the events that an iteration, and with it a rollout, begins."""
        self._call_event("on_iteration_start")
        self._call_event("on_rollout_start")

    @override
    @torch.no_grad()
    def on_train_batch_start(self, batch: TensorDict, batch_idx: int) -> None:
        """Add ``advantage`` and ``value_target`` [T, N] to the rollout, in place."""
        self._check_rollout(batch)
        optimizer = None if self._trainer is None else self._optimizer
        if optimizer is not None:
            self.updater.follow(optimizer)
        trained = self.updater.parameters or self.parameters()
        self.run_state.rollback.save([*trained, *dict(super().named_buffers()).values()], optimizer)
        self.trained_with_masks |= MASK in batch
        self._call_event("on_rollout_end", batch)
        reward, done = batch["reward"], batch["terminated"] | batch["truncated"]
        self.rollouts.running_return = self.reward_normalizer.update(
            reward, done, batch["valid"], self.rollouts.running_return, self.ranks.gather
        )
        learnt_from = batch.copy().set("reward", self.reward_normalizer(reward))
        estimates = self.advantage_estimator(learnt_from, gamma=self.gamma, gae_lambda=self.gae_lambda)
        batch["advantage"], batch["value_target"] = check_estimates(estimates, reward)
        if self.policy.value_normalizer is not None:
            targets = RunningMoments.batch_moments(batch["value_target"][batch["valid"]])
            self.policy.value_normalizer.merge(self.ranks.gather(targets))

    @override
    def training_step(self, batch: TensorDict, batch_idx: int) -> None:
        """Update the policy on the rollout; then count, log, and decide whether the run stops."""
        started, steps = time.perf_counter(), self.trainer.global_step
        learning_rate = self.schedules.set_learning_rate(self._optimizer, self.progress)
        self._call_event("on_update_start", batch)
        update = self.update(batch)
        self._call_event("on_update_end", update)
        self._end_update(batch, update)
        if self.lr_scheduler is not None:
            # Torch's scheduler looks for a call of the optimizer's step, which a compiled update does not make.
            cast(Any, self._optimizer)._opt_called = True
            cast(torch.optim.lr_scheduler.LRScheduler, self.lr_schedulers()).step()
        metrics = self.metrics(batch, update, seconds=time.perf_counter() - started, learning_rate=learning_rate)
        self.log_metrics(metrics)
        self._call_event("on_iteration_end", metrics)
        done = self.num_env_steps >= self.total_steps
        end_iteration(self.trainer, steps + 1, done=done, stop_signal=self.agreed_stop_signal)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients, unscaled by now in any precision; never step on one that is not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # a fused optimizer would do it within its step: too late for clipping
        assert self.updater.eager is not None
        self.updater.eager.clip(scaler)

    @override
    def on_fit_end(self) -> None:
        """Restore the Trainer's evaluation interval, and keep what another fit continues from."""
        self.trainer.check_val_every_n_epoch = self._check_val_every_n_epoch
        self._save_for_refit()

    @override
    def val_dataloader(self) -> Sequence[int]:
        """One batch: one evaluation."""
        return range(1)

    test_dataloader = val_dataloader

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Evaluate on environments of its own, and log ``eval/…`` at the current environment step."""
        self._log_evaluation("evaluation")

    @override
    def test_step(self, batch: int, batch_idx: int) -> None:
        """The same as a validation, over other episodes: those of validations have chosen the best checkpoint."""
        self._log_evaluation("test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a policy needs beyond weights, and what a run resumes from."""
        checkpoint["hyper_parameters"]["total_steps"] = self.total_steps  # it may have been raised since
        checkpoint["state_dict"] = with_run_buffers(self, checkpoint["state_dict"])
        checkpoint[KEY] = checkpoint_contents(self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint for other spaces before its weights are touched.

        Raises:
            InputError: the checkpoint is not ours, or its spaces differ from the environment's.
        """
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        check_checkpoint(self, checkpoint, fits=fits)
        self.run_state.load(checkpoint, fits=fits)
        self.trained_with_masks = checkpoint[KEY].get("masked", False)
        self.seed = seed_of_checkpoint(checkpoint[KEY]["seed"], self.seed)
        self.rollouts.load(checkpoint[KEY])

    @override
    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers that are weights: all but counters, other whole numbers, and running statistics.

        What averages or exchanges weights (``WeightAveraging``, ``AveragedModel``) iterates over ``parameters()`` and
        ``buffers()``. The average of a counter is not a counter, and moments belong to their own count. ``state_dict`` has
        all.
        """
        statistics = statistics_of(self)
        for name, one in super().named_buffers(prefix, recurse, remove_duplicate):
            if one.is_floating_point() and id(one) not in statistics:
                yield name, one

    @override
    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """As Lightning's; an iteration and an evaluation are one batch each, so that no size has to be found in a rollout."""
        super().log(name, value, *args, batch_size=batch_size or 1, **kwargs)

    # --- the parts of an iteration ------------------------------------------------------------------------------------

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
        if self.rollouts.sequence_length is not None:
            length, num_envs = self.rollouts.sequence_length, rollout.shape[1]
            samples = map_samples(lambda leaf: to_sequences(leaf, length, num_envs), samples)
        return samples

    @property
    def coefficients(self) -> LossCoefficients:
        """Of the loss in this iteration, where their schedules are."""
        clip_range, ent_coef = (self.schedules.at(name, self.progress) for name in ("clip_range", "ent_coef"))
        return LossCoefficients(clip_range, self.clip_range_vf, self.vf_coef, ent_coef)

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
            folder = None if self._trainer is None else self.trainer.log_dir or self.trainer.default_root_dir
            message = write_dump(error, Path(folder or "."), int(self.iterations) + 1, self.ranks.rank)
            self.ranks.barrier()  # the first process to end stops the others before they have written theirs
            raise FloatingPointError(message) from None
        self.updater.warn_of_unreached()
        return result

    @torch.no_grad()
    def _end_update(self, rollout: TensorDict, update: UpdateResult) -> None:
        """Count steps and episodes of all ranks, and merge the moments of the rollout's observations."""
        valid, episodes = rollout["valid"], self.rollouts.episodes
        if self.policy.moments is not None:
            seen = self.policy.numbers(rollout["observation"][valid])
            self.policy.moments.merge(self.ranks.gather(RunningMoments.batch_moments(seen)))
        self.iterations += 1
        self.n_updates += update.epochs
        compares = self.ranks.world_size > 1 and self.policy_version % CHECK_INTERVAL == 0
        own = Counts(
            int(valid.sum()),
            torch.cat([episodes.finished, episodes.steps[:, None]], 1),
            self.stop_signal or 0,
            fingerprint(self.updater.parameters) if compares else (0, 0),
            bool(self.rollouts.info),
        )
        counts, fingerprints = exchange_counts(own, self.ranks, EpisodeStatistics.WINDOW)
        self.env_steps += counts.env_steps
        episodes.record(counts.episodes[:, :4])
        if counts.signal:
            self.agreed_stop_signal = Signals(counts.signal)
        if compares:
            self.ranks.check_in_sync(fingerprints, self.policy_version)
        if counts.has_info:
            self.rollouts.info = added(self.ranks.gather_objects(self.rollouts.info))
        self.rollouts.unconsumed = False
        self.run_state.rollback.discard()

    @torch.no_grad()
    def metrics(
        self, rollout: TensorDict, update: UpdateResult, *, seconds: float, learning_rate: float
    ) -> dict[str, float]:
        """What is logged of an iteration: of all ranks, but for seconds, which are this rank's (docs/metrics.md).

        Args:
            rollout: [T, N].
            update: what was done with it.
            seconds: how long that took.
            learning_rate: of the first parameter group.
        """
        finished, restarts = self.rollouts.episodes.finished, self.env_provider.restarts.count
        episodes = self.rollouts.episodes.means()
        metrics = {
            **episodes,
            **means_of(self.rollouts.info),
            **self.clock.iterated(self.num_env_steps),
            **iteration_metrics(rollout, update, self.policy, finished, restarts, self.ranks.gather),
            "time/iterations": self.policy_version,
            "time/total_timesteps": self.num_env_steps,
            "time/collect": self.rollouts.collect_seconds,
            "time/update": seconds,
            "train/clip_range": update.coefficients.clip_range,
            "train/learning_rate": learning_rate,
            "train/n_updates": int(self.n_updates),
            **self.schedule_metrics,
        }
        for count, rate in (("successes", "success_rate"), ("failures", "fail_rate")):
            if f"rollout/{rate}" not in episodes:
                del metrics[f"rollout/{count}"]
        if self.guard.skipped:
            metrics["train/skipped_steps"] = self.guard.skipped
        if self.clip_range_vf is not None:
            metrics["train/clip_range_vf"] = self.clip_range_vf
        if self.target_kl is not None:
            metrics["train/early_stopped"] = float(update.stopped)
        return metrics

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics of this iteration, at once: a ``self.log`` of each costs more than an update.

        Args:
            metrics: under our names, the same on all ranks.
            step: environment steps that they belong to; None is now.
        """
        self.metric_writer.write(self.loggers, metrics, self.num_env_steps if step is None else step)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)  # one by one they take five times as long
        self.trainer.callback_metrics.update(zip(metrics, values.unbind(), strict=True))

    # --- what users call ----------------------------------------------------------------------------------------------

    def predict(self, observation: Any, deterministic: bool = True, state: Any = None, action_mask: Any = None) -> Any:
        """Action for one observation, or actions for a batch of them; numpy in, numpy out, as the environment takes them.

        A recurrent policy returns the pair (action, state): pass the state on with the next observation of the
        episode, and None with the first.

        Args:
            observation: [*shape], or [B, *shape] of the observation space, unnormalised; of a Dict or Tuple the parts.
            deterministic: the most probable action; else one is drawn, with torch's global generator.
            state: of the recurrent policy, as the call before returned it; None at the start of an episode.
            action_mask: [M], or [B, M], 1 or True where an action is allowed, else 0 or False; one that is part of the
                observation is read from there. Without one all actions are allowed, with one warning where the policy
                was trained with masks.

        Raises:
            InputError: the observation, state or mask is not of its space, or fits neither.
        """
        is_masked = action_mask is not None or without_mask(self.observation_space) is not self.observation_space
        if self.trained_with_masks and not is_masked and not self._warned_of_masks:
            self._warned_of_masks = True
            rank_zero_warn(
                f"predict got no action_mask, though the policy was trained with masks of {self.env_factory.name}: all actions "
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
        """Run exactly ``num_episodes`` episodes on environments of their own, shared among all ranks.

        Training is not disturbed: neither its environments nor its random numbers move. The episodes depend on the seed
        and the environment steps trained so far, so the same checkpoint gives the same result.

        Args:
            num_episodes: default ``num_eval_episodes``.
            deterministic: default ``eval_deterministic``.

        Returns:
            ``eval/mean_reward``, ``std_reward``, ``min_reward``, ``max_reward``, ``mean_ep_length``, ``success_rate`` where the
            environment reports whether an episode succeeded, and ``cut_episodes`` where an environment without a time limit
            did not end some within ``steps_per_eval_episode``: they count as they were then.

        Raises:
            InputError: the environment was given as a VectorEnv that cannot be made again.
        """
        return self._evaluate(num_episodes, deterministic, "evaluation")

    def _evaluate(self, num_episodes: int | None, deterministic: bool | None, purpose: str) -> dict[str, float]:
        seed = self.evaluation_seed(purpose)
        return evaluate_over_ranks(
            self.policy,
            self.env_provider,
            self.ranks,
            self.autocast(),
            num_episodes=self.num_eval_episodes if num_episodes is None else num_episodes,
            deterministic=self.eval_deterministic if deterministic is None else deterministic,
            run_seed=cast(int, self.seed),
            seed=seed,
            max_steps=self.steps_per_eval_episode,
        )

    def _log_evaluation(self, purpose: str) -> None:
        started = time.perf_counter()
        try:
            statistics = self._evaluate(None, None, purpose)
        except BaseException:
            take_averages_out(self.trainer)
            raise
        # All ranks have gathered the same statistics; sync_dist tells Lightning so.
        renames = bool(self.loggers) and self.metric_writer.names != "sb3"
        self.log_dict(statistics, sync_dist=self.ranks.world_size > 1, logger=False if renames else None)
        if renames:
            self.metric_writer.write(self.loggers, statistics, self.num_env_steps)
        self.exclude_from_fps(time.perf_counter() - started)

    def summary(self) -> dict[str, Any]:
        """The run so far, its parts before resuming included: steps, seconds, metrics and their histories, checkpoints.

        Returns:
            EmbodiChain's keys and ApexRL's, as :func:`~ppo_lightning.runs.history.summarize_records` has them.
        """
        return summarize_records(
            self.records,
            env_steps=self.num_env_steps,
            iterations=self.policy_version,
            episodes=self.rollouts.episodes.window,
            **checkpoint_paths(self._trainer),
        )

    @override
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "PPO":
        """A model with the weights and hyperparameters of a checkpoint; keywords replace hyperparameters.

        Raises:
            InputError: the file is damaged, not ours, needs something that it cannot hold, or names something that no
                file may.
        """
        with loading(checkpoint_path, kwargs, _DEFAULTS) as (file, given, unresolved):
            model = super().load_from_checkpoint(file, *args, **given)
            model.hyperparameters.unresolved.extend(unresolved)
        return model

    def collect(self) -> TensorDict:
        """One rollout [T, N] with its ``advantage`` and ``value_target``; the next call overwrites it.

        For loops of your own: under a Trainer this is done already. The first call seeds what draws random numbers, as
        ``fit`` does: by ``lightning.seed_everything``, else by a seed that is drawn and kept in ``seed``.
        """
        if self.rollouts.environments is None:
            self.seed = resolve_seed(self.seed)
            self.generator.manual_seed(self._derive_seed("training"))
        rollout = self.rollouts.collect()
        self.on_train_batch_start(rollout, 0)
        return rollout

    def learn(self, rollout: TensorDict, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Update the policy on what :meth:`collect` returned, and count it.

        The learning rate falls linearly to 0, unless ``lr_scheduler`` was given: then step one of your own.

        Args:
            rollout: of the policy as it is now.
            optimizer: over the model's parameters, the same one in every call.

        Returns:
            The metrics that loggers get, ``rollout/…``, ``time/…`` and ``train/…``, at ``num_env_steps``.

        Raises:
            FloatingPointError: a gradient is not finite, and such steps are not skipped.
        """
        started = time.perf_counter()
        learning_rate = self.schedules.set_learning_rate(optimizer, self.progress)
        if self.updater.optimizer is optimizer:
            self.updater.follow(optimizer)
        else:
            self.updater.prepare(self, optimizer, TorchBackend(optimizer))
        update = self.update(rollout)
        self._end_update(rollout, update)
        return self.metrics(rollout, update, seconds=time.perf_counter() - started, learning_rate=learning_rate)

    def close_environments(self) -> None:
        """Stop all simulators and their worker processes; whatever needs them next starts new ones."""
        self.rollouts.close()
        self.env_provider.close_evaluation()

    # --- what callbacks and rollouts use ------------------------------------------------------------------------------

    @property
    def num_envs(self) -> int:
        """Environments of this rank that are stepped together."""
        return self.env_provider.num_envs

    @property
    def num_steps(self) -> int:
        """Steps of each environment per rollout."""
        return self.rollouts.num_steps

    @property
    def num_env_steps(self) -> int:
        """Environment steps trained on so far, over all environments and ranks."""
        return int(self.env_steps)

    @property
    def policy_version(self) -> int:
        """Number of updates that the policy has had: iterations so far."""
        return int(self.iterations)

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, in the last update."""
        assert self.updater.optimizer is not None
        return self.updater.optimizer.param_groups[0]["lr"]

    @property
    def progress(self) -> float:
        """Share of ``total_steps`` that is trained, 0 to 1."""
        return min(1.0, self.num_env_steps / self.total_steps)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of a rollout, over all environments and ranks."""
        return self.num_steps * self.num_envs * self.ranks.world_size

    @property
    def iterations_between_evaluations(self) -> int:
        """``eval_interval``, or what makes 20 evaluations over the run."""
        return self.eval_interval or max(1, ceil(self.total_steps / self.steps_per_iteration) // 20)

    @property
    def steps_per_eval_episode(self) -> int:
        """Steps that an evaluation episode may take where the environment has no time limit.

        All episodes together take no more steps than the training between two evaluations.
        """
        return self.iterations_between_evaluations * self.steps_per_iteration // self.num_eval_episodes

    def environment_seed(self) -> int:
        """Seed of this rank's first environment; a resumed run gets other episodes than the one before."""
        self.seed = resolve_seed(self.seed)
        return self.seed + self.num_env_steps + self.ranks.rank * self.num_envs

    def evaluation_seed(self, purpose: str = "evaluation") -> int:
        """Seed of the episodes of an evaluation, which depends on the run's seed and the environment steps so far."""
        self.seed = resolve_seed(self.seed)
        return self._derive_seed(purpose)

    def exclude_from_fps(self, seconds: float) -> None:
        """Leave time that was spent beside training out of ``time/fps``."""
        self.clock.evaluated(seconds)

    def progress_bar_values(self) -> dict[str, str]:
        """What the progress bar shows beside the steps."""
        shown = {} if self.clock.fps is None else {"fps": f"{self.clock.fps:,.0f}"}
        mean = self.rollouts.episodes.means().get("rollout/ep_rew_mean")
        return shown if mean is None else {**shown, "return": f"{mean:.4g}"}

    def save_env_state(self) -> None:
        """Keep the state of environments that are between two rollouts, before they are closed."""
        self.rollouts.saved = self.rollouts.state()

    def rollback_update(self) -> None:
        """Undo what an update or an evaluation that did not end has changed: the end of an iteration is saved."""
        restore_modes(self.trainer)
        self.run_state.rollback.rollback()
        self._save_for_refit()

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

    def _make_optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        optimizer = make_optimizer(self.optimizer, list(self.parameters()))
        return optimizer, make_scheduler(self.lr_scheduler, optimizer)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))

    def _derive_seed(self, purpose: str) -> int:
        assert self.seed is not None
        return derive_seed(self.seed, purpose, self.ranks.rank, self.num_env_steps)

    def _call_event(self, event: str, *given: Any) -> None:
        if self._trainer is not None:
            tell(self.trainer, self, event, *given)

    def _check_rollout(self, batch: Any) -> None:
        if not (isinstance(batch, TensorDict) and "policy_version" in batch):
            raise InputError(
                f"training got a batch of another loader ({type(batch).__name__}), and PPO collects its own rollouts: leave "
                "train_dataloaders out of Trainer.fit"
            )
        if batch["policy_version"] != self.policy_version:
            raise InputError(
                f"the rollout was collected with policy {batch['policy_version']}, this is policy {self.policy_version}: "
                "something fetched it ahead of the update; pass train_dataloader() on as it is, in no DataLoader"
            )

    def _save_for_refit(self) -> None:
        if self.trainer.optimizers:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            self.run_state.save_for_refit(self._optimizer, schedulers, self.ranks)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # A generator cannot be sent to a spawned process, nor can the tensor that holds its state.
        generator = self.generator.get_state().numpy().tobytes()
        return {**super().__getstate__(), "ranks": Ranks(), "generator": generator}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        saved, self.generator = bytearray(state["generator"]), torch.Generator()
        self.generator.set_state(torch.frombuffer(saved, dtype=torch.uint8))
        self.run_state.generator = self.generator

    def __deepcopy__(self, memo: dict[int, Any]) -> "PPO":
        """A copy with weights and counters of its own; a VectorEnv that the user made is the same in both."""
        if self.env_factory.is_instance:
            memo[id(self.env_factory.env)] = self.env_factory.env
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


_DEFAULTS = defaults_of(PPO.__init__)
# The default optimizer is a lambda, which the command line can read and change; under a name it can be pickled too.
_adam = _DEFAULTS["optimizer"]
_adam.__qualname__ = "_adam"
