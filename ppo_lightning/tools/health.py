"""The monitor that says what is wrong with a run, and changes it where it is asked to."""

import inspect
import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
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

from ppo_lightning.callbacks.adaptive_lr import AdaptiveLearningRate
from ppo_lightning.callbacks.stages import Stages
from ppo_lightning.errors import InputError
from ppo_lightning.module import PPOModule
from ppo_lightning.parameters import Linear, checked
from ppo_lightning.policy import ActorCritic, Policy
from ppo_lightning.policy.distributions import DiagonalGaussian, Joint
from ppo_lightning.rollout.dataset import EpisodeStatistics
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.runs.ranks import fingerprint
from ppo_lightning.spaces import choices, leaves
from ppo_lightning.tools.diagnosis import (
    METRICS,
    REMEDIES,
    Row,
    Run,
    Symptom,
    Thresholds,
    diagnose,
    has_risen,
    is_well,
    look,
    mean,
)


class Finding(TypedDict):
    """Something that is wrong, as plain data."""

    name: str
    since_step: int
    """Environment steps when it was found."""
    since_iteration: int
    until_step: int | None
    """Environment steps when it was over; None while it holds."""
    value: float
    """What is out of range, when it was found."""
    healthy: str
    """The range."""
    evidence: str
    advice: str
    key: str
    """Of the configuration, to change first."""


class Act(TypedDict):
    """Something that the monitor has changed, as plain data."""

    step: int
    iteration: int
    finding: str
    """Why."""
    key: str
    """Of the configuration: what was changed."""
    factor: float
    """By which it was multiplied."""
    to: float
    """What it is now: of a schedule its start."""


FIRST_EPISODES = 20
"""Episodes that tell where the return began."""

REWARDS = ("rollout/reward_min", "rollout/reward_max")
"""Metrics one of which is not zero where there were rewards."""


def _finite(value: float) -> float:
    """What JSON can hold of a number, to four digits."""
    return float(f"{max(-1e300, min(1e300, value)):.4g}")


HALVES = ("learning_rate_too_high", "clip_fraction_too_high", "value_loss_exploding", "non_finite")
"""Findings upon which the learning rate is lowered."""

EXPLORES = ("entropy_collapsed", "std_collapsed")
"""Findings upon which ent_coef is raised."""


