"""What is wrong with a run, by what one sees it, and what to change."""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple, Protocol, TypedDict, cast

import torch
from gymnasium.spaces import Box
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensordict import TensorDict
from torch import Tensor
from typing_extensions import override

from ppo_lightning.checkpoint import write_atomically
from ppo_lightning.errors import InputError
from ppo_lightning.parameters import Linear
from ppo_lightning.rollout import RolloutDataset
from ppo_lightning.spaces import choices, leaves


class Learns(Protocol):
    """What the monitor asks of the module."""

    ent_coef: Linear
    lr_scheduler: Callable[..., Any] | None
    total_steps: int
    action_space: Any
    rollouts: RolloutDataset

    @property
    def num_env_steps(self) -> int:
        """Environment steps so far."""
        ...

    @property
    def policy_version(self) -> int:
        """Iterations so far."""
        ...


@dataclass(frozen=True)
class Thresholds:
    """Where a number stops being healthy. Numbers are means over ``window`` iterations."""

    window: int = 10
    """Iterations over which means are taken: what begins and ends within them is no finding (count)."""
    warmup: float = 0.25
    """Share of total_steps in which the critic is not judged (0 to 1)."""
    warmup_iterations: int = 50
    """Iterations after which it is judged in any case (count)."""
    approx_kl: tuple[float, float] = (0.01, 0.03)
    """Healthy change of the policy per iteration (nats)."""
    approx_kl_alert: float = 0.05
    """Alert above, where clip_fraction is above its healthy range or the return does not rise; at twice this in any case."""
    clip_fraction: tuple[float, float] = (0.1, 0.3)
    """Healthy share of samples whose probability ratio leaves the clip range."""
    clip_fraction_alert: float = 0.5
    """Alert above."""
    explained_variance: float = 0.7
    """Healthy above."""
    explained_variance_alert: float = 0.3
    """Alert below, where the critic also misses by ``value_error``: returns that hardly vary leave nothing to explain."""
    value_error: float = 0.25
    """The critic's error that is an alert, as a share of the size of its targets (both root mean square)."""
    value_size: float = 1000.0
    """Size of the critic's targets that is too much for it, where it explains nothing (root mean square, reward units)."""
    value_loss_growth: float = 100.0
    """Growth of value_loss over its lowest mean that is an alert, where the critic explains nothing (ratio)."""
    entropy: float = 0.01
    """Lowest entropy of discrete actions, as a share of the most there can be."""
    std: float = 0.01
    """Lowest standard deviation of continuous actions (action units)."""
    rise: float = 0.5
    """The return has risen where it is so many standard deviations of the first episodes' returns above their mean."""
    stall: float = 0.5
    """Share of total_steps after which a return that has not risen is an alert (0 to 1)."""
    lr_factor: float = 0.5
    """What the learning rate is multiplied by in one act."""
    lowest_lr: float = 0.05
    """Share of the given learning rate below which no act takes it."""
    ent_coef_factor: float = 2.0
    """What ent_coef is multiplied by in one act."""
    first_ent_coef: float = 0.001
    """What the first act makes of an ent_coef of 0 (advantage units per nat)."""
    highest_ent_coef: float = 0.1
    """Above which no act takes ent_coef (advantage units per nat)."""

    def __post_init__(self) -> None:
        """Refuse what would never or always be an alert."""
        if self.window < 2:
            raise InputError(f"HealthMonitor: thresholds.window must be 2 or more iterations, got {self.window}")
        if not 0 < self.lr_factor < 1 < self.ent_coef_factor:
            raise InputError(
                f"HealthMonitor: thresholds.lr_factor must lie between 0 and 1 and ent_coef_factor above 1, got "
                f"{self.lr_factor} and {self.ent_coef_factor}"
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


class Symptom(NamedTuple):
    """What the numbers of a window say."""

    name: str
    value: float
    evidence: str


class Row(NamedTuple):
    """What is remembered of an iteration; NaN is what it has not."""

    iteration: float
    ep_return: float
    approx_kl: float
    clip_fraction: float
    explained_variance: float
    entropy_loss: float
    std: float
    value_loss: float
    value_size: float = math.nan
    """Of the critic's targets (root mean square); as the two below only where it explains little."""
    value_error: float = math.nan
    """Of the critic (root mean square)."""
    blind: float = 0.0
    """1 where all observations were the same; NaN where nobody has looked."""


class Run(NamedTuple):
    """What a window is judged by, beside its rows."""

    progress: float
    """Share of total_steps."""
    warm: bool
    """The critic may be judged."""
    first: Row
    """The run's first iteration."""
    start: tuple[float, float] | None
    """Mean and standard deviation of the returns of the first episodes."""
    worst_kl: float
    """The largest approx_kl so far."""
    lowest_value_loss: float
    """The lowest mean of value_loss over a window so far."""
    most_entropy: float
    """Of uniformly distributed discrete actions (nats); NaN where actions are not all discrete."""


METRICS = (
    "rollout/ep_rew_mean",
    "train/approx_kl",
    "train/clip_fraction",
    "train/explained_variance",
    "train/entropy_loss",
    "train/std",
    "train/value_loss",
)
"""In the order of :class:`Row`."""

FIRST_EPISODES = 20
"""Episodes that tell where the return began."""


class Remedy(NamedTuple):
    """What to do about a finding."""

    key: str
    advice: str
    healthy: Callable[[Thresholds], str]


REMEDIES = {
    "non_finite": Remedy(
        "--model.optimizer.lr",
        "lower --model.optimizer.lr, and look for observations or rewards of extreme size "
        "(--model.normalize_observation true, --model.normalize_reward true)",
        lambda t: "no skipped steps",
    ),
    "observation_constant": Remedy(
        "--model.env",
        "look at what the environment and --model.wrappers return: the policy cannot see",
        lambda t: "observations differ",
    ),
    "entropy_collapsed": Remedy(
        "--model.ent_coef",
        "raise --model.ent_coef (double it, from 0.001), and look at how the policy's output begins: it no longer explores",
        lambda t: f"above {t.entropy:g} of the most there can be",
    ),
    "std_collapsed": Remedy(
        "--model.policy.init_args.log_std_init",
        "raise log_std_init of the policy, or --model.ent_coef: it no longer explores",
        lambda t: f"above {t.std:g}",
    ),
    "learning_rate_too_high": Remedy(
        "--model.optimizer.lr",
        "halve --model.optimizer.lr; else lower --model.clip_range or --model.update_epochs, or set --model.target_kl 0.02",
        lambda t: f"{t.approx_kl[0]:g} to {t.approx_kl[1]:g}",
    ),
    "clip_fraction_too_high": Remedy(
        "--model.optimizer.lr",
        "halve --model.optimizer.lr, or lower --model.update_epochs: the policy moves further than it may be trusted",
        lambda t: f"{t.clip_fraction[0]:g} to {t.clip_fraction[1]:g}",
    ),
    "reward_too_large": Remedy(
        "--model.normalize_reward",
        "set --model.normalize_reward true or --model.popart.beta 0.0001, or scale the rewards by a wrapper",
        lambda t: f"values below {t.value_size:g}",
    ),
    "value_loss_exploding": Remedy(
        "--model.optimizer.lr",
        "halve --model.optimizer.lr, or set --model.clip_range_vf 0.2 or --model.normalize_reward true",
        lambda t: f"less than {t.value_loss_growth:g} times its lowest",
    ),
    "critic_not_learning": Remedy(
        "--model.policy.init_args.hidden_sizes",
        "give the critic more room (--model.policy.init_args.hidden_sizes [256,256]) or weight (--model.vf_coef), and see "
        "that its observations tell what is to come",
        lambda t: f"above {t.explained_variance:g}",
    ),
    "return_stalled": Remedy(
        "--model.optimizer.lr",
        "explore more (--model.ent_coef 0.01), look at the reward, or try another --model.optimizer.lr; a run that began "
        "at its best has nothing to mend",
        lambda t: "rising",
    ),
}
"""By the name of a finding; causes come before what follows from them."""


def diagnose(rows: Sequence[Row], run: Run, t: Thresholds) -> Symptom | None:
    """The first cause of what is wrong in a window, if anything is.

    One at a time: what follows from it (a stalled return, a critic that has nothing to see) is no finding of its own.

    Args:
        rows: of ``t.window`` iterations, in order.
        run: what was before.
        t: where numbers stop being healthy.
    """
    mean = Row(*map(_mean, zip(*rows, strict=True)))
    iterations = f"iterations {rows[0].iteration:.0f} to {rows[-1].iteration:.0f}"
    rises = has_risen(mean.ep_return, run.start, t)
    if mean.blind == 1:
        return Symptom("observation_constant", 0.0, f"all observations of {iterations} were the same")

    collapsed = [
        ("entropy_collapsed", -mean.entropy_loss, t.entropy * run.most_entropy, False),
        # From the start: then it is why the policy's probabilities leap.
        ("std_collapsed", mean.std, t.std, run.first.std < t.std),
    ]
    for name, value, least, born in collapsed:
        if value < least and not rises:
            seen = f"{name.partition('_')[0]} {value:.3g} (healthy above {least:.2g}), means of {iterations}"
            if run.worst_kl > 2 * t.approx_kl_alert and not born:
                seen += f", after an approx_kl of {run.worst_kl:.3g}"
                return Symptom("learning_rate_too_high", run.worst_kl, seen)
            return Symptom(name, value, seen)

    # A single iteration counts for four times the alert at most, so that it is none alone.
    kl = _mean([min(row.approx_kl, 4 * t.approx_kl_alert) for row in rows])
    crowded = mean.clip_fraction > t.clip_fraction[1] or not rises
    if kl > (t.approx_kl_alert if crowded else 2 * t.approx_kl_alert):
        return Symptom("learning_rate_too_high", mean.approx_kl, f"{_moves(mean, t)}, means of {iterations}")
    if mean.clip_fraction > t.clip_fraction_alert:
        return Symptom("clip_fraction_too_high", mean.clip_fraction, f"{_moves(mean, t)}, means of {iterations}")

    explained = _mean([max(row.explained_variance, -1.0) for row in rows])
    judged = run.warm or run.progress >= t.stall or mean.value_size > t.value_size
    missed = mean.value_error > t.value_error * mean.value_size
    if judged and missed and not explained >= t.explained_variance_alert:
        seen = (
            f"explained_variance {explained:.2g} (healthy above {t.explained_variance:g}), the critic misses values of "
            f"{mean.value_size:.3g} by {mean.value_error:.3g}, means of {iterations}"
        )
        if mean.value_loss > t.value_loss_growth * run.lowest_value_loss:
            seen += f"; value_loss {mean.value_loss:.3g}, its lowest mean was {run.lowest_value_loss:.3g}"
            return Symptom("value_loss_exploding", mean.value_loss, seen)
        if mean.value_size > t.value_size:
            return Symptom("reward_too_large", mean.value_size, seen)
        return Symptom("critic_not_learning", explained, seen)

    if run.start is not None and run.progress >= t.stall and not rises and not math.isnan(mean.ep_return):
        seen = (
            f"mean return {mean.ep_return:.4g}, of the first episodes it was {run.start[0]:.4g} ± {run.start[1]:.3g}; "
            f"{_moves(mean, t)}, means of {iterations}"
        )
        return Symptom("return_stalled", mean.ep_return, seen)
    return None


def is_well(row: Row, t: Thresholds, most_entropy: float) -> bool:
    """Whether nothing in an iteration is beyond its alert; where that is so of a whole window, no mean can be."""
    return (
        row.explained_variance >= t.explained_variance_alert
        and not row.approx_kl > t.approx_kl_alert
        and not row.clip_fraction > t.clip_fraction_alert
        and not -row.entropy_loss < t.entropy * most_entropy
        and not row.std < t.std
    )


def has_risen(ep_return: float, start: tuple[float, float] | None, t: Thresholds) -> bool:
    """Whether the return is above that of the first episodes (mean and standard deviation) by more than chance."""
    return start is not None and ep_return > start[0] + t.rise * start[1]


def _moves(mean: Row, t: Thresholds) -> str:
    return (
        f"approx_kl {mean.approx_kl:.3g} (healthy {t.approx_kl[0]:g} to {t.approx_kl[1]:g}), clip_fraction "
        f"{mean.clip_fraction:.3g} (healthy {t.clip_fraction[0]:g} to {t.clip_fraction[1]:g})"
    )


def _mean(values: Iterable[float]) -> float:
    """Mean of those that are numbers; NaN of none."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _finite(value: float) -> float:
    """What JSON can hold of a number, to four digits."""
    return float(f"{max(-1e300, min(1e300, value)):.4g}")


def look(batch: TensorDict) -> dict[str, float]:
    """What a :class:`Row` remembers of a rollout [T, N] with value targets; of the critic only where there were rewards."""
    seen = batch["observation"]
    parts = cast(list[Tensor], list(seen.values(True, True)) if isinstance(seen, TensorDict) else [seen])
    looked = {"blind": float(all(map(_is_constant, parts)))}
    valid = batch["valid"]
    if batch["reward"][valid].any():
        target, value = batch["value_target"][valid], batch["state_value"][valid]
        size, error = torch.stack([target, target - value]).square().mean(1).sqrt().tolist()
        looked |= {"value_size": size, "value_error": error}
    return looked


def _is_constant(observation: Tensor) -> bool:
    """Whether the observations [T, N, …] of some 16 steps are the same in all environments."""
    if not torch.equal(observation[0], observation[-1]):  # mostly, and the rest may be pictures
        return False
    steps = observation[:: max(1, len(observation) // 16)]
    return bool((steps == observation[:1, :1]).all())


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
        InputError: ``act`` is on beside an lr_scheduler, or a threshold cannot be used.
    """

    def __init__(self, act: bool = False, thresholds: Thresholds | None = None) -> None:
        self.act = act
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self._given: Linear | None = None
        self._folder: Path | None = None
        self._skipped = 0.0
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
        self._doubted = 0
        """Last iteration in which not all was well."""
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
        if stage == "fit" and self.act and cast(Learns, pl_module).lr_scheduler is not None:
            raise InputError(
                "HealthMonitor: act would lower the learning rate, which lr_scheduler sets: leave one of the two out"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(Learns, pl_module)
        folder = trainer.log_dir if trainer.loggers else None  # all processes ask: the answer is broadcast
        self._folder = None if folder is None or "://" in folder else Path(folder)
        discrete = not any(isinstance(leaf, Box) for leaf in leaves(module.action_space).values())
        self._most_entropy = sum(map(math.log, choices(module.action_space))) if discrete else math.nan
        self._given, self._skipped = None, 0.0
        if module.policy_version != self.iterations:  # another run than the one that was looked at
            self._forget()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._given is None:  # not before: by now the optimiser's own numbers have been put back
            module = cast(Learns, pl_module)
            self._given = module.ent_coef
            for act in self.acts:
                _apply(act, trainer, module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module, metrics, t = cast(Learns, pl_module), trainer.callback_metrics, self.thresholds
        self.steps, self.iterations = module.num_env_steps, module.policy_version
        row = Row(self.iterations, *[metrics[name].item() if name in metrics else math.nan for name in METRICS])
        if not row.explained_variance >= t.explained_variance_alert:
            looks = self.iterations % max(1, t.window // 3) == 0
            row = row._replace(**look(batch)) if looks else row._replace(blind=math.nan)
        self._remember(row, module)

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
        if isinstance(exception, FloatingPointError):
            self._note(Symptom("non_finite", self._skipped + 1, str(exception)), None)
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
            "doubted": self._doubted,
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
        self._doubted, self._seen = state_dict["doubted"], dict(state_dict["seen"])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _remember(self, row: Row, module: Learns) -> None:
        self._rows.append(row)
        self._first = self._first or row
        self._worst_kl = max(self._worst_kl, row.approx_kl)
        if len(self._rows) == self.thresholds.window:
            self._lowest_value_loss = min(self._lowest_value_loss, _mean(each.value_loss for each in self._rows))
        if not is_well(row, self.thresholds, self._most_entropy):
            self._doubted = self.iterations
        if self._start is None and len(module.rollouts.episodes.window) >= FIRST_EPISODES:
            returns = [episode[0] for episode in module.rollouts.episodes.window]
            self._start = statistics.fmean(returns), statistics.pstdev(returns)

    def _is_doubtful(self, module: Learns) -> bool:
        """Whether there is anything to diagnose, which takes ten times as long to find out otherwise."""
        t = self.thresholds
        late = self.steps >= t.stall * module.total_steps
        return self.iterations - self._doubted < t.window or (
            late and not has_risen(_mean(row.ep_return for row in self._rows), self._start, t)
        )

    def _run(self, module: Learns) -> Run:
        t, oldest = self.thresholds, self._rows[0].iteration
        progress = min(1.0, self.steps / module.total_steps)
        warmup = min(t.warmup * self.iterations / max(progress, 1e-9), t.warmup_iterations)
        assert self._first is not None
        return Run(
            progress,
            oldest > warmup,
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
        finding = Finding(
            name=symptom.name,
            since_step=self.steps,
            since_iteration=self.iterations,
            until_step=None,
            value=_finite(symptom.value),
            healthy=remedy.healthy(self.thresholds),
            evidence=evidence,
            advice=remedy.advice,
            key=remedy.key,
        )
        self.findings.append(finding)
        if pl_module is not None:
            pl_module.print(_sentence(finding))
        return True

    def _do(self, name: str, trainer: Trainer, module: Learns) -> bool:
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
            line = module.ent_coef
            factor = t.ent_coef_factor
            to = line.start * factor if line.start or line.end else t.first_ent_coef
            within = max(to, line.end * factor) <= t.highest_ent_coef
        if not within:
            return False
        act = Act(step=self.steps, iteration=self.iterations, finding=name, key=key, factor=factor, to=to)
        self.acts.append(act)
        _apply(act, trainer, module)
        cast(LightningModule, module).print(f"health: {_told(act)}")
        return True

    def _give_back(self, pl_module: LightningModule) -> None:
        """Leave the module as the user made it: another fit applies the acts anew."""
        if self._given is not None:
            cast(Learns, pl_module).ent_coef, self._given = self._given, None

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


def _apply(act: Act, trainer: Trainer, module: Learns) -> None:
    """Change what it says, from the next iteration on."""
    if act["key"] == "--model.ent_coef":
        line = module.ent_coef
        module.ent_coef = (
            Linear(line.start * act["factor"], line.end * act["factor"])
            if line.start or line.end
            else Linear(act["to"], act["to"])
        )
    else:
        for group in trainer.optimizers[0].param_groups:
            group["initial_lr"] *= act["factor"]


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
