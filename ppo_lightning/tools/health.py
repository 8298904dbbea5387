"""The monitor that diagnoses a run and, if enabled, intervenes."""

import inspect
import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, TypedDict, cast

from gymnasium.spaces import Box
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter
from typing_extensions import override

from ppo_lightning.callbacks.stages import AdaptiveLearningRate, Stages
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import Linear, checked
from ppo_lightning.policy import ActorCritic, Policy
from ppo_lightning.policy.distributions import Composite, DiagonalGaussian
from ppo_lightning.rollout.episodes import EpisodeStatistics
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.runs.loggers import TolerantLogger
from ppo_lightning.runs.ranks import fingerprint
from ppo_lightning.spaces import action_dims, flatten_spaces
from ppo_lightning.tools.diagnosis import (
    METRICS,
    REMEDIES,
    Diagnosis,
    IterationStats,
    RunStats,
    Thresholds,
    diagnose,
    inspect_rollout,
    is_healthy,
    mean,
    return_has_risen,
)


class Finding(TypedDict):
    """A diagnosed problem, as plain data."""

    name: str
    since_step: int
    """Environment steps at the diagnosis."""
    since_iteration: int
    until_step: int | None
    """Environment steps at its end; None while it holds."""
    value: float
    """Of the unhealthy metric at the diagnosis."""
    healthy: str
    """The range."""
    evidence: str
    advice: str
    key: str
    """Configuration key to change first."""


class Intervention(TypedDict):
    """A change of a hyperparameter by the monitor, as plain data."""

    step: int
    iteration: int
    finding: str
    """The reason."""
    key: str
    """Configuration key that was changed."""
    factor: float
    """By which the value was multiplied."""
    to: float
    """The new value; of a schedule its start."""


FIRST_EPISODES = 20
"""Episodes whose mean is the initial return."""

REWARDS = ("rollout/reward_min", "rollout/reward_max")
"""One of these metrics is not zero if there were rewards."""


def _finite(value: float) -> float:
    """A finite number of four digits, for JSON."""
    return float(f"{max(-1e300, min(1e300, value)):.4g}")


LOWER_LR_ON = ("learning_rate_too_high", "clip_fraction_too_high", "value_loss_exploding", "non_finite")
"""Findings that lower the learning rate."""

RAISE_ENTROPY_ON = ("entropy_collapsed", "std_collapsed")
"""Findings that raise ent_coef."""


