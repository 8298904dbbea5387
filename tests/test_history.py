"""A history keeps true rows in bounded space."""

import io
import json
import math

import pytest
import torch

from ppo_lightning.runs.history import History, Records, summarize_records


def filled(rows: int, limit: int = 2048) -> History:
    history = History("reward", limit)
    for step in range(1, rows + 1):
        history.add(step, {"reward": float(-abs(step - 7)), "square": float(step**2)})
    return history


def test_a_short_history_is_what_was_added():
    assert filled(3).rows() == [
        {"step": 1, "reward": -6, "square": 1},
        {"step": 2, "reward": -5, "square": 4},
        {"step": 3, "reward": -4, "square": 9},
    ]


@pytest.mark.parametrize("rows", [16, 17, 100, 1000])
def test_a_long_history_keeps_true_rows_evenly_spaced_and_the_last(rows):
    history = filled(rows, limit=16)
    kept = history.rows()
    assert 8 <= len(kept) <= 17
    assert all(row["square"] == row["step"] ** 2 for row in kept)
    assert [row["step"] for row in kept if row["step"] % history.every == 0] == list(
        range(history.every, rows + 1, history.every)
    )
    assert kept[-1]["step"] == rows


def test_the_best_row_is_kept_though_its_turn_is_over():
    history = filled(1000, limit=16)
    assert 7 not in [row["step"] for row in history.rows()]
    assert history.best == {"step": 7, "reward": 0, "square": 49}


def test_what_is_not_a_number_is_never_best_and_is_left_out_of_rows():
    history = History("reward")
    history.add(1, {"reward": math.nan, "loss": 1.0})
    history.add(2, {"reward": 0.5, "loss": 1.0})
    history.add(3, {"reward": math.inf, "loss": 1.0})
    assert history.best == {"step": 2, "reward": 0.5, "loss": 1.0}
    assert history.rows()[0] == {"step": 1, "loss": 1.0}


def test_metrics_keep_the_order_in_which_they_came():
    history = History("reward")
    names = [f"metric_{index}" for index in range(50)]
    history.add(1, dict.fromkeys(names, 1.0))
    assert history.state()["names"] == names


def test_a_metric_may_come_later_and_go():
    history = History("reward")
    history.add(1, {"loss": 1.0})
    history.add(2, {"loss": 2.0, "reward": 5.0})
    history.add(3, {"reward": 6.0})
    assert history.rows() == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "reward": 5.0},
        {"step": 3, "reward": 6.0},
    ]


@pytest.mark.parametrize("rows", [0, 5, 100])
def test_a_history_survives_a_checkpoint_and_resumes_as_if_it_had_never_stopped(rows):
    history, again = filled(rows, limit=16), History("reward", 16)
    file = io.BytesIO()
    torch.save(history.state(), file)
    file.seek(0)
    again.load_state(torch.load(file, weights_only=True))
    for one in (history, again):
        one.add(rows + 1, {"reward": 3.0, "new": 1.0})
    assert again.rows() == history.rows()
    assert (again.last, again.best, again.count, again.every) == (
        history.last,
        history.best,
        history.count,
        history.every,
    )


def test_what_a_checkpoint_holds_is_bounded():
    history = History("0")
    for step in range(20_000):
        history.add(step, {str(name): float(step) for name in range(30)})
    state = history.state()
    assert state["table"].nbytes <= 31 * 2048 * 8


def test_a_summary_has_the_keys_of_both_systems_and_is_strict_json():
    records = Records()
    records.begun_at, records.seconds["elapsed"] = 0, 4.0
    metrics = {"rollout/ep_rew_mean": 3.0, "train/value_loss": math.inf, "time/iterations": 1.0}
    records.train.add(64, metrics)
    records.evaluations.add(64, {"eval/mean_reward": 5.0})
    summary = summarize_records(
        records,
        env_steps=64,
        iterations=1,
        episodes=[(3.0, 10.0, math.nan), (math.inf, 11.0, math.nan)],
        latest_checkpoint="last.ckpt",
        best_checkpoint=None,
    )
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["training_fps"] == 16
    row = {"global_step": 64, "rollout/ep_rew_mean": 3.0, "train/value_loss": None, "time/iterations": 1}
    assert summary["train_history"] == [row]
    assert summary["last_train_metrics"] == summary["best_train_metrics"] == row
    assert summary["last_eval_metrics"] == {"global_step": 64, "eval/mean_reward": 5.0}
    assert summary["history"] == {
        "iterations": [1],
        "timesteps": [64],
        "episode_rewards": [3.0],
        "episode_lengths": [None],
        "policy_losses": [None],
        "value_losses": [None],
    }
    assert summary["episode_returns"] == [3.0, None]
    assert summary["time_split"] == {"collect": 0, "update": 0, "evaluate": 0, "other": 4}
