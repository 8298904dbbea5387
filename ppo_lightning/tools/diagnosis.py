"""Which numbers of a run are healthy, and what is wrong where they are not. Pure functions of what was seen."""

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
    """Where a number stops being healthy. Numbers are means over ``window`` iterations."""

    window: int = 10
    """Iterations over which means are taken: what begins and ends within them is no finding (count)."""
    warmup_iterations: int = 50
    """Iterations with rewards before critic and return are judged: they begin with nothing, also in short runs (count)."""
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
    value_error: tuple[float, float] = (0.25, 0.9)
    """The critic's error that is an alert, as a share of the size of its targets (both root mean square; 1 is no critic's):
    where the critic is frozen or the return has not risen, and where it has."""
    value_size: float = 1000.0
    """Size of the critic's targets that is too much for it, where it explains nothing (root mean square, reward units)."""
    value_loss_growth: float = 100.0
    """Growth of value_loss over its lowest mean that is an alert, where the critic explains nothing (ratio)."""
    entropy: float = 0.01
    """Lowest entropy of discrete actions, as a share of the most there can be."""
    std: float = 0.01
    """Lowest standard deviation of continuous actions (action units)."""
    clipped_actions: tuple[float, float] = (0.75, 0.95)
    """Shares of actions with a component outside the bounds that are an alert: where a policy begins so, and where an
    update has led there and the return has not risen."""
    rise: float = 1.5
    """The return has risen where it is so many standard errors above the mean of the first episodes."""
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
    """Of the critic's targets (root mean square); as all below only where it explains little."""
    value_error: float = math.nan
    """Of the critic (root mean square)."""
    blind: float = 0.0
    """1 where all observations were the same; NaN where nobody has looked."""
    frozen: float = 0.0
    """1 where the critic's parameters were those of the last look; NaN where nobody has looked twice."""
    clipped_actions: float = math.nan
    """Share of actions with a component outside the bounds; NaN where the distribution clips nothing."""


class Run(NamedTuple):
    """What a window is judged by, beside its rows."""

    progress: float
    """Share of total_steps."""
    warm: bool
    """The critic may be judged."""
    settled: bool
    """The return may be judged: none of the first episodes is in it any more."""
    first: Row
    """The run's first iteration."""
    start: tuple[float, float] | None
    """Mean return of the first episodes, and standard error of how far that of 100 later ones is from it."""
    worst_kl: float
    """The largest approx_kl so far."""
    lowest_value_loss: float
    """The lowest mean of value_loss over a window so far."""
    most_entropy: float
    """Of uniformly distributed discrete actions (nats); NaN where actions are not all discrete."""


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
"""Metrics that a :class:`Row` holds, and its fields."""


