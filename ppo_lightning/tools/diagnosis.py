"""Healthy ranges of metrics, and the diagnosis of metrics outside of them, as pure functions."""

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from ppo_lightning.errors import InputError
from ppo_lightning.parameters import INDEX, Limit, check_fields


@dataclass(frozen=True)
class Thresholds:
    """Limits of healthy metrics, which are means over ``window`` iterations."""

    window: int = 10
    """Iterations per mean; shorter events are no finding (count)."""
    warmup_iterations: int = 50
    """Iterations with rewards before critic and return are judged, which start untrained (count)."""
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
    """Alert below, if the critic's error also exceeds ``value_error``: constant returns have no variance to explain."""
    value_error: tuple[float, float] = (0.25, 0.9)
    """Errors of the critic that are an alert, relative to its targets (both root mean square; a constant 0 has error 1):
    if the critic is frozen or the return has not risen, and if it has."""
    value_size: float = 1000.0
    """Size of the critic's targets that is an alert, if it explains nothing (root mean square, reward units)."""
    value_loss_growth: float = 100.0
    """Growth of value_loss over its lowest mean that is an alert, if the critic explains nothing (ratio)."""
    entropy: float = 0.01
    """Lowest entropy of discrete actions, as a share of the maximum."""
    std: float = 0.01
    """Lowest standard deviation of continuous actions (action units)."""
    clipped_actions: tuple[float, float] = (0.75, 0.95)
    """Shares of actions with a component outside the bounds that are an alert: of an initial policy, and of a trained one
    whose return has not risen."""
    rise: float = 1.5
    """The return has risen if it is this many standard errors above the mean of the first episodes."""
    stall: float = 0.5
    """Share of total_steps after which a return that has not risen is an alert (0 to 1)."""
    lr_factor: float = 0.5
    """Factor of the learning rate per intervention."""
    lowest_lr: float = 0.05
    """Lowest learning rate of an intervention, as a share of the configured one."""
    ent_coef_factor: float = 2.0
    """Factor of ent_coef per intervention."""
    first_ent_coef: float = 0.001
    """Value that the first intervention gives an ent_coef of 0 (advantage units per nat)."""
    highest_ent_coef: float = 0.1
    """Highest ent_coef of an intervention (advantage units per nat)."""

    def __post_init__(self) -> None:
        """Check the thresholds.

        Raises:
            InputError: a threshold would never or always be an alert.
        """
        window = Limit("be 2 or more iterations", lambda value: value >= 2)
        check_fields(self, "HealthMonitor: thresholds.{}", window=window, warmup_iterations=INDEX)
        if not 0 < self.lr_factor < 1 < self.ent_coef_factor:
            raise InputError(
                f"HealthMonitor: thresholds.lr_factor must lie between 0 and 1 and ent_coef_factor above 1, got "
                f"{self.lr_factor} and {self.ent_coef_factor}"
            )
        if not 0 < self.clipped_actions[0] <= self.clipped_actions[1]:
            raise InputError(
                f"HealthMonitor: thresholds.clipped_actions must be two shares above 0 in ascending order, got "
                f"{self.clipped_actions}"
            )


class HealthyRange(NamedTuple):
    """The healthy values of a metric, and its alert."""

    low: float
    high: float
    alert: float

    def judge(self, value: float) -> tuple[str, str]:
        """Style and mark of a value: within the range, outside, or beyond the alert, above or below."""
        if self.low <= value <= self.high:
            return "green", ""
        mark = "▲" if value > self.high else "▼"
        alerts = value > self.alert if self.alert > self.high else value < self.alert
        return ("bold red", f"!{mark}") if alerts else ("yellow", mark)

    def __str__(self) -> str:
        return f"{self.low:g}–{self.high:g}"


def healthy_ranges(t: Thresholds) -> dict[str, HealthyRange]:
    """By metric."""
    return {
        "train/approx_kl": HealthyRange(*t.approx_kl, t.approx_kl_alert),
        "train/clip_fraction": HealthyRange(*t.clip_fraction, t.clip_fraction_alert),
        "train/explained_variance": HealthyRange(t.explained_variance, 1.0, t.explained_variance_alert),
    }


class Diagnosis(NamedTuple):
    """A cause that the metrics of a window indicate."""

    name: str
    value: float
    evidence: str