class HealthMonitor(Callback):
    """Says what is wrong with a run, by which numbers, and what to change. Every run has one.

    It compares means over a window of iterations with :class:`Thresholds`, names the first cause that it finds, prints it
    once, and a summary at the end. The run's folder gets ``health.json`` (findings, acts, thresholds), TensorBoard a text,
    and each logger ``health/alerts``, the number of findings that hold, when it changes.

    Args:
        act: change what can be changed: halve the learning rate where the policy moves too far, double ent_coef where it
            no longer explores; at most once per window, within the bounds of the thresholds, and noted.
        thresholds: where a number stops being healthy.

    Raises:
        InputError: ``act`` is on beside an lr_scheduler, AdaptiveLearningRate or Stages, or a threshold cannot be used.
    """

    @checked("HealthMonitor: {}")
    def __init__(self, act: bool = False, thresholds: Thresholds | None = None) -> None:
        self.act = act
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self._given: Linear | None = None
        self._folder: Path | None = None
        self._skipped = 0.0
        self._critic_parameters: list[Parameter] = []
        self._network_parameters: frozenset[str] = frozenset()
        self._forget()

    def _forget(self) -> None:
        self.findings: list[Finding] = []
        """What was found, in the order of time; ``until_step`` is None while it holds."""
        self.acts: list[Act] = []
        """What was changed."""
        self.steps = self.iterations = 0
        """Environment steps and iterations that were looked at."""
        self._rows: deque[Row] = deque(maxlen=self.thresholds.window)
        self._first: Row | None = None
        self._start: tuple[float, float] | None = None
        self._worst_kl = -math.inf
        self._lowest_value_loss = math.inf
        self._rewarded = 0
        """Iterations with rewards."""
        self._later_episodes = 0
        """Episodes that ended after those that ``_start`` is of."""
        self._doubted = 0
        """Last iteration in which not all was well."""
        self._critic: tuple[int, int] | None = None
        """Fingerprint of the critic's parameters at the last look."""
        self._seen: dict[str, int] = {}
        """Iteration in which each finding held last."""

    # --- what it says -------------------------------------------------------------------------------------------------

    @property
    def alerts(self) -> list[Finding]:
        """The findings that hold."""
        return [finding for finding in self.findings if finding["until_step"] is None]

    @property
    def diagnosis(self) -> str:
        """What was found and done, for people."""
        found = [
            f"  {finding['name']} from step {finding['since_step']:,} "
            + ("on" if finding["until_step"] is None else f"to {finding['until_step']:,}")
            + f": {finding['key']}"
            for finding in self.findings
        ]
        done = [f"  {_told(act)}" for act in self.acts]
        return "\n".join([f"health: {len(found) or 'nothing'} found in {self.iterations} iterations", *found, *done])

    def report(self) -> dict[str, Any]:
        """All of it as plain data: what ``health.json`` holds."""
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
                "out act, or that"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PPOModule, pl_module)
        folder = trainer.log_dir if trainer.loggers else None  # all processes ask: the answer is broadcast
        self._folder = None if folder is None or "://" in folder else Path(folder)
        discrete = not any(isinstance(leaf, Box) for leaf in leaves(module.action_space).values())
        self._most_entropy = sum(map(math.log, choices(module.action_space))) if discrete else math.nan
        self._given, self._skipped = None, 0.0
        self._critic_parameters = cast(
            Policy, pl_module.policy
        ).critic_parameters  # to find them takes as long as to look
        self._network_parameters = _configurable(cast(Policy, pl_module.policy).network)
        if module.policy_version != self.iterations:  # another run than the one that was looked at
            self._forget()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._given is None:  # not before: by now the optimiser's own numbers have been put back
            module = cast(PPOModule, pl_module)
            self._given = module.schedules["ent_coef"]
            for act in self.acts:
                _apply(act, trainer, module, self)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module, metrics, t = cast(PPOModule, pl_module), trainer.callback_metrics, self.thresholds
        self.steps, self.iterations = module.num_env_steps, module.policy_version
        numbers = {field: metrics[name].item() if name in metrics else math.nan for name, field in METRICS.items()}
        row = Row(self.iterations, **numbers)
        if not row.explained_variance >= t.explained_variance_alert:
            looks = self.iterations % max(1, t.window // 3) == 0
            looked = {**look(batch), "frozen": self._is_frozen(pl_module)} if looks else {"blind": math.nan}
            row = row._replace(**{"frozen": math.nan, **looked})
        self._remember(row, metrics, module)

        symptoms: list[Symptom | None] = []
        skipped = metrics["train/skipped_steps"].item() if "train/skipped_steps" in metrics else 0.0
        if skipped > self._skipped:
            seen = f"the gradients of {skipped:.0f} steps of this run were not finite, and left out"
            symptoms.append(Symptom("non_finite", skipped, seen))
        self._skipped = skipped
        if len(self._rows) == t.window and self._is_doubtful(module):
            symptoms.append(diagnose(self._rows, self._run(module), t))
        changed = [self._note(symptom, pl_module) for symptom in symptoms if symptom is not None]
        for finding in self.alerts:
            if self.iterations - self._seen[finding["name"]] >= t.window:
                finding["until_step"] = self.steps
                changed.append(True)
        if self.act:
            # Processes have looked at their own observations: the first one's view counts.
            names = [symptom.name for symptom in symptoms if symptom is not None]
            changed += [self._do(name, trainer, module) for name in trainer.strategy.broadcast(names)]
        if any(changed):
            self._mark(trainer)
            self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back(pl_module)
        self._write(trainer)
        if self.findings or self.iterations >= self.thresholds.window:
            pl_module.print(self.diagnosis)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back(pl_module)
        ended_by = Symptom("non_finite", self._skipped + 1, str(exception))
        if isinstance(exception, FloatingPointError) and self._note(ended_by, None):
            self._mark(trainer)
        self._write(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the next finding and act depend on, as plain data."""
        return {
            **self.report(),
            "rows": [list(row) for row in self._rows],
            "first": None if self._first is None else list(self._first),
            "start": None if self._start is None else list(self._start),
            "worst_kl": self._worst_kl,
            "lowest_value_loss": self._lowest_value_loss,
            "rewarded": self._rewarded,
            "later_episodes": self._later_episodes,
            "doubted": self._doubted,
            "critic": None if self._critic is None else list(self._critic),
            "seen": dict(self._seen),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.findings = [cast(Finding, dict(finding)) for finding in state_dict["findings"]]
        self.acts = [cast(Act, dict(act)) for act in state_dict["acts"]]
        self.steps, self.iterations = state_dict["steps"], state_dict["iterations"]
        self._rows = deque((Row(*row) for row in state_dict["rows"]), maxlen=self.thresholds.window)
        first, start = state_dict["first"], state_dict["start"]
        self._first = None if first is None else Row(*first)
        self._start = None if start is None else (start[0], start[1])
        self._worst_kl, self._lowest_value_loss = state_dict["worst_kl"], state_dict["lowest_value_loss"]
        self._rewarded, self._later_episodes = state_dict["rewarded"], state_dict["later_episodes"]
        critic = state_dict["critic"]
        self._critic = None if critic is None else (critic[0], critic[1])
        self._doubted, self._seen = state_dict["doubted"], dict(state_dict["seen"])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _remember(self, row: Row, metrics: Mapping[str, Tensor], module: PPOModule) -> None:
        self._rows.append(row)
        self._rewarded += any(metrics[name] != 0 for name in REWARDS if name in metrics)
        self._first = self._first or row
        self._worst_kl = max(self._worst_kl, row.approx_kl)
        if self._rewarded >= self.thresholds.window:  # before there are rewards, a critic loses nothing
            self._lowest_value_loss = min(self._lowest_value_loss, mean(each.value_loss for each in self._rows))
        if not is_well(row, self.thresholds, self._most_entropy):
            self._doubted = self.iterations
        if self._start is None and len(module.rollouts.episodes.window) >= FIRST_EPISODES:
            returns = [episode[0] for episode in module.rollouts.episodes.window]
            error = statistics.pstdev(returns) * math.sqrt(1 / len(returns) + 1 / EpisodeStatistics.WINDOW)
            self._start = statistics.fmean(returns), error
        elif self._start is not None and "rollout/episodes" in metrics:
            self._later_episodes += int(metrics["rollout/episodes"])

    def _is_frozen(self, pl_module: LightningModule) -> float:
        """Whether the critic is as it was at the last look; NaN where that cannot be told."""
        if not self._critic_parameters:  # it shares all of them, or none of them learns
            return math.nan if cast(Policy, pl_module.policy).halves[1].any() else 1.0
        before, self._critic = self._critic, fingerprint(self._critic_parameters)
        return math.nan if before is None else float(before == self._critic)

    def _is_doubtful(self, module: PPOModule) -> bool:
        """Whether there is anything to diagnose, which takes ten times as long to find out otherwise."""
        t = self.thresholds
        late = self.steps >= t.stall * module.total_steps
        return self.iterations - self._doubted < t.window or (
            late and not has_risen(mean(row.ep_return for row in self._rows), self._start, t)
        )

    def _run(self, module: PPOModule) -> Run:
        t = self.thresholds
        assert self._first is not None
        return Run(
            min(1.0, self.steps / module.total_steps),
            self._rewarded >= t.warmup_iterations + t.window,
            self.iterations >= t.warmup_iterations + t.window and self._later_episodes >= 2 * EpisodeStatistics.WINDOW,
            self._first,
            self._start,
            self._worst_kl,
            self._lowest_value_loss,
            self._most_entropy,
        )

    def _note(self, symptom: Symptom, pl_module: LightningModule | None) -> bool:
        """Keep what was found, and say it to whoever is there; whether that is a change."""
        self._seen[symptom.name] = self.iterations
        for finding in self.findings:
            if finding["name"] == symptom.name:
                changed, finding["until_step"] = finding["until_step"] is not None, None
                return changed
        remedy, evidence = REMEDIES[symptom.name], symptom.evidence
        if symptom.name == "critic_not_learning" and pl_module is not None:
            frozen = [name for name, value in pl_module.named_parameters() if not value.requires_grad]
            if frozen:
                evidence += f"; {len(frozen)} parameters are frozen (requires_grad is false), {frozen[0]} the first"
        key, advice = remedy.for_network(self._network_parameters)
        finding = Finding(
            name=symptom.name,
            since_step=self.steps,
            since_iteration=self.iterations,
            until_step=None,
            value=_finite(symptom.value),
            healthy=remedy.healthy(self.thresholds),
            evidence=evidence,
            advice=advice,
            key=key,
        )
        self.findings.append(finding)
        if pl_module is not None:
            pl_module.print(_sentence(finding))
        return True

    def _do(self, name: str, trainer: Trainer, module: PPOModule) -> bool:
        """Change what the finding asks for, if it is time and within the bounds; whether anything was changed."""
        t = self.thresholds
        if name in HALVES:
            key = "--model.optimizer.lr"
        elif name in EXPLORES:
            key = "--model.ent_coef"
        else:
            return False
        before = [act for act in self.acts if act["key"] == key]
        if before and self.iterations - before[-1]["iteration"] < t.window:
            return False
        if name in HALVES:
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
        act = Act(step=self.steps, iteration=self.iterations, finding=name, key=key, factor=factor, to=to)
        self.acts.append(act)
        _apply(act, trainer, module, self)
        cast(LightningModule, module).print(f"health: {_told(act)}")
        return True

    def _give_back(self, pl_module: LightningModule) -> None:
        """Leave the module as the user made it: another fit applies the acts anew."""
        if self._given is not None:
            cast(PPOModule, pl_module).schedules.release(self)
            self._given = None

    def _mark(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"health/alerts": len(self.alerts)}, step=self.steps)
            if isinstance(logger, TensorBoardLogger):
                text = [f"**{finding['name']}** {finding['evidence']}. {finding['advice']}" for finding in self.alerts]
                done = [_told(act) for act in self.acts]
                logger.experiment.add_text("health", "\n\n".join([*text, *done]) or "nothing found", self.steps)

    def _write(self, trainer: Trainer) -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        try:
            write_atomically(self._folder / "health.json", json.dumps(self.report(), indent=1).encode())
        except OSError as error:
            rank_zero_warn(f"health.json could not be written into {self._folder} ({error}): the run goes on")
            self._folder = None


def _apply(act: Act, trainer: Trainer, module: PPOModule, owner: object) -> None:
    """Change what it says, from the next iteration on."""
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
    """Parameters of :class:`ActorCritic` that the network's class takes; none of another network."""
    if not isinstance(network, ActorCritic):
        return frozenset()
    known = set(inspect.signature(ActorCritic).parameters)
    distribution = network.distribution
    parts = distribution.parts.values() if isinstance(distribution, Joint) else [distribution]
    if not any(isinstance(part, DiagonalGaussian) for part in parts):
        known.remove("log_std_init")
    own = inspect.signature(type(network)).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    return frozenset(known if passes_on else known & own.keys())


def _told(act: Act) -> str:
    name = act["key"].removeprefix("--model.")
    return f"{name} is {act['to']:.3g} from step {act['step']:,} on, since {act['finding']}"


def _sentence(finding: Finding) -> str:
    """What is printed when it is found."""
    head = (
        f"health: {finding['name']}, found at step {finding['since_step']:,} (iteration {finding['since_iteration']})"
    )
    said = (("seen", finding["evidence"]), ("do", finding["advice"]))
    lines = (fill(f"{word + ':':<6}{text}", 79, initial_indent="  ", subsequent_indent=" " * 8) for word, text in said)
    return "\n".join([head, *lines])
