"""What learning.py trains, keeps and computes; and learning curves, which take minutes to an hour (``make test-long``)."""

import subprocess
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from benchmarks import learning, learning_report, learning_tasks
from benchmarks.learning_tasks import Task
from benchmarks.variants import without_bootstrap
from ppo_lightning import PPO, gae
from ppo_lightning.cli import main

SEEDS = (1, 2, 3)
SUITE = learning.load_suite()
TASKS, QUICK = SUITE.tasks, SUITE.quick


@pytest.fixture
def root(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    return tmp_path


# --- the benchmark -----------------------------------------------------------------------------------------------------

SMALL = {"model.num_envs": 2, "model.num_steps": 32, "model.num_eval_episodes": 1}


def rows_of(task):
    """The rows in this repository."""
    return learning.current(learning.read_rows(learning.RESULTS / learning.ROWS), task)


def test_a_run_is_a_row_and_a_curve_and_is_not_repeated(root, monkeypatch):
    task = Task("small", "", 640, "train", config="cartpole", flags=SMALL)
    assert learning.run_all([(task, 5)], root / "runs", 1, root / "results") == []
    (row,) = learning.current(learning.read_rows(root / "results/learning.csv"), task)
    assert row["seed"] == 5
    assert row["steps"] == "640"
    assert 8 < row["train"] < 200
    assert 8 <= row["eval"] <= 500
    (curve,) = learning.current(learning.read_rows(root / "results/learning_curves.csv"), task)
    assert float(curve[f"p{learning.POINTS}"]) == pytest.approx(row["train"], rel=1e-4)
    monkeypatch.setattr(learning, "train", None)
    assert learning.run_all([(task, 5)], root / "runs", 1, root / "results") == []
    other = Task("small", "", 640, "train", config="cartpole", flags={**SMALL, "model.gamma": 0.9})
    assert learning.current([row], other) == []


def test_a_run_that_fails_is_named_with_its_log_and_the_others_run(root):
    bad = Task("bad", "", 64, "train", config="cartpole", flags={"model.gama": 0.9})
    (message,) = learning.run_all([(bad, 1)], root, 1, root)
    assert message.startswith("bad, seed 1: exit status 2, see ")
    assert "gama" in Path(message.rpartition(" ")[2]).read_text()
    assert not (root / "learning.csv").exists()


def test_an_interrupt_starts_no_further_run(root, monkeypatch):
    begun = []

    def train(task, seed, root):
        begun.append(seed)
        time.sleep(len(begun) - 1)  # a run that has begun takes its time
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "train", train)
    task = Task("small", "", 640, "train", config="cartpole")
    with pytest.raises(KeyboardInterrupt):
        learning.run_all([(task, seed) for seed in range(1, 500)], root, 1, root)
    assert len(begun) < 5


def test_an_interrupted_run_resumes(root, monkeypatch):
    """Its command is given the last checkpoint, and its curve has the points of both parts."""
    task = Task("small", "", 640, "train", config="cartpole", flags=SMALL)
    folder = root / "small" / f"{task.settings}_seed_1" / "lightning_logs/version_0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "metrics.csv").write_text("step,rollout/ep_rew_mean\n64,20\n128,\n192,22\n")
    commands = []

    def run(command, **options):
        if "benchmarks.one_run" not in command:
            return subprocess.CompletedProcess(command, 0, stdout="")
        commands.append(command)
        later = folder.parent / "version_1"
        later.mkdir()
        (later / "metrics.csv").write_text("step,rollout/ep_rew_mean\n192,23\n640,30\n")
        (folder.parents[1] / "result.json").write_text('{"train": 30, "eval": 1, "steps": 640, "seconds": 1}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    row, curve = learning.train(task, 1, root)
    assert commands[0][-2:] == ["--ckpt_path", "last"]
    assert (row["train"], curve["p40"], curve["p12"], curve["p1"]) == ("30", "30", "23", "")


def test_settings_are_those_of_config_and_flags_alone(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs/one.yaml"
    monkeypatch.setattr(learning_tasks, "ROOT", tmp_path)
    config.write_text("# good\nmodel: {env: CartPole-v1}\n")
    before = Task("one", "", 10, "train").settings
    config.write_text("# better\nmodel:\n  env: CartPole-v1\n")
    assert Task("one", "", 10, "eval", seeds=3).settings == before
    changed = [Task("one", "", 11, "train"), Task("one", "", 10, "train", flags={"model.gamma": 0.9})]
    config.write_text("model: {env: CartPole-v0}\n")
    assert len({before, Task("one", "", 10, "train").settings, *(task.settings for task in changed)}) == 4


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_config_and_a_source(name):
    task = TASKS[name]
    assert yaml.safe_load(task.path.read_text())["model"]["env"]
    assert (task.published is None) == (task.source == "")


@pytest.mark.parametrize("change", SUITE.changes)
def test_fit_takes_every_change_of_the_ablation(change, root, capsys):
    task = SUITE.changes[change][0]
    words = [word for name, value in task.all_flags.items() for word in (f"--{name}", learning.flag(value))]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(task.path), *words, "--print_config"])
    assert ended.value.code == 0
    changed = yaml.safe_load(capsys.readouterr().out)
    for name, value in task.flags.items():
        found = changed
        for key in name.split("."):
            found = found[key]
        assert found == value or value.items() <= found.items() or found["class_path"] == value["class_path"]