class IterationStats(NamedTuple):
    """Metrics of an iteration; NaN stands for missing ones."""

    iteration: float
    ep_return: float
    approx_kl: float
    clip_fraction: float
    explained_variance: float
    entropy_loss: float
    std: float
    value_loss: float
    value_size: float = math.nan
    """Of the critic's targets (root mean square); this and all below are known only if it explains little."""
    value_error: float = math.nan
    """Of the critic (root mean square)."""
    constant_observation: float = 0.0
    """1 if all observations were equal; NaN if not inspected."""
    frozen_critic: float = 0.0
    """1 if the critic's parameters did not change between two inspections; NaN if not inspected twice."""
    clipped_actions: float = math.nan
    """Share of actions with a component outside the bounds; NaN if the distribution clips nothing."""


@dataclass
class RunStats:
    """Statistics of a run before the present window, as plain data; of a curriculum, of its present level."""

    progress: float = 0.0
    """Share of total_steps."""
    warm: bool = False
    """The critic may be judged."""
    settled: bool = False
    """The return may be judged: it contains none of the first episodes."""
    first: IterationStats | None = None
    """The first iteration."""
    start: tuple[float, float] | None = None
    """Mean return of the first episodes, and the standard error of its difference to the mean of 100 later ones."""
    worst_kl: float = -math.inf
    """The largest approx_kl so far."""
    lowest_value_loss: float = math.inf
    """The lowest mean of value_loss over a window so far."""
    most_entropy: float = math.nan
    """Of uniformly distributed discrete actions (nats); NaN where actions are not all discrete."""
    rewarded: int = 0
    """Iterations with rewards."""
    later_episodes: int = 0
    """Episodes after those of ``start``."""
    last_unhealthy: int = 0
    """Last iteration with an unhealthy metric."""
    level: float = 1.0
    """Of a curriculum."""


METRICS = {
    "rollout/ep_rew_mean": "ep_return",
    "train/approx_kl": "approx_kl",
    "train/clip_fraction": "clip_fraction",
    "train/explained_variance": "explained_variance",
    "train/entropy_loss": "entropy_loss",
    "train/std": "std",
    "train/value_loss": "value_loss",
    "rollout/clipped_actions": "clipped_actions",
}
"""Metrics that a :class:`IterationStats` holds, and its fields."""


class Remedy(NamedTuple):
    """The advice for a finding."""

    key: str
    advice: str
    healthy: Callable[[Thresholds], str]
    other_key: str = ""
    """Replaces ``key`` if the network lacks the parameters of :class:`ActorCritic` that it names."""
    other_advice: str = ""
    """Replaces ``advice``, likewise."""

    def for_network(self, parameters: Container[str]) -> tuple[str, str]:
        """Key and advice for a network.

        Args:
            parameters: names of the network's parameters in the configuration (``policy.init_args``).
        """
        named = re.findall(r"policy\.init_args\.(\w+)", f"{self.key} {self.advice}")
        if all(name in parameters for name in named):
            return self.key, self.advice
        return self.other_key, self.other_advice


REMEDIES = {
    "non_finite": Remedy(
        "--model.optimizer.lr",
        "lower --model.optimizer.lr, and look for observations or rewards of extreme size "
        "(--model.normalize_observation true, --model.normalize_reward true)",
        lambda t: "no skipped steps",
    ),
    "observation_constant": Remedy(
        "--model.env",
        "inspect what the environment and --model.wrappers return: the policy has no information",
        lambda t: "observations differ",
    ),
    "entropy_collapsed": Remedy(
        "--model.ent_coef",
        "raise --model.ent_coef (double it, from 0.001), and inspect the policy's initial output: it no longer explores",
        lambda t: f"above {t.entropy:g} of the maximum",
    ),
    "std_collapsed": Remedy(
        "--model.policy.init_args.log_std_init",
        "raise --model.policy.init_args.log_std_init, or --model.ent_coef: it no longer explores",
        lambda t: f"above {t.std:g}",
        "--model.ent_coef",
        "raise --model.ent_coef (double it, from 0.001), or let the network begin with a larger standard deviation: it no "
        "longer explores",
    ),
    "actions_clipped": Remedy(
        "--model.policy.init_args.distribution",
        "set --model.policy.init_args.distribution tanh or beta, whose actions lie within the bounds; or begin with less "
        "noise (--model.policy.init_args.log_std_init -2); where the bounds are far from -1 and 1, add "
        "gymnasium.wrappers.RescaleAction to --model.wrappers",
        lambda t: f"below {t.clipped_actions[0]:g}",
        "--model.wrappers",
        "let the network draw actions within the bounds (tanh or beta, by ppo_lightning.action_distribution), or begin with "
        "a smaller standard deviation; where the bounds are far from -1 and 1, add gymnasium.wrappers.RescaleAction to "
        "--model.wrappers",
    ),
    "learning_rate_too_high": Remedy(
        "--model.optimizer.lr",
        "halve --model.optimizer.lr; else lower --model.clip_range or --model.update_epochs, or set --model.target_kl 0.02",
        lambda t: f"{t.approx_kl[0]:g} to {t.approx_kl[1]:g}",
    ),
    "clip_fraction_too_high": Remedy(
        "--model.optimizer.lr",
        "halve --model.optimizer.lr, or lower --model.update_epochs: the policy changes too much per update",
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
        "give the critic more room (--model.policy.init_args.hidden_sizes [256,256]) or weight (--model.vf_coef), and check "
        "that its observations contain what it has to predict",
        lambda t: f"above {t.explained_variance:g}",
        "--model.vf_coef",
        "give the network's critic more room (wider layers, layers of its own) or weight (--model.vf_coef), and check that "
        "its observations contain what it has to predict",
    ),
    "return_stalled": Remedy(
        "--model.optimizer.lr",
        "explore more (--model.ent_coef 0.01), inspect the reward, or try another --model.optimizer.lr; ignore it if the run "
        "started at its best",
        lambda t: "rising",
    ),
}
"""By the name of a finding; causes come before their consequences."""