class HealthMonitor(Callback):
    """Diagnoses problems of a run, with evidence and advice. Every run has one.

    It compares means over a window of iterations with :class:`Thresholds`, and prints the first cause of unhealthy metrics
    once, and a summary at the end. It writes ``health.json`` (findings, acts, thresholds) into the run's folder, a text to
    TensorBoard, and ``health/alerts``, the number of findings that hold, to each logger when it changes.

    Args:
        act: intervene: halve the learning rate if the policy changes too much, double ent_coef if it no longer explores; at
            most once per window, within the bounds of the thresholds.
        thresholds: limits of healthy metrics.

    Raises:
        InputError: ``act`` is combined with an lr_scheduler, AdaptiveLearningRate or Stages, or a threshold is invalid.
    """

    @checked("HealthMonitor: {}")
    def __init__(self, act: bool = False, thresholds: Thresholds | None = None) -> None:
        self.act = act
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self._is_applied = False
        self._folder: Path | None = None
        self._skipped = 0.0
        self._critic_parameters: list[Parameter] = []
        self._network_parameters: frozenset[str] = frozenset()
        self._forget()

    def _forget(self) -> None:
        self.findings: list[Finding] = []
        """In the order of time; ``until_step`` is None while a finding holds."""
        self.acts: list[Intervention] = []
        """Interventions, in the order of time."""
        self.steps = self.iterations = 0
        """Environment steps and iterations so far."""
        self._rows: deque[IterationStats] = deque(maxlen=self.thresholds.window)
        self._run = RunStats()
        self._critic: tuple[int, int] | None = None
        """Fingerprint of the critic's parameters at the last inspection."""
        self._seen: dict[str, int] = {}
        """Iteration in which each finding held last."""

    # --- results ------------------------------------------------------------------------------------------------------

    @property
    def alerts(self) -> list[Finding]:
        """The findings that hold."""
        return [finding for finding in self.findings if finding["until_step"] is None]

    @property
    def diagnosis(self) -> str:
        """Findings and interventions as text."""
        found = [
            f"  {finding['name']} from step {finding['since_step']:,} "
            + ("on" if finding["until_step"] is None else f"to {finding['until_step']:,}")
            + f": {finding['key']}"
            for finding in self.findings
        ]
        done = [f"  {_describe(act)}" for act in self.acts]
        return "\n".join([f"health: {len(found) or 'nothing'} found in {self.iterations} iterations", *found, *done])

    def report(self) -> dict[str, Any]:
        """The contents of ``health.json``, as plain data."""
        return {
            "findings": [dict(finding) for finding in self.findings],
            "acts": [dict(act) for act in self.acts],
            "thresholds": asdict(self.thresholds),
            "steps": self.steps,
            "iterations": self.iterations,
        }

    # --- Lightning's hooks --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self.act:
            return
        others: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        setters = [type(other).__name__ for other in others if isinstance(other, AdaptiveLearningRate | Stages)]
        if cast(PPOModule, pl_module).schedules.lr_scheduler:
            setters.append("lr_scheduler")
        if setters:
            raise InputError(
                f"HealthMonitor: act would change the learning rate or ent_coef, which {' and '.join(setters)} sets: leave "
                "out one of them"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        folder = trainer.log_dir if trainer.loggers else None  # a broadcast, in which all ranks take part
        self._folder = None if folder is None or "://" in folder else Path(folder)
        self._is_applied, self._skipped = False, 0.0
        policy = cast(Policy, pl_module.policy)
        self._critic_parameters = policy.critic_parameters  # once, since the search takes as long as an inspection
        self._network_parameters = _configurable(policy.network)
        if module.policy_version != self.iterations:  # another run
            self._forget()
        discrete = not any(isinstance(leaf, Box) for leaf in flatten_spaces(module.action_space).values())
        self._run.most_entropy = sum(map(math.log, action_dims(module.action_space))) if discrete else math.nan

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_applied:  # by now Lightning has restored the optimizer's state
            self._is_applied = True
            for act in self.acts:
                _apply(act, trainer, cast(PPOModule, pl_module), self)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module, metrics, t = cast(PPOModule, pl_module), trainer.callback_metrics, self.thresholds
        self.steps, self.iterations = module.num_env_steps, module.policy_version
        numbers = {field: metrics[name].item() if name in metrics else math.nan for name, field in METRICS.items()}
        row = IterationStats(self.iterations, **numbers)
        if not row.explained_variance >= t.explained_variance_alert:
            found = {"constant_observation": math.nan, "frozen_critic": math.nan}
            if self.iterations % max(1, t.window // 3) == 0:
                normalizer = cast(Policy, pl_module.policy).value_normalizer
                inspected = (
                    inspect_rollout(batch) if normalizer is None else inspect_rollout(batch, normalizer.normalize)
                )
                found |= {**inspected, "frozen_critic": self._is_frozen(pl_module)}
            row = row._replace(**found)
        level = module.schedule_metrics.get("curriculum/stage", 1.0)
        if level != self._run.level:  # whose returns are not comparable with those of the level before
            self._rows.clear()
            self._run = RunStats(level=level, most_entropy=self._run.most_entropy)
        self._remember(row, metrics, module)

        diagnoses: list[Diagnosis | None] = []
        skipped = metrics["train/skipped_steps"].item() if "train/skipped_steps" in metrics else 0.0
        if skipped > self._skipped:
            seen = f"the gradients of {skipped:.0f} steps of this run were not finite; these steps were skipped"
            diagnoses.append(Diagnosis("non_finite", skipped, seen))
        self._skipped = skipped
        if len(self._rows) == t.window and self._needs_diagnosis():
            diagnoses.append(diagnose(self._rows, self._run, t))
        changed = [self._record(diagnosis, pl_module) for diagnosis in diagnoses if diagnosis is not None]
        for finding in self.alerts:
            if self.iterations - self._seen[finding["name"]] >= t.window:
                finding["until_step"] = self.steps
                changed.append(True)
        if self.act:
            # Each rank inspects its own observations; the first rank decides.
            names = [diagnosis.name for diagnosis in diagnoses if diagnosis is not None]
            changed += [self._intervene(name, trainer, module) for name in trainer.strategy.broadcast(names)]
        if any(changed):
            self._log(trainer)
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)
        self._write(trainer)
        if self.findings or self.iterations >= self.thresholds.window:
            pl_module.print(self.diagnosis)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)
        ended_by = Diagnosis("non_finite", self._skipped + 1, str(exception))
        if isinstance(exception, FloatingPointError) and self._record(ended_by, None):
            self._log(trainer)
        self._write(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """All that later findings and interventions depend on, as plain data."""
        return {
            **self.report(),
            **vars(self._run),
            "first": None if self._run.first is None else list(self._run.first),
            "rows": [list(row) for row in self._rows],
            "critic": self._critic,
            "seen": dict(self._seen),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = [cast(Finding, dict(finding)) for finding in state_dict["findings"]]
        self.acts = [cast(Intervention, dict(act)) for act in state_dict["acts"]]
        self.steps, self.iterations = state_dict["steps"], state_dict["iterations"]
        self._rows = deque((IterationStats(*row) for row in state_dict["rows"]), maxlen=self.thresholds.window)
        self._run = RunStats(**{name: state_dict[name] for name in vars(self._run) if name in state_dict})
        self._run.first = None if state_dict["first"] is None else IterationStats(*state_dict["first"])
        self._critic, self._seen = state_dict["critic"], dict(state_dict["seen"])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _remember(self, row: IterationStats, metrics: Mapping[str, Tensor], module: PPOModule) -> None:
        t, run = self.thresholds, self._run
        self._rows.append(row)
        run.rewarded += any(metrics[name] != 0 for name in REWARDS if name in metrics)
        run.first = run.first or row
        run.worst_kl = max(run.worst_kl, row.approx_kl)
        if run.rewarded >= t.window:  # a critic has no loss before the first rewards
            run.lowest_value_loss = min(run.lowest_value_loss, mean(each.value_loss for each in self._rows))
        if not is_healthy(row, t, run.most_entropy):
            run.last_unhealthy = self.iterations
        if run.start is None and len(module.rollouts.episodes.ep_info_buffer) >= FIRST_EPISODES:
            returns = [episode[0] for episode in module.rollouts.episodes.ep_info_buffer]
            error = statistics.pstdev(returns) * math.sqrt(1 / len(returns) + 1 / EpisodeStatistics.BUFFER_SIZE)
            run.start = statistics.fmean(returns), error
        elif run.start is not None and "rollout/episodes" in metrics:
            run.later_episodes += int(metrics["rollout/episodes"])
        warm_iterations = t.warmup_iterations + t.window
        run.progress, run.warm = min(1.0, self.steps / module.total_steps), run.rewarded >= warm_iterations
        run.settled = self.iterations >= warm_iterations and run.later_episodes >= 2 * EpisodeStatistics.BUFFER_SIZE

    def _is_frozen(self, pl_module: LightningModule) -> float:
        """Whether the critic has not changed since the last inspection; NaN if unknown."""
        if not self._critic_parameters:  # all are shared with the actor, or frozen
            return math.nan if cast(Policy, pl_module.policy).actor_critic_masks[1].any() else 1.0
        before, self._critic = self._critic, fingerprint(self._critic_parameters)
        return math.nan if before is None else float(before == self._critic)

    def _needs_diagnosis(self) -> bool:
        """Whether a metric was unhealthy lately; a diagnosis takes ten times as long as this check."""
        t, run = self.thresholds, self._run
        return self.iterations - run.last_unhealthy < t.window or (
            run.progress >= t.stall and not return_has_risen(mean(row.ep_return for row in self._rows), run, t)
        )

    def _record(self, diagnosis: Diagnosis, pl_module: LightningModule | None) -> bool:
        """Record and print a finding; returns whether the alerts have changed."""
        self._seen[diagnosis.name] = self.iterations
        for finding in self.findings:
            if finding["name"] == diagnosis.name:
                changed, finding["until_step"] = finding["until_step"] is not None, None
                return changed
        remedy, evidence = REMEDIES[diagnosis.name], diagnosis.evidence
        if diagnosis.name == "critic_not_learning" and pl_module is not None:
            frozen = [name for name, value in pl_module.named_parameters() if not value.requires_grad]
            if frozen:
                evidence += f"; {len(frozen)} parameters are frozen (requires_grad is false), {frozen[0]} the first"
        key, advice = remedy.for_network(self._network_parameters)
        finding = Finding(
            name=diagnosis.name,
            since_step=self.steps,
            since_iteration=self.iterations,
            until_step=None,
            value=_finite(diagnosis.value),
            healthy=remedy.healthy(self.thresholds),
            evidence=evidence,
            advice=advice,
            key=key,
        )
        self.findings.append(finding)
        if pl_module is not None:
            pl_module.print(_format(finding))
        return True

    def _intervene(self, name: str, trainer: Trainer, module: PPOModule) -> bool:
        """Intervene for a finding, at most once per window and within the bounds; returns whether anything was changed."""
        t = self.thresholds
        if name in LOWER_LR_ON:
            key = "--model.optimizer.lr"
        elif name in RAISE_ENTROPY_ON:
            key = "--model.ent_coef"
        else:
            return False
        before = [act for act in self.acts if act["key"] == key]
        if before and self.iterations - before[-1]["iteration"] < t.window:
            return False
        if name in LOWER_LR_ON:
            factor = t.lr_factor
            to = trainer.optimizers[0].param_groups[0]["initial_lr"] * factor
            within = math.prod([factor, *(act["factor"] for act in before)]) >= t.lowest_lr
        else:
            line = module.schedules["ent_coef"]
            assert line is not None
            factor = t.ent_coef_factor
            to = line.start * factor if line.start or line.end else t.first_ent_coef
            within = max(to, line.end * factor) <= t.highest_ent_coef
        if not within:
            return False
        act = Intervention(step=self.steps, iteration=self.iterations, finding=name, key=key, factor=factor, to=to)
        self.acts.append(act)
        _apply(act, trainer, module, self)
        cast(LightningModule, module).print(f"health: {_describe(act)}")
        return True

    def _restore(self, pl_module: LightningModule) -> None:
        """Restore the user's schedule; another fit applies the interventions again."""
        if self._is_applied:
            cast(PPOModule, pl_module).schedules.release(self)
            self._is_applied = False

    def _log(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"health/alerts": len(self.alerts)}, step=self.steps)
            if isinstance(logger, TensorBoardLogger):
                text = [f"**{finding['name']}** {finding['evidence']}. {finding['advice']}" for finding in self.alerts]
                done = [_describe(act) for act in self.acts]
                said = "\n\n".join([*text, *done]) or "nothing found"
                write = partial(logger.experiment.add_text, "health", said, self.steps)
                if isinstance(logger, TolerantLogger):
                    logger.attempt(write)
                else:
                    write()

    def _write(self, trainer: Trainer) -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        try:
            write_atomically(self._folder / "health.json", json.dumps(self.report(), indent=1).encode())
        except OSError as error:
            rank_zero_warn(f"health.json could not be written into {self._folder} ({error}); training continues")
            self._folder = None


def _apply(act: Intervention, trainer: Trainer, module: PPOModule, owner: object) -> None:
    """Apply an intervention from the next iteration on."""
    if act["key"] == "--model.ent_coef":
        line = module.schedules["ent_coef"]
        assert line is not None
        factor = act["factor"]
        raised = Linear(line.start * factor, line.end * factor) if line.start or line.end else act["to"]
        module.schedules.override("ent_coef", raised, owner=owner)
    else:
        for group in trainer.optimizers[0].param_groups:
            group["initial_lr"] *= act["factor"]


def _configurable(network: Module) -> frozenset[str]:
    """Parameters of :class:`ActorCritic` that the network's class takes; empty for other networks."""
    if not isinstance(network, ActorCritic):
        return frozenset()
    known = set(inspect.signature(ActorCritic).parameters)
    distribution = network.distribution
    parts = distribution.parts.values() if isinstance(distribution, Composite) else [distribution]
    if not any(isinstance(part, DiagonalGaussian) for part in parts):
        known.remove("log_std_init")
    own = inspect.signature(type(network)).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    return frozenset(known if passes_on else known & own.keys())


def _describe(act: Intervention) -> str:
    name = act["key"].removeprefix("--model.")
    return f"{name} is {act['to']:.3g} from step {act['step']:,} on, since {act['finding']}"


def _format(finding: Finding) -> str:
    """The printed text of a new finding."""
    head = (
        f"health: {finding['name']}, found at step {finding['since_step']:,} (iteration {finding['since_iteration']})"
    )
    parts = (("seen", finding["evidence"]), ("do", finding["advice"]))
    lines = (fill(f"{word + ':':<6}{text}", 79, initial_indent="  ", subsequent_indent=" " * 8) for word, text in parts)
    return "\n".join([head, *lines])
