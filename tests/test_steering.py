"""What changes while a run goes on: environments by a curriculum, what is learnt with by stages, the learning rate by KL."""

import re
import textwrap
from functools import partial, partialmethod
from pathlib import Path

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
import yaml
from hills import Fragile, Hill, Hills, Line, Simulation, nearness, vector
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from outcomes import outcome, same
from processes import fit as train
from processes import forked
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic
from ppo_lightning.callbacks import (
    AdaptiveLearningRate,
    Curriculum,
    HealthMonitor,
    Level,
    PPOCallback,
    Stage,
    Stages,
)
from ppo_lightning.cli import main
from ppo_lightning.envs.shaping import PotentialShaping
from ppo_lightning.errors import EnvironmentFault, InputError
from ppo_lightning.parameters import Linear

SMALL = {"num_envs": 2, "num_steps": 8, "update_epochs": 1, "num_minibatches": 2}
ITERATION = 16
LEARNT = {"num_envs": 3, "num_steps": 32, "total_steps": 6 * 96, "update_epochs": 2, "num_minibatches": 3}
DOCS = Path(__file__).parent.parent / "docs/curricula.md"


class Record(Callback):
    """What each iteration saw and learnt with; a checkpoint after one of them."""

    def __init__(self, save_at=None):
        self.save_at = save_at
        self.difficulty, self.metrics, self.sizes, self.frozen, self.weights = [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        seen = batch["observation"]
        self.difficulty.append(seen[..., 0].unique().tolist())
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.sizes.append(len(seen))
        self.frozen.append(sorted(name for name, one in pl_module.policy.named_parameters() if not one.requires_grad))
        self.weights.append({name: one.detach().clone() for name, one in pl_module.policy.named_parameters()})

    def on_train_epoch_end(self, trainer, pl_module):
        if pl_module.policy_version == self.save_at:
            trainer.save_checkpoint("at.ckpt")

    def column(self, name):
        return [metrics.get(name) for metrics in self.metrics]


def levels(*values, every=2 * ITERATION, name="difficulty"):
    return [Level({name: value}, from_steps=index * every if index else None) for index, value in enumerate(values)]


def resumes(fit, options, callbacks, save_at):
    """Whether a run that goes on from a checkpoint is the run that was never stopped."""
    model = PPO(**options)
    trainer = fit(model, callbacks=[*callbacks(), Record(save_at)])
    expected = outcome(model, trainer)
    model, record = PPO(**options), Record()
    trainer = fit(model, ckpt_path="at.ckpt", callbacks=[*callbacks(), record])
    same(outcome(model, trainer), expected)
    return record


# --- curriculum -------------------------------------------------------------------------------------------------------

WORLDS = {
    "one after another": ({"env": Hill}, "difficulty"),
    "workers in two halves": ({"env": Hill, "vectorization": "async"}, "difficulty"),
    "wrapped": ({"env": Hill, "wrappers": [partial(gym.wrappers.TimeLimit, max_episode_steps=3)]}, "difficulty"),
    "a vector": ({"env": vector}, "difficulty"),
    "tensors": ({"env": Hills}, "difficulty"),
    "another package's": ({"env": Simulation}, "cfg.difficulty"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_attributes_change_between_rollouts_in_all_environments(world, fit):
    options, name = WORLDS[world]
    record = Record()
    fit(PPO(**options, **SMALL, total_steps=96), callbacks=[Curriculum(levels(1.0, 2.0, 3.0, name=name)), record])
    # What is seen first in a rollout was seen at the end of the one before.
    assert record.difficulty == [[1.0], [1.0], [1.0, 2.0], [2.0], [2.0, 3.0], [3.0]]
    assert record.column("curriculum/stage") == [1, 1, 2, 2, 3, 3]


def test_methods_are_called_and_arrays_filled(fit):
    model = PPO(Hill, **SMALL, total_steps=32)
    fit(model, callbacks=[Curriculum([Level({"set_difficulty": 0.3, "table": 5, "length": 3})])])
    model.rollouts.start()
    for env in model.rollouts.environments.env.envs:
        assert (env.unwrapped.difficulty, env.unwrapped.calls, env.unwrapped.length) == (3.0, 1, 3)
        assert env.unwrapped.table.tolist() == [5.0, 5.0]


def test_a_metric_must_be_reached_so_often_in_a_row_and_restarts_with_the_level(fit):
    curriculum = Curriculum(
        [
            Level({"length": 2}),
            Level({"length": 4}, metric="rollout/ep_len_mean", at_least=2, times=3),
            Level({"length": 8}, metric="rollout/ep_len_mean", at_least=3.9),
        ]
    )
    record = Record()
    fit(PPO(Hill, **SMALL, total_steps=8 * ITERATION), callbacks=[curriculum, record])
    assert record.column("curriculum/stage") == [1, 1, 1, 2, 3, 3, 3, 3]
    assert record.column("rollout/ep_len_mean") == [2, 2, 2, 4, 8, 8, 8, 8]


def test_both_conditions_must_hold_and_upper_bounds_count(fit):
    curriculum = Curriculum(
        [Level({"difficulty": 0.1}), Level({"difficulty": 0.9}, from_steps=48, metric="rollout/success_rate", at_least=1.0),
         Level({"difficulty": 0.2}, metric="rollout/success_rate", at_most=0.0)]
    )  # fmt: skip
    record = Record()
    fit(PPO(Hill, **SMALL, total_steps=6 * ITERATION), callbacks=[curriculum, record])
    assert record.column("curriculum/stage") == [1, 1, 1, 2, 3, 3]


def test_evaluations_may_decide_and_be_on_the_level(fit):
    def run(evaluation):
        steps = [Level({"length": 2}), Level({"length": 5}, metric="eval/mean_ep_length", at_least=2, times=2)]
        record = Record()
        model = PPO(Hill, **SMALL, total_steps=5 * ITERATION, eval_interval=1, num_eval_episodes=2)
        fit(model, callbacks=[Curriculum(steps, evaluation=evaluation), record], limit_val_batches=1)
        return record.column("curriculum/stage"), record.column("eval/mean_ep_length")

    assert run(evaluation=True) == ([1, 1, 2, 2, 2], [None, 2, 2, 5, 5])
    assert run(evaluation=False) == ([1, 1, 2, 2, 2], [None, 4, 4, 4, 4])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_other_arguments_recreate_environments(vectorization, fit):
    steps = [
        Level(env_kwargs={"difficulty": 1.0}),
        Level({"length": 3}, {"difficulty": 2.0, "length": 5}, from_steps=32),
    ]
    record = Record()
    model = PPO(Hill, vectorization=vectorization, **SMALL, total_steps=64)
    fit(model, callbacks=[Curriculum(steps), record])
    assert record.difficulty == [[1.0], [1.0], [2.0], [2.0]]
    assert [episode[1] for episode in model.rollouts.episodes.ep_info_buffer] == [3.0] * 10


def test_a_vector_by_a_callable_is_made_with_the_levels_arguments(fit):
    def make(num_envs, length=4):
        return gym.vector.SyncVectorEnv([partial(Hill, length=length)] * num_envs, autoreset_mode="SameStep")

    model = PPO(make, **SMALL, total_steps=32)
    fit(model, callbacks=[Curriculum([Level(env_kwargs={"length": 2})])])
    assert {episode[1] for episode in model.rollouts.episodes.ep_info_buffer} == {2.0}


def test_an_environment_that_is_recreated_after_a_crash_is_on_the_level(fit):
    Fragile.episodes = 0
    record = Record()
    model = PPO(Fragile, **{**SMALL, "num_envs": 1}, total_steps=32, max_env_restarts=1)
    with pytest.warns(UserWarning, match="restarted"):
        fit(model, callbacks=[Curriculum([Level({"difficulty": 7.0})]), record])
    assert model.env_provider.restarts.count == 1
    assert record.difficulty == [[7.0]] * 4


@pytest.mark.parametrize("save_at", [3, 4])  # within a level, and just before another begins
@pytest.mark.parametrize("kind", ["attributes", "gymnasium", "arguments", "metric", "tensors"])
def test_a_curriculum_resumes_bit_exactly(kind, save_at, fit):
    early, late = ({"from_steps": steps} for steps in (2 * 96, 4 * 96))
    options, steps = {
        "attributes": ({"env": Hill}, [Level(), Level({"set_difficulty": 0.5}, **early), Level({"length": 7}, **late)]),
        "gymnasium": (
            {"env": "CartPole-v1"},
            [Level({"length": 0.3}), Level({"length": 0.5, "force_mag": 8.0}, **early), Level({"length": 1.0}, **late)],
        ),
        "arguments": (
            {"env": "CartPole-v1"},
            [Level(), Level(env_kwargs={"max_episode_steps": 9}, **early), Level({"length": 1.0}, **late)],
        ),
        "metric": (
            {"env": Hill},
            [Level({"length": 5}), Level({"length": 9}, metric="rollout/ep_len_mean", at_least=5, times=4)],
        ),
        "tensors": ({"env": Hills}, [Level({"difficulty": value}, **when) for value, when in ((1, {}), (2, early), (3, late))]),
    }[kind]  # fmt: skip
    record = resumes(fit, {**LEARNT, **options}, lambda: [Curriculum(steps)], save_at)
    assert record.column("curriculum/stage")[-1] == len(steps)


class Breaks(Hill):
    """Raises once; ``seen`` are the difficulty and length of each step."""

    seen, steps_left = set(), 0

    def step(self, action):
        Breaks.steps_left -= 1
        if Breaks.steps_left == 0:
            raise RuntimeError("broken")
        Breaks.seen.add((self.difficulty, self.length))
        return super().step(action)


def test_a_run_that_broke_within_a_rollout_resumes_with_all_that_was_steered(fit, tmp_path):
    def run(**kwargs):
        model, record = PPO(Breaks, **SMALL, total_steps=100 * ITERATION), Record()
        steps = [Level(), Level({"difficulty": 3.0}, {"length": 7}, from_steps=32)]
        callbacks = [Curriculum(steps), Stages([Stage(), Stage(from_steps=32, ent_coef=0.1)]), record]
        callbacks.append(AdaptiveLearningRate(min_lr=1e-3))
        callbacks.append(EarlyStopping("rollout/ep_rew_mean", patience=1000))
        fit(model, callbacks=callbacks, enable_checkpointing=True, **kwargs)
        return record

    Breaks.steps_left = 100
    with pytest.raises(EnvironmentFault, match="broken"):
        run()
    Breaks.seen.clear()
    record = run(ckpt_path=tmp_path / "checkpoints/last.ckpt", max_epochs=9)
    assert Breaks.seen == {(3.0, 7)}
    assert (
        record.column("curriculum/stage") == record.column("train/stage") == [2] * 4
    )  # from the file that resumes exactly
    assert min(record.column("train/learning_rate")) >= 1e-3  # the optimiser's own is 3e-4 at most


def test_callbacks_that_have_steered_another_run_restart_and_leave_no_number_behind(fit):
    callbacks = [Curriculum(levels(1.0, 2.0)), Stages([Stage(), Stage(from_steps=32)])]
    adaptive, runs = AdaptiveLearningRate(), []
    for _ in range(2):
        record = Record()
        model = PPO(Hill, **SMALL, total_steps=64)
        fit(model, callbacks=[*callbacks, adaptive, record])
        runs.append([record.column(name) for name in ("curriculum/stage", "train/stage")])
        assert record.column("train/learning_rate")[0] == 3e-4
    assert runs == [[[1, 1, 2, 2], [1, 1, 2, 2]]] * 2
    model.total_steps, record = 80, Record()
    fit(model, callbacks=[record])
    assert record.column("train/stage") == [None]


def test_monitors_outlive_a_level_on_which_no_episode_has_ended_yet(fit):
    steps = [
        Level({"length": 2}),
        Level({"length": 30}, from_steps=48),
        Level(metric="rollout/ep_len_mean", at_least=2, times=2),
    ]
    record = Record()
    monitors = [
        EarlyStopping("rollout/ep_rew_mean", patience=100),
        EarlyStopping("rollout/ep_len_mean", patience=4, mode="max"),
        ModelCheckpoint("saved", filename="{step}", monitor="rollout/ep_len_mean", mode="max", save_top_k=-1),
    ]
    model = PPO(Hill, **SMALL, total_steps=9 * ITERATION)
    fit(model, callbacks=[Curriculum(steps), *monitors, record], enable_checkpointing=True)
    # What the level before has left counts for nothing: the first episode of 30 steps ends in the seventh iteration.
    assert record.column("curriculum/stage") == [1, 1, 1, 2, 2, 2, 2, 2, 3]
    lengths = [row.get("rollout/ep_len_mean") for row in model.summary()["train_history"]]
    assert lengths == [2, 2, 2, None, None, None, 30, 30, None]
    assert {path.stem for path in Path("saved").iterdir()} == {f"step={n * ITERATION}" for n in (1, 2, 3, 7, 8)}


def test_a_changed_level_is_put_on_when_a_run_resumes(fit):
    fit(PPO("CartPole-v1", **SMALL, total_steps=32), callbacks=[Curriculum([Level({"length": 0.3})]), Record(1)])
    model = PPO("CartPole-v1", **SMALL, total_steps=32)
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.extend(env.unwrapped.length for env in pl_module.rollouts.environments.env.envs)

    fit(model, callbacks=[Curriculum([Level({"length": 0.7})]), Look()], ckpt_path="at.ckpt")
    assert seen == [0.7, 0.7]


@pytest.mark.parametrize(
    ("options", "steps", "says"),
    [
        ({"env": Hill}, [Level({"hardness": 1.0})], "Hill has no attribute or method 'hardness', neither itself nor a wrapper"),
        ({"env": Hill, "vectorization": "async"}, [Level({"hardness": 1.0})], "Hill has no attribute or method 'hardness'"),
        ({"env": Hills}, [Level({"cfg.hardness": 1.0})], "Hills has no attribute or method 'cfg.hardness'"),
        ({"env": Hill}, [Level(), Level(env_kwargs={"wide": True}, from_steps=16)], "the policy was made for"),
        ({"env": Hill}, [Level(), Level(metric="train/aprox_kl", at_least=0)], "waits for train/aprox_kl, which there is not"),
        ({"env": vector(2)}, [Level(env_kwargs={"length": 2})], "env is a VectorEnv already"),
        ({"env": Hill}, [Level(), Level(metric="eval/mean_reward", at_least=0)], "there are no evaluations"),
    ],
    ids=["attribute", "in workers", "nested", "spaces", "metric", "instance", "evaluations"],
)  # fmt: skip
def test_what_a_curriculum_cannot_do_is_reported(options, steps, says, fit):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        fit(PPO(**options, **SMALL, total_steps=64), callbacks=[Curriculum(steps)])
    assert "\n" not in str(caught.value)


def test_a_metric_that_comes_later_is_waited_for(fit):
    class Says(Hill):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            ended = terminated or truncated
            return observation, reward, terminated, truncated, {**info, "metrics": {"done": 1.0}} if ended else info

    levels = [Level({"length": 40}), Level({"length": 5}, metric="env/done", at_least=1)]
    curriculum = Curriculum(levels)
    fit(PPO(Says, **SMALL, total_steps=8 * 32), callbacks=[curriculum])
    assert curriculum.stage == 2


def test_a_metric_that_never_was_is_reported_at_the_end(fit):
    curriculum = Curriculum([Level(), Level(metric="rollout/ep_rew_maen", at_least=0)])
    with pytest.warns(
        UserWarning, match="level 2 of the Curriculum waits for rollout/ep_rew_maen, which there never was"
    ):
        fit(PPO(Hill, **SMALL, total_steps=32), callbacks=[curriculum])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curriculum([]),
        lambda: Curriculum([Level(from_steps=5)]),
        lambda: Curriculum([Level(), Level({"length": 3})]),
        lambda: Curriculum([Level(), Level(from_steps=64), Level(from_steps=32)]),
        lambda: Level(metric="rollout/ep_rew_mean"),
        lambda: Level(metric="rollout/ep_rew_mean", at_least=3.0, at_most=2.0),
        lambda: Level(at_least=3.0),
        lambda: Level({"length": np.zeros(2)}),
        lambda: Level(env_kwargs={"length": torch.zeros(2)}),
        lambda: Level(metric="rollout/ep_rew_mean", at_least=3.0, times=0),
        lambda: Stages([]),
        lambda: Stages([Stage(from_steps=5)]),
        lambda: Stage(from_steps=5, from_share=0.5),
        lambda: Stage(from_share=1.5),
        lambda: Stage(num_steps=0),
        lambda: Stage(freeze="critic"),
        lambda: Stage(learning_rate=-1.0),
        lambda: Stage(ent_coef=Linear(0.1, -0.1)),
        lambda: AdaptiveLearningRate(desired_kl=0.0),
        lambda: AdaptiveLearningRate(factor=1.0),
        lambda: AdaptiveLearningRate(min_lr=0.1),
        lambda: PotentialShaping(Line(), nearness, gamma=1.5),
    ],
)
def test_plans_that_make_no_sense_are_refused(make):
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_two_processes_are_on_the_same_level_and_stage():
    def run(rank):
        record = Record()
        stages = Stages([Stage(freeze=["critic"]), Stage(from_share=0.5, num_steps=16, learning_rate=1e-3)])
        steps = [
            Level({"length": 2 + 2 * rank}),
            Level({"length": 8}, metric="rollout/ep_len_mean", at_least=2.5, times=2),
        ]
        model = PPO(Hill, **SMALL, total_steps=8 * ITERATION)
        train(
            model, callbacks=[Curriculum(steps), stages, record], strategy="ddp_find_unused_parameters_true", devices=2
        )
        columns = [record.column(name) for name in ("curriculum/stage", "train/stage", "rollout/ep_len_mean")]
        weights = {name: value.double().sum().item() for name, value in record.weights[-1].items()}
        return columns, record.sizes, record.frozen, weights, moved(record, 0, 1), moved(record, 1, 2)

    first, second = forked(run)
    assert first == second
    columns, sizes, frozen, _, in_first_stage, in_second = first
    assert columns[:2] == [[1, 1, 2], [1, 1, 2]]
    assert columns[2][:2] == [24 / 9, 24 / 9]  # of both processes' episodes: one alone would not have reached 2.5
    assert sizes == [8, 8, 16]
    assert [len(names) for names in frozen] == [4, 4, 0]
    assert not {name for name in in_first_stage if "critic" in name}
    assert {name for name in in_second if "critic" in name}


def test_the_first_process_decides_where_processes_differ():
    def run(rank):
        own = PPOCallback(on_iteration_end=lambda trainer, module, metrics: module.log_metrics({"own": float(rank)}))
        steps = [Level(), Level(metric="own", at_most=0.5)]
        record = Record()
        train(PPO(Hill, **SMALL, total_steps=96), callbacks=[own, Curriculum(steps), record], strategy="ddp", devices=2)
        return record.column("curriculum/stage")

    assert forked(run) == [[1, 2, 2], [1, 2, 2]]


def test_two_processes_freeze_what_has_learnt_before():
    def run(rank):
        record = Record()
        stages = [Stage(), Stage(from_steps=96, freeze=["critic"]), Stage(from_steps=192, freeze=["*.bias"])]
        strategy = "ddp_find_unused_parameters_true"
        train(
            PPO(Hill, **{**SMALL, "update_epochs": 2}, total_steps=288),
            callbacks=[Stages(stages), record],
            strategy=strategy,
            devices=2,
        )
        return record.weights, moved(record, 2, 5), moved(record, 5, 8)

    (first, in_second, in_third), (second, *_) = forked(run)
    for one, other in zip(first, second, strict=True):
        same(one, other)
    names = set(first[0])
    assert in_second == {name for name in names if "critic" not in name}
    assert in_third == {name for name in names if not name.endswith("bias")}


def test_freezing_under_ddp_needs_a_strategy_that_waits_for_no_gradient():
    def run(rank):
        train(
            PPO(Hill, **SMALL, total_steps=32),
            callbacks=[Stages([Stage(freeze=["critic"])])],
            strategy="ddp",
            devices=2,
        )

    for said in forked(run):
        assert "give --trainer.strategy ddp_find_unused_parameters_true" in said


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_changes_what_is_learnt_with_and_the_next_one_takes_it_back(fit):
    stages = Stages(
        [
            Stage(learning_rate=1e-3, ent_coef=0.01),
            Stage(from_steps=32, learning_rate=Linear(4e-4, 0.0), clip_range=0.1, num_steps=16),
            Stage(from_share=0.5, num_steps=8, freeze=["critic", "value_head"]),
        ]
    )
    record = Record()
    model = PPO(
        Hill, **{**SMALL, "num_steps": 4}, total_steps=128, clip_range=0.3, optimizer=partial(torch.optim.Adam, lr=1e-2)
    )
    fit(model, callbacks=[stages, record])
    shares = [0, 8, 16, 24, 32, 64, 80, 96, 112]
    assert record.sizes == [4, 4, 4, 4, 16, 8, 8, 8, 8]
    assert record.column("time/total_timesteps") == [*shares[1:], 128]
    assert record.column("train/stage") == [1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert record.column("train/clip_range") == [0.3, 0.3, 0.3, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3]
    own = [1e-2 * (1 - steps / 128) for steps in shares]
    assert_close(record.column("train/learning_rate"), [1e-3] * 4 + [4e-4 * (1 - 32 / 128)] + own[5:])
    assert [len(frozen) for frozen in record.frozen] == [0] * 5 + [6] * 4
    assert (model.num_steps, model.rollouts.num_steps, model.schedules["lr"], model.schedules["ent_coef"]) == (
        4,
        4,
        None,
        Linear(0.0, 0.0),
    )
    assert all(one.requires_grad for one in model.policy.parameters())


def moved(record, first, last):
    return {name for name, value in record.weights[first].items() if not value.equal(record.weights[last][name])}


def test_what_is_frozen_stays_and_learns_again(fit):
    record = Record()
    stages = Stages(
        [Stage(freeze=["actor", "action_head"]), Stage(from_steps=64), Stage(from_steps=128, freeze=["*.bias"])]
    )
    trainer = fit(PPO(Hill, **SMALL, total_steps=192), callbacks=[stages, record])
    names = set(record.weights[0])
    actor = {name for name in names if "act" in name}
    assert moved(record, 0, 3) == names - actor
    assert moved(record, 3, 7) == names
    assert moved(record, 7, 11) == {name for name in names if not name.endswith("bias")}
    # Moments began anew where the actor learnt again, eight iterations of two steps before the end.
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {8.0, 16.0}


STAGES = {
    "rates and rollouts": [
        Stage(learning_rate=1e-3, num_steps=16),
        Stage(from_steps=150, learning_rate=5e-4, ent_coef=0.01),
        Stage(from_share=0.6, num_steps=48),
    ],
    "frozen": [Stage(freeze=["critic"]), Stage(from_steps=200), Stage(from_steps=400, freeze=["actor_trunk", "head"])],
}


@pytest.mark.parametrize("save_at", [2, 3, 4])
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("env", ["CartPole-v1", "ppo_lightning.envs.classic_control.CartPole"])
def test_stages_resume_bit_exactly(env, kind, save_at, fit):
    resumes(fit, {**LEARNT, "env": env}, lambda: [Stages(STAGES[kind])], save_at)


def test_rollouts_of_another_length_resume_with_memory(fit):
    policy = partial(ActorCritic, rnn="lstm", hidden_sizes=(16,))
    options = {**LEARNT, "env": "CartPole-v1", "policy": policy, "num_minibatches": 1}
    resumes(fit, options, lambda: [Stages([Stage(), Stage(from_steps=192, num_steps=20)])], 3)


def test_the_length_of_a_rollout_changes_no_step_that_is_taken():
    """T steps, then T′ of another length, are the steps that T + T′ at once would have been, without an update between."""

    def collected(*lengths):
        model = PPO(Hill, **{**SMALL, "num_steps": lengths[0]}, gae_lambda=1.0)
        torch.manual_seed(1)
        parts = []
        for length in lengths:
            model.rollouts.set_num_steps(length)
            parts.append(
                {key: value.clone() for key, value in model.rollouts.collect().exclude("policy_version").items()}
            )
        model.close_environments()
        return torch.cat([part["observation"] for part in parts]), torch.cat([part["reward"] for part in parts])

    for one, other in zip(collected(6, 10, 4), collected(20), strict=True):
        assert_close(one, other, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", STAGES)
def test_compiled_stages_equal_eager_ones_and_resume(kind, fit):
    def run(compile, **kwargs):
        torch.manual_seed(1)
        model = PPO("CartPole-v1", **LEARNT, compile=compile)
        fit(model, callbacks=[Stages(STAGES[kind]), Record(3 if kwargs == {} else None)], **kwargs)
        return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}

    eager = run(False)
    compiled = run(True)
    assert_close(compiled, eager, atol=1e-5, rtol=1e-5)
    same(run(True, ckpt_path="at.ckpt"), compiled)


@pytest.mark.long
def test_a_compiled_rollout_sees_the_level(fit):
    record = Record()
    model = PPO(Hills, **SMALL, total_steps=96, compile=True)
    fit(model, callbacks=[Curriculum(levels(1.0, 2.0, 3.0)), record])
    # A graph observes the state anew, so that even the first observation is the new level's.
    assert record.difficulty == [[1.0], [1.0], [2.0], [2.0], [3.0], [3.0]]


@pytest.mark.parametrize(
    ("options", "callbacks", "says"),
    [
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)},
            [Stages([Stage(learning_rate=1e-3)])],
            "Stages and lr_scheduler both set the learning rate",
        ),
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)},
            [AdaptiveLearningRate()],
            "AdaptiveLearningRate and lr_scheduler both set the learning rate",
        ),
        (
            {},
            [Stages([Stage(learning_rate=1e-3)]), AdaptiveLearningRate()],
            "AdaptiveLearningRate and Stages both set the learning rate",
        ),
        (
            {},
            [Stages([Stage()]), HealthMonitor(act=True)],
            "act would change the learning rate or ent_coef, which Stages sets",
        ),
        (
            {},
            [AdaptiveLearningRate(), HealthMonitor(act=True)],
            "which AdaptiveLearningRate sets: leave out one of them",
        ),
        ({}, [Stages([Stage(), Stage(from_share=0.5), Stage(from_steps=32)])], "stages begin at [0, 32.0, 32]"),
        ({}, [Stages([Stage(freeze=["encoder"])])], "freeze 'encoder' of a Stage is in no parameter's name"),
        ({}, [Stages([Stage(freeze=["network"])])], "freezes all of the policy"),
        ({}, [Stages([Stage(), Stage(from_steps=32, num_steps=1)])], "cannot be cut into num_minibatches"),
    ],
    ids=[
        "scheduler",
        "adaptive and scheduler",
        "adaptive and stages",
        "acts and stages",
        "acts and adaptive",
        "order",
        "pattern",
        "all",
        "rollout",
    ],
)
def test_what_stages_cannot_do_is_reported_before_training(options, callbacks, says, fit):
    model = PPO(Hill, **{**SMALL, "num_envs": 1}, total_steps=64, **options)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        fit(model, callbacks=callbacks)
    assert "\n" not in str(caught.value)
    assert model.num_env_steps == 0