def diagnose(rows: Sequence[IterationStats], run: RunStats, t: Thresholds) -> Diagnosis | None:
    """The first cause of unhealthy metrics in a window; None if there is none.

    Consequences of a cause (a stalled return, a critic without information) are no findings of their own.

    Args:
        rows: of ``t.window`` iterations, in order.
        run: statistics before them.
        t: limits of healthy metrics.
    """
    now = IterationStats(*map(mean, zip(*rows, strict=True)))
    iterations = f"iterations {rows[0].iteration:.0f} to {rows[-1].iteration:.0f}"
    rises = return_has_risen(now.ep_return, run, t)
    if now.constant_observation == 1:
        return Diagnosis("observation_constant", 0.0, f"all observations of {iterations} were the same")

    first = run.first or rows[0]
    begins, limits = first.clipped_actions, t.clipped_actions
    untrained = first.iteration == 1  # a trained policy may act at the bounds
    # The return of the first window does not show whether the bounds cost anything.
    if untrained and begins > limits[0] < now.clipped_actions and not (rises and rows[0].iteration > 1):
        return Diagnosis("actions_clipped", now.clipped_actions, _clips(now, t, iterations))

    collapsed = [
        ("entropy_collapsed", -now.entropy_loss, t.entropy * run.most_entropy, False),
        # If it is small from the start, it causes the large approx_kl.
        ("std_collapsed", now.std, t.std, first.std < t.std),
    ]
    for name, value, least, born in collapsed:
        if value < least and not rises:
            seen = f"{name.partition('_')[0]} {value:.3g} (healthy above {least:.2g}), means of {iterations}"
            if run.worst_kl > 2 * t.approx_kl_alert and not born:
                seen += f", after an approx_kl of {run.worst_kl:.3g}"
                return Diagnosis("learning_rate_too_high", run.worst_kl, seen)
            return Diagnosis(name, value, seen)

    # A single iteration counts at most four times the alert, so that it is no finding alone.
    kl = mean([min(row.approx_kl, 4 * t.approx_kl_alert) for row in rows])
    crowded = now.clip_fraction > t.clip_fraction[1] or not rises
    if kl > (t.approx_kl_alert if crowded else 2 * t.approx_kl_alert):
        return Diagnosis("learning_rate_too_high", now.approx_kl, f"{_moves(now, t)}, means of {iterations}")
    if now.clip_fraction > t.clip_fraction_alert:
        return Diagnosis("clip_fraction_too_high", now.clip_fraction, f"{_moves(now, t)}, means of {iterations}")
    if now.clipped_actions > limits[1] and not begins > limits[1] and run.start is not None and not rises:
        return Diagnosis("actions_clipped", now.clipped_actions, _clips(now, t, iterations))

    critic = _diagnose_critic(rows, now, run, t, iterations)
    if critic is not None:
        return critic
    if run.start is not None and run.settled and run.progress >= t.stall and not rises:
        seen = (
            f"mean return {now.ep_return:.4g}, of the first episodes it was {run.start[0]:.4g} ± {run.start[1]:.3g}; "
            f"{_moves(now, t)}, means of {iterations}"
        )
        return Diagnosis("return_stalled", now.ep_return, seen)
    return None