def test_the_change_of_time_limits_is_that_alone(fit):
    estimates = []
    for estimator in (without_bootstrap, gae):
        torch.manual_seed(0)
        model = PPO(
            "Pendulum-v1", env_kwargs={"max_episode_steps": 7}, num_envs=2, num_steps=20, advantage_estimator=estimator
        )
        model.seed = 1
        rollout = model.collect()
        estimates.append(rollout["advantage"].clone())
    ended = rollout["truncated"]
    difference = model.gamma * rollout["next_state_value"]
    assert_close(estimates[0][ended], (estimates[1] - difference)[ended])
    after = torch.cat([ended[1:], torch.zeros(1, 2, dtype=torch.bool)])  # the step before an end
    assert_close(estimates[0][after], (estimates[1] - 0.99 * 0.95 * difference.roll(-1, 0))[after])


# --- statistics --------------------------------------------------------------------------------------------------------


def test_summaries_are_those_of_their_definitions():
    values = [3.0, 1.0, 2.0, 100.0, 4.0, 5.0, 6.0, -50.0]
    found = learning_report.summarize(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.iqm == pytest.approx(np.mean([2.0, 3.0, 4.0, 5.0]))
    assert (found.lowest, found.highest, found.count) == (-50.0, 100.0, 8)
    rng = np.random.default_rng(1)
    means = np.array(values)[rng.integers(8, size=(100_000, 8))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.interval == (pytest.approx(low, abs=1.0), pytest.approx(high, abs=1.0))
    assert learning_report.summarize([2.0, 4.0]) == learning_report.Summary(3.0, 3.0, None, 2.0, 4.0, 2)


def test_the_probability_of_improvement_counts_pairs():
    one, other = [1.0, 4.0, 3.0], [2.0, 3.0, 0.0]
    better, low, high = learning_report.probability_of_improvement([(one, other)])
    assert better == pytest.approx((1 + 3 + 2.5) / 9)
    assert 0 <= low < better < high <= 1
    assert learning_report.probability_of_improvement([([2.0, 3.0], [0.0, 1.0])]) == (1.0, 1.0, 1.0)


def test_the_probability_of_improvement_over_tasks_is_their_mean_and_its_interval_narrower_than_theirs():
    one, other = [1.0, 4.0, 3.0], [2.0, 3.0, 0.0]
    better, low, high = learning_report.probability_of_improvement([(one, other)])
    both, low_of_both, high_of_both = learning_report.probability_of_improvement([(one, other), (one, other)])
    assert both == better
    assert low < low_of_both < high_of_both < high
    mixed, *_ = learning_report.probability_of_improvement([(one, other), (other, one)])
    assert mixed == pytest.approx(0.5)


def test_normalised_returns_are_0_at_random_actions_and_1_at_the_published_figure():
    task = Task("one", "", 10, "train", config="cartpole", random=-100.0, published=100.0, seeds=3)
    rows = [{"task": "one", "settings": task.settings, "seed": i, "train": 100.0 * i - 200.0} for i in (1, 2, 3, 4)]
    unpublished = Task("one", "", 10, "train", config="cartpole", seeds=3)
    assert learning_report.normalized([task, unpublished], rows) == [[0.0, 0.5, 1.0]]
    assert learning_report.normalized([task], rows[:2]) == []


def test_a_performance_profile_weighs_tasks_alike_and_samples_seeds_within_each():
    scores = [[1.0, 1.0, 1.0], [0.0, 2.0]]
    shares, low, high = learning_report.stratified(learning_report.performance_profile([0.5, 1.5]), scores)
    assert shares.tolist() == [0.75, 0.25]
    assert (low.tolist(), high.tolist()) == ([0.5, 0.0], [1.0, 0.5])
    text = learning_report.table_over_tasks(scores)
    assert "| mean | 1.00 | 0.50 – 1.50 |" in text
    assert "| interquartile mean | 1.00 | 0.67 – 1.33 |" in text
    assert "| runs that reach 75 % of the published figure | 75 % | 50 % – 100 % |" in text


def test_a_config_says_what_it_reaches_once_all_its_runs_are_there():
    task = Task("one", "", 5000, "eval", config="cartpole", env="Other-v0", seeds=2)
    rows = [{"task": "one", "settings": task.settings, "seed": i, "eval": 10.0 * i, "seconds": 150.0} for i in (1, 2)]
    config = "# A task.\n# Reaches 3.\nmodel:\n  env: One-v0  # here\n"
    assert learning_report.with_figures(config, [task], rows[:1]) == "# A task.\nmodel:\n  env: One-v0  # here\n"
    found = learning_report.with_figures(config, [task], rows).splitlines()
    assert found[0] == "# A task."
    assert found[1] == "# Reaches 15.0 (evaluation, mean of 2 seeds) in 5,000 steps of Other-v0, 2 min on one core."
    assert found[2:] == ["model:", "  env: One-v0  # here"]


@pytest.mark.parametrize("name", ["cartpole", "acrobot", "mountain_car", "mountain_car_continuous", "pendulum_gsde"])
def test_random_actions_return_what_the_benchmark_says(name):
    env = gymnasium.make(yaml.safe_load(TASKS[name].path.read_text())["model"]["env"])
    env.action_space.seed(1)
    returns = []
    for seed in range(50):
        env.reset(seed=seed)
        rewards = [0.0]
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            rewards.append(float(reward))
            ended = terminated or truncated
        returns.append(sum(rewards))
    assert TASKS[name].random is not None
    assert abs(np.mean(returns) - TASKS[name].random) <= 4 * np.std(returns) / 50**0.5 + 0.05


def test_documents_show_what_the_rows_say():
    for path, text in learning_report.documents(SUITE, learning.read_rows(learning.RESULTS / learning.ROWS)).items():
        assert path.read_text() == text, (
            f"{path.name} is older than learning.csv: python -m benchmarks.learning --tables"
        )


def test_the_page_of_results_shows_every_picture():
    text = (learning.ROOT / "docs/results.md").read_text()
    pictures = sorted(path.name for path in (learning.ROOT / "benchmarks/results").glob("learning_*.png"))
    assert pictures
    assert [name for name in pictures if f"results/{name})" not in text] == []


def test_every_row_is_of_one_run_and_of_a_seed_that_no_search_has_seen():
    rows = learning.read_rows(learning.RESULTS / learning.ROWS)
    assert len({(row["task"], row["seed"], row["settings"]) for row in rows}) == len(rows)
    assert all(row["seed"] <= 100 for row in rows)


# --- policies ----------------------------------------------------------------------------------------------------------

POLICIES = sorted(learning.POLICIES.glob("*.ckpt"))
LONG = {"bipedal_walker", "lunar_lander", "lunar_lander_continuous", "pong"} | {
    name for name, task in TASKS.items() if task.family.startswith("MuJoCo") and name not in ("reacher",)
}


def test_policies_are_small():
    assert sum(path.stat().st_size for path in POLICIES) <= 2_000_000


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.long] * (path.stem in LONG), id=path.stem) for path in POLICIES]
)
def test_a_policy_evaluates_to_its_figure(path):
    """Within three standard errors of the difference of two means of 100 episodes; the episodes are others."""
    model, seed = PPO.load_from_checkpoint(path), torch.load(path, weights_only=True)["ppo_lightning"]["seed"]
    (row,) = [row for row in rows_of(TASKS[path.stem]) if row["seed"] == seed]
    found = model.evaluate(num_episodes=100, deterministic=True)
    error = found["eval/std_reward"] / 10
    assert abs(found["eval/mean_reward"] - row["eval"]) <= 3 * 2**0.5 * error + 1e-3