# --- learning rate by divergence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "rate", "expected"),
    [
        (0.021, 1e-3, 1e-3 / 1.5),
        (0.02, 1e-3, 1e-3),
        (0.01, 1e-3, 1e-3),
        (0.005, 1e-3, 1e-3),
        (0.0049, 1e-3, 1e-3 * 1.5),
        (0.0, 1e-3, 1e-3),
        (-0.001, 1e-3, 1e-3),
        (float("nan"), 1e-3, 1e-3),
        (1.0, 1.2e-5, 1e-5),
        (1e-4, 9e-3, 1e-2),
    ],
)
def test_the_rule_is_rsl_rls(kl, rate, expected):
    class Trainer:
        callback_metrics = {"train/approx_kl": torch.tensor(kl, dtype=torch.float64)}  # noqa: RUF012

    adaptive = AdaptiveLearningRate(desired_kl=0.01)
    adaptive.rate = rate
    adaptive.on_train_batch_end(Trainer(), None, None, None, 0)
    assert adaptive.rate == expected


def test_each_iteration_learns_at_the_rate_that_the_one_before_has_set(fit):
    record, adaptive = Record(), AdaptiveLearningRate(desired_kl=1e-3)
    model = PPO("CartPole-v1", **LEARNT, optimizer=partial(torch.optim.Adam, lr=3e-3))
    fit(model, callbacks=[adaptive, record])
    rates, divergences = record.column("train/learning_rate"), record.column("train/approx_kl")
    assert rates[0] == 3e-3
    for before, kl, after in zip(rates, divergences, [*rates[1:], adaptive.rate], strict=True):
        assert after == (before / 1.5 if kl > 2e-3 else before * 1.5 if 0 < kl < 5e-4 else before)
    assert len(set(rates)) > 2
    assert model.schedules["lr"] is None


