"""Several processes are one: an update of two ranks is that of one process on the samples of both."""

import atexit
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import DDPStrategy
from processes import fit, forked
from tensordict import TensorDict
from torch import distributed
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, PPOLoss
from ppo_lightning.algorithm import update as algorithm
from ppo_lightning.algorithm.minibatches import MinibatchPlan, plan_minibatches
from ppo_lightning.errors import ProcessFault
from ppo_lightning.runs.ranks import CHECK_INTERVAL, fingerprint

STEPS, ENVS = 12, 2
SIZE = {"num_steps": STEPS, "num_envs": ENVS, "total_steps": 1000, "num_minibatches": 3, "update_epochs": 2}


def rollout(rank: int, state_size: int) -> TensorDict:
    """[T, N] of one rank; of rank 1 a third of the rows does not count, as where NEXT_STEP vectors were reset."""
    generator = torch.Generator().manual_seed(rank)
    shape, valid = (STEPS, ENVS), torch.ones(STEPS, ENVS, dtype=torch.bool)
    if rank == 1:
        valid[2::3] = False
    batch = {
        "observation": torch.randn(*shape, 3, generator=generator),
        "action": torch.randn(*shape, 1, generator=generator),
        "action_log_prob": -1 - torch.rand(shape, generator=generator),
        "state_value": torch.randn(shape, generator=generator),
        "value_target": 1 + rank + torch.randn(shape, generator=generator),
        "advantage": rank + 3 * torch.randn(shape, generator=generator),
        "valid": valid,
    }
    if state_size:
        batch["recurrent_state"] = torch.randn(*shape, state_size, generator=generator)
        batch["episode_start"] = torch.rand(shape, generator=generator) < 0.2
    batch |= {
        "reward": torch.zeros(shape),
        "terminated": torch.zeros(shape).bool(),
        "truncated": torch.zeros(shape).bool(),
    }
    return TensorDict(batch, list(shape))


class Updates(PPO):
    """Makes one update on a rollout that is given, by minibatches that are given, and keeps what came of it."""

    given: TensorDict
    plan: MinibatchPlan | None = None

    def training_step(self, batch, batch_idx):
        def plan(*args, **kwargs):
            self.plan = self.plan or plan_minibatches(*args, **kwargs)
            return self.plan

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(algorithm, "plan_minibatches", plan)
            update = self.update(self.given)
        metrics = self.metrics(self.given, update, seconds=0.0, learning_rate=0.0)
        self.logged = {name: value for name, value in metrics.items() if name.startswith("train/")}
        self.steps = len(update.losses)


def updated(given, plan=None, state_size=0, **options) -> Updates:
    lightning.seed_everything(1, verbose=False)
    model = Updates("Pendulum-v1", **{**SIZE, **options})
    model.given, model.plan = given(model.policy.state_size), plan
    fit(model, max_epochs=1, **({"strategy": "ddp", "devices": 2} if plan is None else {}))
    return model