# --- learning curves ---------------------------------------------------------------------------------------------------


def train(config, seed, root, steps=None, **flags) -> float:
    """Mean return of the last 100 training episodes."""
    given = {f"model.{name}": value for name, value in flags.items()}
    task = Task(config, "", 0, "train", flags=given)
    steps = steps or yaml.safe_load(task.path.read_text())["model"].get("total_steps", 1_000_000)
    return float(learning.train(Task(config, "", steps, "train", flags=given), seed, root)[0]["train"])


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", QUICK)
def test_a_run_gives_what_the_table_says(name, root):
    task = TASKS[name]
    known = learning_report.summarize([row[task.counts] for row in rows_of(task)])
    row, _ = learning.train(task, 11, root)
    spread = known.highest - known.lowest
    assert known.lowest - spread <= float(row[task.counts]) <= known.highest + spread


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", None])
def test_what_only_memory_can_know_is_known_with_memory_alone(kind, masked, root):
    flags = {"policy.init_args.rnn": kind, **({} if kind else {"sequence_length": None})}
    returns = [train("memory", seed, root, **flags, **{"env_kwargs.masked": masked}) for seed in SEEDS]
    assert max(returns) <= 0.6 if kind is None else min(returns) >= 0.95


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_masks_reach_in_a_quarter_of_the_steps_what_is_not_reached_without(root):
    masked = [train("masked", seed, root / "with") for seed in SEEDS]
    unmasked = [train("masked", seed, root / "without", 200_000, **{"env_kwargs.masked": False}) for seed in SEEDS]
    assert min(masked) > 9 > 8 > max(unmasked)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("config", "bound"), [("pendulum", -210), ("pendulum_tanh", -250), ("pendulum_beta", -250)])
def test_every_seed_of_every_distribution_reaches(config, bound, root):
    assert min(train(config, seed, root) for seed in SEEDS) >= bound


def test_an_ablation_of_a_task_that_it_does_not_change_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        learning.parse(["--ablation", "--tasks", "hopper"], SUITE)
    assert "--ablation changes mujoco.yaml alone: take --tasks of mujoco_half_cheetah" in capsys.readouterr().err
    assert learning.parse(["--ablation", "--tasks", "mujoco_hopper"], SUITE).tasks == ["mujoco_hopper"]