def test_the_adapted_rate_resumes_bit_exactly(fit):
    record = resumes(fit, {**LEARNT, "env": "CartPole-v1"}, lambda: [AdaptiveLearningRate(desired_kl=1e-3)], 3)
    assert record.column("train/learning_rate")[0] != 3e-4


def test_other_parameter_groups_keep_their_ratio():
    model = PPO(Hill, **SMALL)
    optimizer = torch.optim.Adam([{"params": [torch.zeros(1)], "lr": 1e-2}, {"params": [torch.zeros(1)], "lr": 2e-3}])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    model.schedules.override("lr", 1e-3, owner=optimizer)
    model.schedules.set_learning_rate(optimizer, model.progress)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2e-4]


# --- shaped rewards ---------------------------------------------------------------------------------------------------


def rollout(env, actions):
    rewards, infos, (observation, _) = [], [], env.reset(seed=0)
    first = nearness(observation)
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        infos.append(info)
        if terminated or truncated:
            break
    return np.array(rewards), infos, first, nearness(observation), terminated


@pytest.mark.parametrize("actions", [[1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 1], [0] * 20])
def test_shaping_adds_the_same_to_every_policy(actions):
    """Σ γᵗ r′ₜ − Σ γᵗ rₜ = γᵀ Φ(s_T) − Φ(s₀), with Φ = 0 where the episode terminated: exact in powers of two."""
    gamma = 0.5
    plain, *_ = rollout(Line(), actions)
    shaped, infos, first, last, terminated = rollout(PotentialShaping(Line(), nearness, gamma), actions)
    discount = gamma ** np.arange(len(plain))
    added = discount @ shaped - discount @ plain
    assert added == gamma ** len(plain) * (0.0 if terminated else last) - first
    assert [info["reward_components"]["environment"] for info in infos] == plain.tolist()
    assert [info["reward_components"]["shaping"] for info in infos] == (shaped - plain).tolist()