def parameters(model: PPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


def of_rank(rank: int, options) -> tuple[torch.Tensor, dict[str, float], MinibatchPlan, int]:
    model = updated(partial(rollout, rank), **options)
    assert (model.updater.compiled is not None) == ("compile" in options)
    return parameters(model), model.logged, model.plan, model.steps


def together(first: MinibatchPlan, second: MinibatchPlan) -> MinibatchPlan:
    """The minibatches of both ranks, as one process has their samples: those of rank 1 behind those of rank 0."""
    permutations = []
    for one, other in zip(first.permutations, second.permutations + first.permutations.shape[1], strict=True):
        pieces = zip(one.split(first.sizes), other.split(second.sizes), strict=True)
        permutations.append(torch.cat([part for pair in pieces for part in pair]))
    sizes = [a + b for a, b in zip(first.sizes, second.sizes, strict=True)]
    return MinibatchPlan(torch.stack(permutations), sizes, [[1.0] * len(sizes)] * len(permutations), None)


CASES = {
    "plain": {},
    "all ranks": {"normalize_advantage": "all_ranks"},
    "chunks": {
        "normalize_advantage": "all_ranks",
        "gradient_accumulation_steps": 2,
        "clip_range_vf": 0.2,
        "ent_coef": 0.01,
    },
    "memory": {"policy": partial(ActorCritic, rnn="gru"), "sequence_length": 4, "normalize_advantage": "all_ranks"},
    "stopped": {"target_kl": 0.15, "optimizer": partial(torch.optim.Adam, lr=1e-2)},
}


def check(options):
    options = {"normalize_advantage": False, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    ranks = forked(lambda rank: of_rank(rank, options))
    for result in ranks:
        assert isinstance(result, tuple), result
    (first, logged, plan, steps), (second, other_logged, other_plan, other_steps) = ranks
    assert torch.equal(first, second)
    assert {**logged, "train/grad_norm": 0} == {**other_logged, "train/grad_norm": 0}
    one = updated(
        lambda size: torch.cat([rollout(0, size), rollout(1, size)]),
        together(plan, other_plan),
        **{**options, "num_steps": 2 * STEPS, "normalize_advantage": bool(options["normalize_advantage"])},
    )
    assert_close(first, parameters(one), rtol=1e-5, atol=1e-6)
    assert logged == pytest.approx(one.logged, rel=1e-4, abs=1e-6)
    assert steps == other_steps == one.steps
    return steps


@pytest.mark.parametrize("case", CASES)
def test_an_update_of_two_ranks_is_one_update_on_the_samples_of_both(case):
    """Rows count alike, whichever rank has them and however many it has; and the logged numbers are of all."""
    steps = check(CASES[case])
    assert (steps < 6) == (case == "stopped")


@pytest.mark.long
def test_compiled_updates_of_two_ranks_are_one_too():
    check({"compile": True, "normalize_advantage": "all_ranks", "optimizer": partial(torch.optim.Adam, lr=1e-3)})


# --- F14, F22: ranks that go their own way -----------------------------------------------------------------------------


class Perturbed(Callback):
    """Changes the last bit of one parameter of one rank in one iteration."""

    def __init__(self, rank: int, iteration: int) -> None:
        self.rank, self.iteration = rank, iteration

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_rank == self.rank and pl_module.policy_version == self.iteration:
            parameter = next(pl_module.policy.parameters())
            parameter.data.view(torch.int32).view(-1)[7] ^= 1


def small(rank: int, iterations: int, **kwargs) -> PPO:
    lightning.seed_everything(1, verbose=False)
    size = {"num_envs": 2, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    model = PPO("CartPole-v1", **size, total_steps=iterations * 2 * 2 * 8)
    fit(model, strategy="ddp", devices=2, **kwargs)
    return model


def test_a_rank_whose_parameters_differ_in_one_bit_is_found_within_the_interval():
    def run(rank: int) -> str:
        with pytest.raises(ProcessFault) as caught:
            small(rank, 30, callbacks=[Perturbed(rank=1, iteration=3)])
        return str(caught.value)

    for sentence in forked(run):
        assert f"after iteration {CHECK_INTERVAL} the parameters of rank 1 are not those of rank 0" in sentence


@pytest.mark.parametrize("iterations", [30, pytest.param(1000, marks=pytest.mark.long)])
def test_equal_ranks_raise_no_alarm(iterations):
    counts = forked(lambda rank: small(rank, iterations).policy_version)
    assert counts == [iterations, iterations]


def test_a_fingerprint_notices_every_bit_and_order():
    one, other = torch.randn(2, 3), torch.randn(4).double()
    known = fingerprint([one, other])
    assert known == fingerprint([one.clone(), other.clone()])
    assert known == tuple(torch.tensor(known, dtype=torch.float64).long().tolist())
    seen = {known, fingerprint([other, one])}
    for bit in range(32):
        one.view(torch.int32)[1, 2] ^= 1 << bit if bit < 31 else -(1 << 31)
        seen.add(fingerprint([one, other]))
    assert len(seen) == 34


class Divergent(PPOLoss):
    """Of one rank the divergence is far beyond the target from the third minibatch on."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.calls = rank, 0

    def forward(self, batch, evaluate, coefficients):
        self.calls += 1
        losses = super().forward(batch, evaluate, coefficients)
        return {**losses, "approx_kl": losses["approx_kl"] + 10.0 * (self.rank == 1 and self.calls >= 3)}


def test_a_rank_that_diverges_alone_stops_both_before_the_same_step():
    def run(rank: int) -> tuple[int, float]:
        lightning.seed_everything(1, verbose=False)
        size = {"num_envs": 2, "num_steps": 8, "total_steps": 32}
        model = PPO("CartPole-v1", loss=Divergent(rank), target_kl=1.0, **size)
        fit(model, strategy="ddp", devices=2, max_epochs=1)
        (state, *_) = model.optimizers(use_pl_optimizer=False).state.values()
        return int(state["step"]), float(parameters(model).double().sum())

    first, second = forked(run)
    assert first == second
    assert first[0] == 2


# --- F21: how long a dead process is waited for ------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [({}, 180), ({"timeout": timedelta(seconds=7)}, 7)])
def test_processes_wait_minutes_unless_the_user_says_otherwise(given, expected):
    def run(rank: int) -> float:
        model = PPO("CartPole-v1", num_envs=2, num_steps=8, total_steps=10**9, compile=False)
        fit(model, strategy=DDPStrategy(**given), devices=2, max_epochs=1)
        return distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout

    assert [timeout.total_seconds() for timeout in forked(run)] == [expected, expected]


# --- the end -----------------------------------------------------------------------------------------------------------


def test_the_threads_of_a_process_group_end_before_the_interpreter():
    """One that frees a tensor later would abort its process: terminate called without an active exception."""

    def run(rank: int) -> list[bool]:
        atexit._clear()  # what pytest has there
        fit(PPO("CartPole-v1", num_envs=2, num_steps=8, total_steps=32), strategy="ddp", devices=2)
        ran = any("gloo" in name for name in threads())
        atexit._run_exitfuncs()
        return [ran, any("gloo" in name for name in threads())]

    assert forked(run) == [[True, False], [True, False]]


def threads() -> list[str]:
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