def _diagnose_critic(
    rows: Sequence[IterationStats], now: IterationStats, run: RunStats, t: Thresholds, iterations: str
) -> Diagnosis | None:
    """The cause of a critic that predicts too little of the returns."""
    explained = mean([max(row.explained_variance, -1.0) for row in rows])
    explained = 0.0 if math.isnan(explained) else explained  # constant targets, and a critic that misses them
    frozen = now.frozen_critic == 1
    judged = run.warm or frozen or now.value_size > t.value_size
    missed = now.value_error > t.value_error[return_has_risen(now.ep_return, run, t) and not frozen] * now.value_size
    if judged and missed and explained < t.explained_variance_alert:
        seen = (
            f"explained_variance {explained:.2g} (healthy above {t.explained_variance:g}), the critic misses values of "
            f"{now.value_size:.3g} by {now.value_error:.3g}, means of {iterations}"
        )
        if now.value_loss > t.value_loss_growth * run.lowest_value_loss:
            seen += f"; value_loss {now.value_loss:.3g}, its lowest mean was {run.lowest_value_loss:.3g}"
            return Diagnosis("value_loss_exploding", now.value_loss, seen)
        if now.value_size > t.value_size:
            return Diagnosis("reward_too_large", now.value_size, seen)
        return Diagnosis("critic_not_learning", explained, f"{seen}; its parameters do not change" if frozen else seen)
    return None


def is_healthy(row: IterationStats, t: Thresholds, most_entropy: float) -> bool:
    """Whether no metric of an iteration exceeds its alert; if so in a whole window, no mean does."""
    return (
        row.explained_variance >= t.explained_variance_alert
        and not row.approx_kl > t.approx_kl_alert
        and not row.clip_fraction > t.clip_fraction_alert
        and not -row.entropy_loss < t.entropy * most_entropy
        and not row.std < t.std
        and not row.clipped_actions > t.clipped_actions[0]
    )


def return_has_risen(ep_return: float, run: RunStats, t: Thresholds) -> bool:
    """Whether the return is above that of the first episodes by more than chance.

    A further level of a curriculum begins with a trained policy, whose return need not rise: there it counts as risen.
    """
    return run.level > 1 or (run.start is not None and ep_return > run.start[0] + t.rise * run.start[1])


def _moves(now: IterationStats, t: Thresholds) -> str:
    return (
        f"approx_kl {now.approx_kl:.3g} (healthy {t.approx_kl[0]:g} to {t.approx_kl[1]:g}), clip_fraction "
        f"{now.clip_fraction:.3g} (healthy {t.clip_fraction[0]:g} to {t.clip_fraction[1]:g})"
    )


def _clips(now: IterationStats, t: Thresholds, iterations: str) -> str:
    return (
        f"the bounds of the action space clip {now.clipped_actions:.0%} of the actions in at least one component (healthy "
        f"below {t.clipped_actions[0]:.0%}), means of {iterations}"
    )


def mean(values: Iterable[float]) -> float:
    """Mean without NaN; NaN of nothing."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else math.nan


def inspect_rollout(
    batch: TensorDict, normalize: Callable[[Tensor], Tensor] = lambda values: values
) -> dict[str, float]:
    """Fields of :class:`IterationStats` of a rollout [T, N] with value targets; the critic's only with rewards.

    Args:
        batch: the rollout.
        normalize: values as the loss has them.
    """
    seen = batch["observation"]
    parts = cast(list[Tensor], list(seen.values(True, True)) if isinstance(seen, TensorDict) else [seen])
    found = {"constant_observation": float(all(map(_is_constant, parts)))}
    valid = batch["valid"]
    if batch["reward"][valid].any():
        target, value = (normalize(batch[name][valid]) for name in ("value_target", "state_value"))
        size, error = torch.stack([target, target - value]).square().mean(1).sqrt().tolist()
        found |= {"value_size": size, "value_error": error}
    return found


def _is_constant(observation: Tensor) -> bool:
    """Whether the observations [T, N, …] of some 16 steps are the same in all environments."""
    if not torch.equal(observation[0], observation[-1]):  # the usual case, which is cheap also for images
        return False
    steps = observation[:: max(1, len(observation) // 16)]
    return bool((steps == observation[:1, :1]).all())