class Remedy(NamedTuple):
    """What to do about a finding."""

    key: str
    advice: str
    healthy: Callable[[Thresholds], str]
    other_key: str = ""
    """In place of ``key`` where the network lacks the parameters of :class:`ActorCritic` that it names."""
    other_advice: str = ""
    """In place of ``advice``, likewise."""

    def for_network(self, parameters: Container[str]) -> tuple[str, str]:
        """Key and advice for a network.

        Args:
            parameters: names of those that the configuration can set of the network (``policy.init_args``).
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
        "--model.vf_coef",
        "give the network's critic more room (wider layers, layers of its own) or weight (--model.vf_coef), and see that "
        "its observations tell what is to come",
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
    now = Row(*map(mean, zip(*rows, strict=True)))
    iterations = f"iterations {rows[0].iteration:.0f} to {rows[-1].iteration:.0f}"
    rises = has_risen(now.ep_return, run.start, t)
    if now.blind == 1:
        return Symptom("observation_constant", 0.0, f"all observations of {iterations} were the same")

    begins, limits = run.first.clipped_actions, t.clipped_actions
    untrained = run.first.iteration == 1  # a policy that has learnt may well act at the bounds
    # Of the first window no return tells whether the bounds cost anything.
    if untrained and begins > limits[0] < now.clipped_actions and not (rises and rows[0].iteration > 1):
        return Symptom("actions_clipped", now.clipped_actions, _clips(now, t, iterations))

    collapsed = [
        ("entropy_collapsed", -now.entropy_loss, t.entropy * run.most_entropy, False),
        # From the start: then it is why the policy's probabilities leap.
        ("std_collapsed", now.std, t.std, run.first.std < t.std),
    ]
    for name, value, least, born in collapsed:
        if value < least and not rises:
            seen = f"{name.partition('_')[0]} {value:.3g} (healthy above {least:.2g}), means of {iterations}"
            if run.worst_kl > 2 * t.approx_kl_alert and not born:
                seen += f", after an approx_kl of {run.worst_kl:.3g}"
                return Symptom("learning_rate_too_high", run.worst_kl, seen)
            return Symptom(name, value, seen)

    # A single iteration counts for four times the alert at most, so that it is none alone.
    kl = mean([min(row.approx_kl, 4 * t.approx_kl_alert) for row in rows])
    crowded = now.clip_fraction > t.clip_fraction[1] or not rises
    if kl > (t.approx_kl_alert if crowded else 2 * t.approx_kl_alert):
        return Symptom("learning_rate_too_high", now.approx_kl, f"{_moves(now, t)}, means of {iterations}")
    if now.clip_fraction > t.clip_fraction_alert:
        return Symptom("clip_fraction_too_high", now.clip_fraction, f"{_moves(now, t)}, means of {iterations}")
    if now.clipped_actions > limits[1] and not begins > limits[1] and run.start is not None and not rises:
        return Symptom("actions_clipped", now.clipped_actions, _clips(now, t, iterations))

    explained = mean([max(row.explained_variance, -1.0) for row in rows])
    explained = 0.0 if math.isnan(explained) else explained  # targets that do not vary, and are missed
    frozen = now.frozen == 1
    judged = run.warm or frozen or now.value_size > t.value_size
    missed = now.value_error > t.value_error[rises and not frozen] * now.value_size
    if judged and missed and explained < t.explained_variance_alert:
        seen = (
            f"explained_variance {explained:.2g} (healthy above {t.explained_variance:g}), the critic misses values of "
            f"{now.value_size:.3g} by {now.value_error:.3g}, means of {iterations}"
        )
        if now.value_loss > t.value_loss_growth * run.lowest_value_loss:
            seen += f"; value_loss {now.value_loss:.3g}, its lowest mean was {run.lowest_value_loss:.3g}"
            return Symptom("value_loss_exploding", now.value_loss, seen)
        if now.value_size > t.value_size:
            return Symptom("reward_too_large", now.value_size, seen)
        return Symptom("critic_not_learning", explained, f"{seen}; its parameters do not change" if frozen else seen)

    if run.start is not None and run.settled and run.progress >= t.stall and not rises:
        seen = (
            f"mean return {now.ep_return:.4g}, of the first episodes it was {run.start[0]:.4g} ± {run.start[1]:.3g}; "
            f"{_moves(now, t)}, means of {iterations}"
        )
        return Symptom("return_stalled", now.ep_return, seen)
    return None


def is_well(row: Row, t: Thresholds, most_entropy: float) -> bool:
    """Whether nothing in an iteration is beyond its alert; where that is so of a whole window, no mean can be."""
    return (
        row.explained_variance >= t.explained_variance_alert
        and not row.approx_kl > t.approx_kl_alert
        and not row.clip_fraction > t.clip_fraction_alert
        and not -row.entropy_loss < t.entropy * most_entropy
        and not row.std < t.std
        and not row.clipped_actions > t.clipped_actions[0]
    )


def has_risen(ep_return: float, start: tuple[float, float] | None, t: Thresholds) -> bool:
    """Whether the return is above that of the first episodes (mean and standard error) by more than chance."""
    return start is not None and ep_return > start[0] + t.rise * start[1]


def _moves(now: Row, t: Thresholds) -> str:
    return (
        f"approx_kl {now.approx_kl:.3g} (healthy {t.approx_kl[0]:g} to {t.approx_kl[1]:g}), clip_fraction "
        f"{now.clip_fraction:.3g} (healthy {t.clip_fraction[0]:g} to {t.clip_fraction[1]:g})"
    )


def _clips(now: Row, t: Thresholds, iterations: str) -> str:
    return (
        f"the bounds of the action space clip {now.clipped_actions:.0%} of the actions in at least one component (healthy "
        f"below {t.clipped_actions[0]:.0%}), means of {iterations}"
    )


def mean(values: Iterable[float]) -> float:
    """Mean of those that are numbers; NaN of none."""
    numbers = [value for value in values if value == value]
    return sum(numbers) / len(numbers) if numbers else math.nan


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