def test_the_parts_of_a_reward_that_two_potentials_shape_add_up_to_it():
    within = PotentialShaping(Line(), nearness, 0.5)
    shaped, infos, *_ = rollout(PotentialShaping(within, tenfold_nearness, 0.5), [1, 1, 0, 1, 1, 1])
    assert [sum(info["reward_components"].values()) for info in infos] == shaped.tolist()
    assert [info["reward_components"]["environment"] for info in infos] == rollout(Line(), [1, 1, 0, 1, 1, 1])[
        0
    ].tolist()


def test_evaluations_leave_shaping_out(fit):
    model = PPO(
        Line, wrappers=[partial(PotentialShaping, potential=tenfold_nearness, gamma=0.99)], **SMALL, total_steps=32
    )
    fit(model)
    shaped = [episode[0] for episode in model.rollouts.episodes.ep_info_buffer]
    assert all(value not in (0.0, 1.0) for value in shaped)
    evaluated = model.evaluate(4, deterministic=False)
    assert {evaluated["eval/min_reward"], evaluated["eval/max_reward"]} <= {0.0, 1.0}


def tenfold_nearness(observation):
    return 10 * nearness(observation)


def test_shaping_resumes_bit_exactly(fit):
    wrapper = partial(PotentialShaping, potential=nearness, gamma=0.99)
    resumes(fit, {**LEARNT, "env": Line, "wrappers": [wrapper]}, list, 3)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_shaping_and_gymnasiums_own_wrappers_come_by_yaml(vectorization):
    config = {
        "model": {
            "env": "hills.Line",
            "wrappers": [
                {"class_path": "ppo_lightning.envs.shaping.PotentialShaping",
                 "init_args": {"potential": "hills.nearness", "gamma": 0.99}},
                {"class_path": "gymnasium.wrappers.TransformReward", "init_args": {"func": "hills.tenfold"}},
            ],
            "vectorization": vectorization, **SMALL, "total_steps": 32,
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0},
    }  # fmt: skip
    Path("shaped.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "shaped.yaml"])
    assert Path("lightning_logs/version_0/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "Curriculum",
            {"levels": [{}, {"metric": "rollout/ep_rew_mean"}]},
            "give a metric together with one bound or both",
        ),
        ("Curriculum", {"levels": [{"from_steps": 5}]}, "of which the first begins at once"),
        ("Stages", {"stages": [{}, {"from_share": 2.0}]}, "from_share of a Stage must lie between 0 and 1, got 2.0"),
        ("AdaptiveLearningRate", {"factor": 0.5}, "takes desired_kl above 0, factor above 1"),
    ],
)
def test_the_command_line_says_so_in_one_sentence(name, arguments, says):
    callback = {"class_path": f"ppo_lightning.callbacks.{name}", "init_args": arguments}
    Path("bad.yaml").write_text(yaml.safe_dump({"model": {"env": "CartPole-v1"}, "trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "bad.yaml"])
    assert says in str(caught.value)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)


# --- the documents ----------------------------------------------------------------------------------------------------

TEXT = DOCS.read_text()
EXAMPLES = [textwrap.dedent(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
QUICK = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize("text", EXAMPLES, ids=["curriculum", "arguments", "stages", "adaptive", "shaping"])
def test_the_examples_train(text):
    Path("mountain.py").write_text(PYTHON[0])
    config = yaml.safe_load(text)
    Path("example.yaml").write_text(text)
    Path("quick.yaml").write_text(yaml.safe_dump({"trainer": QUICK, "model": {"num_envs": 2, "num_eval_episodes": 1}}))
    main(["fit", "--config", "example.yaml", "--config", "quick.yaml"])
    logged = np.genfromtxt("lightning_logs/version_0/metrics.csv", delimiter=",", names=True, deletechars="")
    logged = logged[~np.isnan(logged["time/iterations"])]
    assert logged["time/iterations"].tolist() == [1, 2]
    for callback in config["trainer"].get("callbacks", []):
        for name, column in (("Curriculum", "curriculum/stage"), ("Stages", "train/stage")):
            assert not callback["class_path"].endswith(name) or logged[column].tolist() == [1, 1]


def test_the_example_in_python_trains(monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "__init__", partialmethod(lightning.Trainer.__init__, logger=False, **QUICK))
    space = {}
    exec(PYTHON[1], space)
    assert space["model"].policy_version == 2
