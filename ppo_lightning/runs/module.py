"""A run apart from its algorithm: counters, seeds, logging, evaluation, checkpoints."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from math import ceil
from pathlib import Path
from signal import Signals
from typing import Any, Self, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from tensordict import TensorDict
from torch import Tensor
from typing_extensions import override

from ppo_lightning.algorithm.optimizer_step import parameters_of
from ppo_lightning.compiler import Compilation
from ppo_lightning.envs import EnvFactory, EnvProvider
from ppo_lightning.envs.info import means, merge_sums
from ppo_lightning.evaluation.episodes import evaluate_over_ranks
from ppo_lightning.metric_names import MetricNames, may_come_later
from ppo_lightning.parameters import ONE_OR_MORE, checked
from ppo_lightning.policy import RunningMoments, statistics_of
from ppo_lightning.rollout.dataset import RolloutDataset
from ppo_lightning.rollout.episodes import EpisodeStatistics
from ppo_lightning.runs.acting import ActingModule
from ppo_lightning.runs.checkpoint import (
    CHECKPOINT_KEY,
    check_checkpoint,
    checkpoint_contents,
    checkpoint_paths,
    with_run_buffers,
)
from ppo_lightning.runs.clock import Clock
from ppo_lightning.runs.history import Records, summarize_records
from ppo_lightning.runs.hyperparameters import Hyperparameters, defaults_of, loading, subclass_arguments
from ppo_lightning.runs.loggers import MetricWriter
from ppo_lightning.runs.optimizer import OptimizerHparams
from ppo_lightning.runs.ranks import CHECK_INTERVAL, Counts, Ranks, fingerprint, gather_counts
from ppo_lightning.runs.state import RunState, derive_seed, env_signature, resolve_seed, seed_of_checkpoint
from ppo_lightning.runs.trainer import (
    check_trainer,
    find_checkpoints,
    is_last_iteration,
    prepare_trainer,
    restart_epoch,
    restore_modes,
    restore_training_weights,
)
from ppo_lightning.spaces import check_mask


class RunModule(ActingModule):
    """A LightningModule that trains on rollouts: it counts environment steps, evaluates, and resumes bit-exactly.

    A subclass sets :attr:`policy`, calls :meth:`make_rollouts`, and updates the policy.

    Args:
        factory: makes the environments.
        given: all arguments of the subclass by name, which checkpoints keep.
        num_envs: environments per rank, where the factory has no number of its own.
        total_steps: environment steps to train for, over all environments and ranks.
        eval_interval: iterations between evaluations; None makes at most 20 evaluations over the run.
        num_eval_episodes: of each evaluation.
        eval_deterministic: evaluate the most probable action instead of drawing one.
        max_env_restarts: of environments that fail.
        info_keys: of the environments' info, whose scalars are logged.
        metric_names: of the system whose names loggers receive.
        env_timeout_s: of a step or reset of async environments (seconds).
    """

    rollouts: RolloutDataset
    constructor_arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """What the class was called with, until the constructor has kept it."""
    env_steps: Tensor
    iterations: Tensor
    n_updates: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance that knows what it is made with, whatever the constructors of subclasses make of it."""
        made = super().__new__(cls)
        if args or kwargs:  # not where a copy is made
            made.constructor_arguments = args, kwargs
        return made

    def __init__(
        self,
        factory: EnvFactory,
        given: Mapping[str, Any],
        *,
        num_envs: int,
        total_steps: int,
        eval_interval: int | None,
        num_eval_episodes: int,
        eval_deterministic: bool,
        max_env_restarts: int,
        info_keys: Sequence[str],
        metric_names: MetricNames,
        env_timeout_s: float,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        args, kwargs = vars(self).pop("constructor_arguments", ((), {}))
        self.hyperparameters = Hyperparameters(self, given, subclass_arguments(type(self), RunModule, args, kwargs))
        self.env_factory, self.info_keys, self.env_timeout_s = factory, tuple(info_keys), env_timeout_s
        self.env_provider = EnvProvider(
            factory, num_envs, timeout_s=env_timeout_s, restarts=max_env_restarts, info_keys=self.info_keys
        )
        self.observation_space, self.action_space = self.env_provider.observation_space, self.env_provider.action_space
        check_mask(self.observation_space, self.action_space)
        self.total_steps = total_steps
        self.eval_interval, self.num_eval_episodes = eval_interval, num_eval_episodes
        self.eval_deterministic, self.metric_writer = eval_deterministic, MetricWriter(metric_names)
        for counter in ("env_steps", "iterations", "n_updates"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64))
        self.seed: int | None = None
        self.generator = torch.Generator()
        self.ranks, self.records, self.clock = Ranks(), Records(), Clock()
        self._logged: set[str] = set()
        """Names of the last iteration's metrics."""
        self.schedule_metrics: dict[str, float] = {}
        """Metrics of callbacks that change schedules or environments, logged with each iteration."""
        self.stop_signal: Signals | None = None
        """The signal that asked this rank to stop."""
        self.agreed_stop_signal: Signals | None = None
        """The signal by which the run stops, as all ranks have agreed."""
        self.run_folder: Path | None = None
        """Folder of the last fit, whose files another fit of this model may replace."""

    def make_rollouts(
        self, num_steps: int, num_minibatches: int, *, sequence_length: int | None, compilation: Compilation
    ) -> None:
        """Train on rollouts of the environments; arguments as of :class:`RolloutDataset`. The policy is set."""
        self.rollouts = RolloutDataset(
            cast(Any, self),
            self.env_provider,
            num_steps=num_steps,
            num_minibatches=num_minibatches,
            sequence_length=sequence_length,
            compilation=compilation,
        )
        signature = env_signature(self.hparams, self.num_envs)
        self.run_state = RunState(self.rollouts, self.generator, signature, self.env_factory.name)

    # --- a run, in the order of its parts -----------------------------------------------------------------------------

    @LightningModule.trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Attach a Trainer, and let it find the checkpoints of earlier runs."""
        cast(Any, LightningModule.trainer).fset(self, trainer)
        self.ranks = Ranks(trainer)
        if isinstance(trainer, Trainer):
            find_checkpoints(trainer)

    @override
    def setup(self, stage: str) -> None:
        """Agree on a seed, refuse misleading settings, and replace Lightning's defaults by those that suit PPO."""
        for _, buffer in self.all_buffers():
            # Spawned ranks share all tensors. Lightning gives each rank buffers of its own, but knows not those that count.
            if buffer.device.type == "cpu" and buffer.is_shared():
                buffer.data = buffer.data.clone()
        prepare_trainer(self.trainer)
        self.seed = self.trainer.strategy.broadcast(resolve_seed(self.seed))
        if stage != "fit":
            return
        remaining = ceil((self.total_steps - self.num_env_steps) / self.steps_per_iteration)
        has_moments = any(isinstance(one, RunningMoments) for one in self.modules())
        check_trainer(self.trainer, remaining, running_moments=has_moments)
        if self.env_factory.for_evaluation() is None:
            rank_zero_info(
                f"no evaluations: {self.env_factory.name} was given as a VectorEnv, and evaluation needs environments of "
                "its own; give a callable that makes it instead"
            )
            cast(Any, self.trainer).limit_val_batches = 0

    def begin_fit(self) -> None:
        """Check a checkpoint's optimizer, seed this rank's generator, and stop at once where nothing is left to train."""
        scheduler = next(iter(self._schedulers), None)
        self._optimizer_hparams = OptimizerHparams(self._optimizer, scheduler, self.run_state.pop_checkpoint())
        rank_zero_info(f"seed {self.seed}")
        more = {"total_steps": self.total_steps, "seed": self.seed, "processes": self.ranks.world_size}
        self._hparams_initial = self.hyperparameters.for_loggers(self._optimizer, **more)  # Lightning logs these next
        self.generator.manual_seed(self._derive_seed("training"))
        self.env_provider.restarts.count = 0
        self.clock = Clock()
        if self.num_env_steps >= self.total_steps:
            rank_zero_info(
                f"{self.num_env_steps:,} environment steps are trained already, total_steps is {self.total_steps:,}: "
                "raise total_steps to continue"
            )
            self.trainer.should_stop = True

    def resume(self) -> None:
        """Restore the state of a checkpoint or of the last fit, and share memory between ranks."""
        restart_epoch(self.trainer, self.policy_version)
        self.run_state.resume(self._optimizer, self._schedulers, self.ranks)
        self._optimizer_hparams.restore()
        self.ranks.share_memory(parameters_of(self._optimizer))

    @torch.no_grad()
    def count(self, rollout: TensorDict, *, epochs: int) -> None:
        """Count an iteration: steps and episodes of all ranks, and the moments of the rollout's observations.

        Args:
            rollout: [T, N], that the policy has been updated on.
            epochs: of that update.
        """
        valid, episodes = rollout["valid"], self.rollouts.episodes
        if self.policy.moments is not None:
            seen = self.policy.normalizable_features(rollout["observation"][valid])
            self.policy.moments.merge(self.ranks.gather(RunningMoments.batch_moments(seen)))
        self.iterations += 1
        self.n_updates += epochs
        compares = self.ranks.world_size > 1 and self.policy_version % CHECK_INTERVAL == 0
        own = Counts(
            int(valid.sum()),
            torch.cat([episodes.finished, episodes.steps[:, None]], 1),
            self.stop_signal or 0,
            fingerprint(parameters_of(self._optimizer)) if compares else (0, 0),
            bool(self.rollouts.info_sums),
        )
        counts, fingerprints = gather_counts(own, self.ranks, EpisodeStatistics.BUFFER_SIZE)
        self.env_steps += counts.env_steps
        episodes.extend(counts.episodes[:, :4])
        if counts.signal:
            self.agreed_stop_signal = Signals(counts.signal)
        if compares:
            self.ranks.check_in_sync(fingerprints, self.policy_version)
        if counts.has_info:
            self.rollouts.info_sums = merge_sums(self.ranks.gather_objects(self.rollouts.info_sums))
        self.rollouts.unconsumed = False
        self.run_state.rollback.discard()

    def run_metrics(self) -> dict[str, float]:
        """Counters and times of an iteration, and the averages of what environments reported in ``info``."""
        return {
            **means(self.rollouts.info_sums),
            **self.clock.lap(self.num_env_steps),
            "time/iterations": self.policy_version,
            "time/total_timesteps": self.num_env_steps,
            "time/collect": self.rollouts.collect_seconds,
            "train/n_updates": int(self.n_updates),
        }

    def log_iteration(self, metrics: dict[str, float]) -> None:
        """Log and record all metrics of this iteration.

        Metrics of the last iteration that this one lacks (no episode has ended since a level began) are forgotten.

        Args:
            metrics: under our names, the same on all ranks.
        """
        for name in self._logged - metrics.keys():
            self.trainer.callback_metrics.pop(name, None)
        self._logged = set(metrics)
        self.records.add_iteration(self.num_env_steps, metrics)
        self.log_metrics(metrics)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log metrics at once: one ``self.log`` per metric costs more than an update.

        Loggers receive those of an iteration by the Trainer's ``log_every_n_steps``, callbacks can monitor all.

        Args:
            metrics: under our names, the same on all ranks.
            step: environment steps that they belong to; None is now.
        """
        trainer = cast(Any, self.trainer)
        of_iteration = step is None and trainer.training
        if not of_iteration or is_last_iteration(trainer) or trainer._logger_connector.should_update_logs:
            self.metric_writer.write(self.loggers, metrics, self.num_env_steps if step is None else step)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)  # one by one they take five times as long
        self.trainer.callback_metrics.update(zip(metrics, values.unbind(), strict=True))

    @override
    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """As Lightning's, with batch size 1, so that Lightning does not look for one in a rollout."""
        super().log(name, value, *args, batch_size=batch_size or 1, **kwargs)

    @override
    def on_fit_end(self) -> None:
        """Save the state for another fit."""
        self._save_for_refit()

    def rollback_update(self) -> None:
        """Undo the changes of an unfinished update or evaluation: checkpoints hold the end of an iteration."""
        restore_modes(self.trainer)
        self.run_state.rollback.rollback()
        self._save_for_refit()

    def _save_for_refit(self) -> None:
        if self.trainer.optimizers:
            self.run_state.save_for_refit(self._optimizer, self._schedulers, self.ranks)

    # --- evaluation ---------------------------------------------------------------------------------------------------

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
        """The same as a validation, over other episodes, since validations have chosen the best checkpoint."""
        self._log_evaluation("test")

    @checked(num_episodes=ONE_OR_MORE)
    def evaluate(
        self, num_episodes: int | None = None, deterministic: bool | None = None, *, purpose: str = "evaluation"
    ) -> dict[str, float]:
        """Run exactly ``num_episodes`` episodes on environments of their own, shared among all ranks.

        Training is not affected: neither its environments nor its random state change. The episodes depend on the seed and
        the environment steps trained so far, so the same checkpoint gives the same result.

        Args:
            num_episodes: default ``num_eval_episodes``.
            deterministic: default ``eval_deterministic``.
            purpose: ``evaluation`` has the episodes of validations, ``test`` others, since validations choose checkpoints.

        Returns:
            ``eval/mean_reward``, ``std_reward``, ``min_reward``, ``max_reward``, ``mean_ep_length``, ``success_rate`` where the
            environment reports success, and ``cut_episodes`` where an environment without a time limit did not end some
            within ``steps_per_eval_episode``: they are truncated there.

        Raises:
            InputError: the environment was given as a VectorEnv that cannot be made again.
        """
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
            statistics = self.evaluate(purpose=purpose)
        except BaseException:
            restore_training_weights(self.trainer)
            raise
        metrics = self.trainer.callback_metrics  # where Lightning keeps those of earlier evaluations
        for name in [name for name in metrics if name.startswith("eval/") and may_come_later(name)]:
            if name not in statistics:
                del metrics[name]
        # All ranks have gathered the same statistics; sync_dist tells Lightning so.
        renames = bool(self.loggers) and self.metric_writer.names != "sb3"
        self.log_dict(statistics, sync_dist=self.ranks.world_size > 1, logger=False if renames else None)
        if renames:
            self.metric_writer.write(self.loggers, statistics, self.num_env_steps)
        self.exclude_from_fps(time.perf_counter() - started)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a policy needs beyond weights, and the state from which a run resumes."""
        plain, not_saved = self.hyperparameters.for_checkpoint(checkpoint["hyper_parameters"])
        checkpoint["hyper_parameters"] = {**plain, "total_steps": self.total_steps}  # it may have been raised since
        checkpoint["state_dict"] = with_run_buffers(self, checkpoint["state_dict"])
        checkpoint[CHECKPOINT_KEY] = {**checkpoint_contents(self), "not_saved": not_saved}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint for other spaces before its weights are touched."""
        fits = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        check_checkpoint(self, checkpoint, fits=fits)
        self.run_state.load(checkpoint, fits=fits)
        self.trained_with_masks = checkpoint[CHECKPOINT_KEY].get("masked", False)
        self.seed = seed_of_checkpoint(checkpoint[CHECKPOINT_KEY]["seed"], self.seed)
        self.rollouts.load(checkpoint[CHECKPOINT_KEY])

    @override
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """A model with the weights and hyperparameters of a checkpoint; keywords replace hyperparameters.

        Raises:
            InputError: the file is damaged, not ours, needs something that it cannot hold, or names something that no
                file may.
        """
        with loading(checkpoint_path, kwargs, defaults_of(cls)) as (file, given, unresolved):
            model = super().load_from_checkpoint(file, *args, **given)
            model.hyperparameters.unresolved.extend(unresolved)
        return cast(Self, model)

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, **hyperparameters: Any) -> Self:
        """A model from the Hugging Face Hub, or from a folder with the same files (docs/hub.md).

        Args:
            source: user/repo, or the folder's path.
            revision: branch, tag or commit of a repository; None is its newest.
            hyperparameters: that replace those of the config.

        Raises:
            InputError: there is no such repository or folder, it holds no policy, needs something that no file can hold, or
                names something that no file may.
        """
        tool = import_module("ppo_lightning.tools.hub")
        return tool.load_pretrained(cls, source, revision, hyperparameters)

    @override
    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers that are weights: all except counters, other integers, and running statistics.

        ``WeightAveraging`` and ``AveragedModel`` iterate over ``parameters()`` and ``buffers()``. Counters and running
        statistics must not be averaged. ``state_dict`` has all.
        """
        statistics = statistics_of(self)
        for name, one in self.all_buffers(prefix, recurse, remove_duplicate):
            if one.is_floating_point() and id(one) not in statistics:
                yield name, one

    def all_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """All buffers by name."""
        return super().named_buffers(prefix, recurse, remove_duplicate)

    # --- counters and seeds -------------------------------------------------------------------------------------------

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
    def progress(self) -> float:
        """Share of ``total_steps`` that is trained, 0 to 1."""
        return min(1.0, self.num_env_steps / self.total_steps)

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of a rollout, over all environments and ranks."""
        return self.num_steps * self.num_envs * self.ranks.world_size

    @property
    def iterations_between_evaluations(self) -> int:
        """``eval_interval``, or what makes at most 20 evaluations over the run."""
        return self.eval_interval or ceil(self.total_steps / (20 * self.steps_per_iteration))

    @property
    def steps_per_eval_episode(self) -> int:
        """Steps that an evaluation episode may take where the environment has no time limit.

        All episodes together take no more steps than the training between two evaluations.
        """
        return self.iterations_between_evaluations * self.steps_per_iteration // self.num_eval_episodes

    def environment_seed(self) -> int:
        """Seed of this rank's first environment, which a resumed run changes."""
        self.seed = resolve_seed(self.seed)
        return self.seed + self.num_env_steps + self.ranks.rank * self.num_envs

    def evaluation_seed(self, purpose: str = "evaluation") -> int:
        """Seed of the episodes of an evaluation, which depends on the run's seed and the environment steps so far."""
        self.seed = resolve_seed(self.seed)
        return self._derive_seed(purpose)

    def _derive_seed(self, purpose: str) -> int:
        assert self.seed is not None
        return derive_seed(self.seed, purpose, self.ranks.rank, self.num_env_steps)

    # --- for users and callbacks --------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """The run so far, including before it was resumed: steps, seconds, metrics and their histories, checkpoints.

        Returns:
            EmbodiChain's keys and ApexRL's, as :func:`~ppo_lightning.runs.history.summarize_records` has them.
        """
        return summarize_records(
            self.records,
            env_steps=self.num_env_steps,
            iterations=self.policy_version,
            episodes=self.rollouts.episodes.ep_info_buffer,
            **checkpoint_paths(self._trainer),
        )

    def exclude_from_fps(self, seconds: float) -> None:
        """Exclude time that was not spent on training from ``time/fps``."""
        self.clock.add_evaluation(seconds)

    def close_environments(self) -> None:
        """Stop all simulators and their worker processes; the next use starts new ones."""
        self.rollouts.close()
        self.env_provider.close_eval_envs()

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))

    @property
    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    # --- copies -------------------------------------------------------------------------------------------------------

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with weights and counters of its own; a VectorEnv that the user made is the same in both."""
        if self.env_factory.is_instance:
            memo[id(self.env_factory.env)] = self.env_factory.env
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made
