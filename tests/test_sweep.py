"""Sweeps: what is searched, what is counted, and what survives."""

import csv
import datetime
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from processes import forked

from ppo_lightning import PPO, InputError
from ppo_lightning.tools.sweep import SweepOptions, fit_process, main, objective, results, search, sweep
from ppo_lightning.tools.sweep.fit_process import FitProcess, Measurement, Progress
from ppo_lightning.tools.sweep.objective import counted, objective_value, retry_history
from ppo_lightning.tools.sweep.space import Choice, Range, points_of, read_space

pytestmark = pytest.mark.paints

ROOT = Path(__file__).parent.parent
CONFIG = {"model": {"env": "CartPole-v1", "num_envs": 4, "num_steps": 32, "total_steps": 1000, "num_eval_episodes": 1}}
SPACE = {
    "model.gamma": {"distribution": "logit_uniform", "min": 0.9, "max": 0.999},
    "model.num_steps": {"distribution": "uniform_pow2", "min": 16, "max": 64},
}


class Luckless(RuntimeError):  # noqa: N818 - reads as what it is
    """A run of :func:`fits` fails."""


@pytest.fixture
def fits(monkeypatch):
    """Let a function of the model's parameters and the seed stand for ``fit``: it gives what is told, step by step."""
    monkeypatch.setattr(objective, "POLL_S", 0.0)
    # The command line is parsed once for all tests: that each key and value is tried there has a test of its own.
    monkeypatch.setattr(
        search,
        "full_config",
        lambda config, flags=(), what="": {
            "model": {**DEFAULTS, **config["model"]},
            "ckpt_path": config.get("ckpt_path"),
        },
    )

    monkeypatch.setattr(results, "plot_study", lambda study, spec: None)
    monkeypatch.setattr(search, "open_study", lambda storage, *given: OPEN(quick(storage), *given))

    def use(told: Callable[[dict, int], list[tuple[int, float]]]) -> None:
        class Fake:
            def __init__(self, folder, seed, *options):
                self.told, self.error = [], None
                try:
                    pairs = told(yaml.safe_load((folder / "config.yaml").read_text())["model"], seed)
                    self.left = [Measurement(steps, steps / 1000, value) for steps, value in pairs]
                except Luckless as error:
                    self.left, self.error = [], str(error)

            def measurements(self):
                return list(self.told)

            def is_running(self):
                self.told += self.left[:1]
                self.left = self.left[1:]
                return bool(self.left)

            def failure(self):
                return self.error

            def stop(self):
                pass

        monkeypatch.setattr(objective, "FitProcess", Fake)

    return use


OPEN, PLOT = search.open_study, results.plot_study
DEFAULTS = search.full_config(CONFIG)["model"]


def quick(storage: str) -> str:
    """A journal in the place of the database in the folder of results: a commit there takes ten milliseconds."""
    return storage.removeprefix("sqlite:///").replace("study.db", "study.journal") if "study.db" in storage else storage


def distribution(of: Range | Choice) -> optuna.distributions.BaseDistribution:
    """What Optuna is asked for."""
    trial = optuna.create_study().ask()
    of.suggest(trial, "x")
    return trial.distributions["x"]


def numbers(study: optuna.Study) -> list:
    return [trial.values[0] for trial in study.trials if trial.state.name == "COMPLETE"]


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


# --- what is searched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "low", "high", "middle"),
    [
        ("uniform", 0.0, 1.0, 0.5),
        ("int_uniform", 2, 20, 11),
        ("uniform_pow2", 16, 256, 64),
        ("log_uniform", 1e-4, 1e-2, 1e-3),
        ("logit_uniform", 0.1, 0.9, 0.5),
    ],
)
def test_a_range_is_even_on_its_scale_and_holds_its_ends(scale, low, high, middle):
    of = read_space({"model.x": {"distribution": scale, "min": low, "max": high}})["model.x"]
    line = distribution(of)
    assert of.value(line.low) == low
    assert of.value(line.high) == high
    assert of.value((line.low + line.high) / 2) == pytest.approx(middle, rel=1e-9)
    assert of.value(of.point(middle)) == middle


def test_there_and_back_is_the_same_number():
    for scale, value in [
        ("logit_uniform", 0.98),
        ("log_uniform", 3e-4),
        ("logit_uniform", 0.999),
        ("log_uniform", 1e-5),
    ]:
        of = Range(scale, 1e-6, 0.9999)
        assert of.value(of.point(value)) == value


def test_a_list_holds_values_of_any_kind():
    of = read_space({"model.hidden": [None, [64, 64], True, "relu"]})["model.hidden"]
    assert [of.value(text) for text in distribution(of).choices] == [None, [64, 64], True, "relu"]
    assert of.point([64, 64]) == "[64, 64]"
    assert of.point([64]) is None


def test_pufferlibs_names_are_understood_and_text_that_is_a_number_too(tmp_path):
    (tmp_path / "space.yaml").write_text("model.gamma: {distribution: logit_normal, min: 0.9, max: 0.99}\n"
                                         "model.ent_coef: {distribution: log_normal, min: 1e-4, max: 1e-2}\n"
                                         "model.clip_range: [0.1, 0.2]\n")  # fmt: skip
    assert read_space(tmp_path / "space.yaml") == {
        "model.gamma": Range("logit_uniform", 0.9, 0.99),
        "model.ent_coef": Range("log_uniform", 1e-4, 1e-2),
        "model.clip_range": Choice((0.1, 0.2)),
    }


def of(distribution: str, low: object, high: object) -> dict:
    return {"model.gamma": {"distribution": distribution, "min": low, "max": high}}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "must map keys of the config to what they may be"),
        ({"model.gamma": []}, "must list values that differ"),
        ({"model.gamma": [0.9, 0.9]}, "must list values that differ"),
        ({"model.gamma": 0.9}, "must be a list of values, or a mapping of distribution, min and max"),
        ({"model.gamma": {"distribution": "uniform", "min": 0, "max": 1, "mean": 0.5}}, "and nothing else"),
        (of("normal", 0, 1), "has no distribution 'normal': take one of uniform, int_uniform"),
        (of("uniform", 0.9, 0.1), "min must be less than max, got 0.9 and 0.1"),
        (of("uniform", "low", 1), "min and max must be numbers, got 'low'"),
        (of("log_uniform", 0, 1), "min and max of log_uniform must be more than 0, got 0 and 1"),
        (of("logit_uniform", 0.5, 1.0), "must be between 0 and 1, both left out"),
        (of("uniform_pow2", 16, 100), "must be powers of two, got 16 and 100"),
        (of("int_uniform", 0.5, 2), "must be whole numbers"),
        (of("uniform", 0.5, 1.5), "space: gamma must lie between 0 and 1, got 1.5"),
        ({"gamma": [0.9]}, "keys begin with model. or trainer., as model.gamma does"),
        ({"model.gama": [0.9]}, "model has no gama: did you mean model.gamma?"),
        ({"model.optimizer.init_args.lrr": [0.1]}, "did you mean model.optimizer.init_args.lr?"),
        ({"model.lr_scheduler.init_args.factor": [0.1]}, "model.lr_scheduler is null in the config: name there"),
        ({"seed_everything": [1, 2]}, "keys begin with model. or trainer."),
        ({"model.gamma": {"distribution": ["uniform"], "min": 0, "max": 1}}, "has no distribution \"['uniform']\""),
        ({"model.gamma": [datetime.date(2020, 1, 1)]}, "may hold text, numbers, lists and mappings"),
        (of("uniform", 0.5, 0.9) | {"model.num_steps": {"distribution": "uniform", "min": 16, "max": 64}}, "num_steps"),
        ({"model.clip_range.start": [0.1, 0.2], "model.clip_range": [0.1]}, "model.clip_range.start is a part of"),
        ({"model.vectorization": ["sync", "asink"]}, "space: model.vectorization must be one of sync, async"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_sentence(space, said):
    with pytest.raises(InputError, match=r"^space") as error:
        sweep(CONFIG, space)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"objective": "speed"}, "objective speed is not known"),
        ({"objective": ["seconds", "score"]}, "objective must begin with score or steps_to"),
        ({"objective": "steps_to"}, "give one, such as --threshold 475"),
        ({"objective": ["score", "steps"], "pruner": "median"}, "there are several objectives: leave it out"),
        ({"objective": ["score", "steps"], "sampler": "cmaes"}, "take tpe or random"),
        ({"sampler": "cmaes", "space": {"model.gamma": [0.9, 0.99]}}, "needs two ranges of numbers"),
        ({"trials": 0}, "trials must be 1 or more"),
        ({"config": {"model": {"envv": "CartPole-v1"}}}, "config: "),
        ({"storage": "nonsense://x"}, "storage nonsense://x cannot be opened"),
        ({"flags": ["--ckpt_path", "FILE"]}, "a sweep begins new runs: leave ckpt_path out"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_sentence(asked, said, fit, tmp_path):
    if "flags" in asked:
        file = tmp_path / "at.ckpt"
        fit(PPO("CartPole-v1", num_envs=2, num_steps=16, num_minibatches=2, total_steps=32)).save_checkpoint(file)
        asked = {"flags": [*asked["flags"][:-1], str(file)]}
    with pytest.raises(InputError) as error:
        sweep(**{"config": CONFIG, "space": SPACE, **asked})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_of_a_sweep_may_name_what_lies_here_and_lightnings_callbacks(tmp_path, monkeypatch):
    """As one of fit may."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / "lies_here.py").write_text("from ppo_lightning import PPOLoss\n\n\nclass Mine(PPOLoss):\n    pass\n")
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    config = {
        "model": {"env": "CartPole-v1", "loss": {"class_path": "lies_here.Mine"}},
        "trainer": {"callbacks": [timer]},
    }
    found = search.full_config(config)
    assert found["model"]["loss"]["class_path"] == "lies_here.Mine"
    assert found["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


# --- what is measured -------------------------------------------------------------------------------------------------


def test_a_run_that_reaches_the_threshold_beats_all_that_do_not_and_these_rank_by_how_near_they_came():
    def steps(*values: float) -> float:
        rows = [Measurement(100 * (index + 1), 1.0, value) for index, value in enumerate(values)]
        return objective_value(rows, "steps_to", threshold=475, budget=1000)

    assert steps(20, 480, 490) == 200
    assert steps(20, 475) == 200
    assert steps(75, 0) == pytest.approx(1000 * (2 - 1 / (1 + 400 / 475)))
    assert 1000 < steps(20, 470) < steps(20, 300) < steps(20, 20) < steps(-500, -400) < 2000
    assert steps(90, 300) < steps(-1000, 100), "wherever a run began"
    assert steps(math.nan, 20, math.nan, 300) == steps(20, 300)
    assert steps(*[20] * 10, 475) == 1000, "its last iteration ends beyond the budget"


def test_a_score_is_the_last_value_and_costs_are_the_last_steps_and_seconds():
    rows = [Measurement(100, 1.0, 9.0), Measurement(200, 2.5, 7.0)]
    assert [objective_value(rows, name, None, 1000) for name in ("score", "steps", "seconds")] == [7.0, 200, 2.5]


def test_the_config_itself_is_the_first_trial_so_that_the_best_is_never_worse(fits):
    fits(lambda model, seed: [(1000, -abs(model["gamma"] - 0.99))])
    found = sweep(CONFIG, SPACE, trials=4, sampler="random", quiet=True)
    assert found.study.trials[0].values == [0.0]
    assert found.best_config["model"]["gamma"] == 0.99
    assert found.best_config == yaml.safe_load(found.best_file.read_text())
    outside = {"model.num_steps": [64, 128]}
    other = sweep(CONFIG, outside, trials=1, study="other", quiet=True)
    assert "baseline" not in other.study.trials[0].user_attrs


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_what_is_proposed_comes_near_to_the_best(fits, sampler):
    fits(lambda model, seed: [(1000, -((model["ent_coef"] - 0.03) ** 2) - (model["vf_coef"] - 0.8) ** 2)])
    space = {f"model.{name}": {"distribution": "uniform", "min": 0, "max": 1} for name in ("ent_coef", "vf_coef")}
    study = sweep(CONFIG, space, trials=24, sampler=sampler, workers=2, quiet=True).study
    assert sum(numbers(study)[16:]) / 8 > sum(numbers(study)[1:9]) / 8


def test_workers_that_begin_at_the_same_moment_share_no_trial(fits):
    begun = []
    fits(lambda model, seed: begun.append(seed) or [(1000, 1.0)])
    for study in "abcd":
        begun.clear()
        sweep(CONFIG, SPACE, trials=8, workers=8, study=study, storage=f"sqlite:///{study}.db", quiet=True)
        assert sorted(begun) == list(range(8))


def test_several_seeds_count_as_their_mean_and_each_run_has_its_own(fits):
    fits(lambda model, seed: [(1000, seed)])
    found = sweep(CONFIG, SPACE, trials=2, seeds=3, quiet=True)
    assert numbers(found.study) == [1.0, 4.0]  # of 0 1 2 and of 3 4 5


def test_several_objectives_give_a_front_and_the_first_chooses_the_best(fits, monkeypatch):
    monkeypatch.setattr(results, "plot_study", PLOT)
    fits(lambda model, seed: [(1000 * model["ent_coef"], model["ent_coef"] * (1 if model["vf_coef"] == 0.5 else 0.1))])
    space = {"model.ent_coef": [0.1, 0.5, 0.9], "model.vf_coef": [0.5, 0.6]}
    found = sweep(CONFIG, space, trials=25, objective=["score", "steps"], sampler="random", workers=2, quiet=True)
    best = {tuple(trial.values) for trial in found.study.best_trials}
    assert best == {(0.1, 100), (0.5, 500), (0.9, 900)}
    assert found.best_config["model"]["ent_coef"] == 0.9
    fronts = [yaml.safe_load(file.read_text())["model"]["vf_coef"] for file in (found.folder / "front").iterdir()]
    assert set(fronts) == {0.5}
    assert (found.folder / "front.png").stat().st_size > 10_000


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_counted_with_its_message_and_the_sweep_continues(fits, capsys):
    def told(model: dict, seed: int) -> list[tuple[int, float]]:
        if model["num_steps"] == 64:
            raise Luckless("no such luck")
        return [(1000, 1.0)]

    fits(told)
    found = sweep(CONFIG, {"model.num_steps": [32, 64]}, trials=6, sampler="random")
    assert set(states(found.study)) == {"COMPLETE", "FAIL"}
    assert len(found.study.trials) == 6
    said = capsys.readouterr().out
    assert "failed: no such luck" in said
    rows = list(csv.DictReader((found.folder / "trials.csv").read_text().splitlines()))
    assert {row["error"] for row in rows} == {"", "no such luck"}
    assert [row["state"] for row in rows] == [state.lower() for state in states(found.study)]


def test_where_no_trial_ends_well_the_sentence_says_why(fits):
    def told(model: dict, seed: int) -> list[tuple[int, float]]:
        raise Luckless("no such luck")

    fits(told)
    with pytest.raises(InputError, match=r"no trial of study sweep completed .*; the last failed: no such luck"):
        sweep(CONFIG, SPACE, trials=2, quiet=True)


NOT_A_NUMBER = """
import sys
(file,) = [word.partition("=")[2] for word in sys.argv if "callbacks.file" in word]
open(file, "w").write('{"steps": 1, "seconds": 1, "value": NaN}\\n')
"""


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('error: no such luck'); print('more'); raise SystemExit(1)", "no such luck"),
        (
            """raise SystemExit('error: Parser key "x":\\n  Expected a number\\nmore')""",
            'Parser key "x": Expected a number',
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("pass", "the run reported no finite value of eval/mean_reward"),
        (NOT_A_NUMBER, "the run reported no finite value of eval/mean_reward"),
    ],
)
def test_why_a_run_failed_is_found_in_its_output(monkeypatch, tmp_path, code, why):
    monkeypatch.setattr(fit_process, "FIT", [sys.executable, "-c", code])
    run = FitProcess(tmp_path, 0, "eval/mean_reward")
    run.process.wait()
    run.stop()
    assert run.failure() == why


def test_what_a_run_tells_is_read_once_and_no_line_before_it_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(fit_process, "FIT", [sys.executable, "-c", ""])
    run = FitProcess(tmp_path, 0, "eval/mean_reward")
    run.process.wait()
    run.stop()
    assert run.measurements() == []
    one, two, three = (json.dumps({"steps": 1, "seconds": 1, "value": value}) + "\n" for value in (7, 8, 9))
    with run.file.open("w") as file:
        for text, seen in [
            (one[:9], []),
            (one[9:], [7]),
            (two + three[:5], [7, 8]),
            ("", [7, 8]),
            (three[5:], [7, 8, 9]),
        ]:
            file.write(text)
            file.flush()
            assert [row.value for row in run.measurements()] == seen


def test_a_trial_worse_than_the_median_is_ended_early(fits):
    fits(lambda model, seed: [(steps, 100 * model["vf_coef"]) for steps in range(50, 1001, 50)])
    space = {"model.vf_coef": [0.5, 0.01]}
    found = sweep(CONFIG, space, trials=14, sampler="random", quiet=True)
    pruned = [trial for trial in found.study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert {trial.params["model.vf_coef"] for trial in pruned} == {"0.01"}
    assert len(pruned[-1].intermediate_values) < objective.PRUNE_POINTS
    kept = sweep(CONFIG, space, trials=8, sampler="random", workers=4, study="kept", pruner="none", quiet=True)
    assert set(states(kept.study)) == {"COMPLETE"}


def test_fewer_steps_to_a_threshold_are_sought_downwards_and_pruned_upwards(fits):
    fits(lambda model, seed: [(steps, steps * model["vf_coef"]) for steps in range(50, 1001, 50)])
    found = sweep(
        CONFIG, {"model.vf_coef": [0.5, 0.8, 0.05]}, trials=14, objective="steps_to", threshold=300, sampler="random",
        quiet=True,
    )  # fmt: skip
    assert found.best_config["model"]["vf_coef"] == 0.8
    assert found.study.best_value == 400
    pruned = {trial.params["model.vf_coef"] for trial in found.study.trials if trial.state.name == "PRUNED"}
    assert "0.05" in pruned
    assert "0.8" not in pruned


# --- what survives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["sqlite:///shared.db", "shared.journal"])
def test_a_sweep_resumes_where_it_was_and_proposes_what_it_would_have(fits, storage):
    fits(lambda model, seed: [(1000, -abs(model["gamma"] - 0.97))])
    whole = sweep(CONFIG, SPACE, trials=6, study="whole", storage=storage, quiet=True).study
    sweep(CONFIG, SPACE, trials=3, study="parts", storage=storage, quiet=True)
    parts = sweep(CONFIG, SPACE, trials=6, study="parts", storage=storage, quiet=True).study
    assert [trial.params for trial in parts.trials] == [trial.params for trial in whole.trials]
    assert numbers(parts) == numbers(whole)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sweep_that_was_interrupted_finds_what_it_would_have_found(fits, monkeypatch, capsys, sampler):
    """The trial that is repeated keeps its seeds and its name, and is counted once."""
    fits(lambda model, seed: [(500, model["gamma"]), (1000, seed - model["gamma"])])
    given = {"trials": 6, "seeds": 2, "sampler": sampler, "pruner": "none", "quiet": True}
    whole = sweep(CONFIG, SPACE, study="whole", **given).study
    follow = objective.Objective.follow
    for interrupted in (0, 3):

        def interrupt(self, trial, *given, interrupted=interrupted):
            if trial.number == interrupted:
                raise KeyboardInterrupt
            follow(self, trial, *given)

        with monkeypatch.context() as patch:
            patch.setattr(objective.Objective, "follow", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sweep(CONFIG, SPACE, study="parts", **given)
    found = sweep(CONFIG, SPACE, study="parts", **{**given, "quiet": False})
    assert states(found.study) == ["FAIL", "COMPLETE", "COMPLETE", "FAIL", *["COMPLETE"] * 4]
    assert numbers(found.study) == numbers(whole)
    assert found.study.trials[1].user_attrs["baseline"]
    said = capsys.readouterr().out
    assert "(6 ended)" in said
    assert "(7 ended)" not in said
    assert "2 interrupted and retried, 6 complete" in " ".join(said.split())
    rows = list(csv.DictReader((found.folder / "trials.csv").read_text().splitlines()))
    assert [row["error"] for row in rows].count("interrupted and retried") == 2


def test_machines_whose_seeds_are_neighbours_propose_different_trials():
    gamma = read_space(SPACE)["model.gamma"]
    proposed = set()
    for seed in range(4):
        for index in range(4):
            study = optuna.create_study(sampler=search.make_sampler(SweepOptions(sampler="random", seed=seed), index))
            proposed.add(gamma.suggest(study.ask(), "model.gamma"))
    assert len(proposed) == 16


def ask(study: optuna.Study) -> optuna.Trial:
    """A trial that another process begins."""
    trial = study.ask()
    for key, of in read_space(SPACE).items():
        of.suggest(trial, key)
    return trial


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")
def test_the_last_trials_of_another_process_are_waited_for_and_retried_if_it_falls_silent(fits, monkeypatch, capsys):
    fits(lambda model, seed: [(1000, 1.0)])
    monkeypatch.setattr(search, "open_study", OPEN)
    monkeypatch.setattr(search, "HEARTBEAT_S", 1)
    monkeypatch.setattr(search, "GRACE_S", 2)
    study = sweep(CONFIG, SPACE, trials=2, quiet=True).study
    other = ask(study)  # killed before its first heartbeat
    study = sweep(CONFIG, SPACE, trials=3).study
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[3].params == other.params
    assert retry_history(study.trials[3]) == [2]
    assert len(counted(study)) == 3
    assert "waiting for 1 trials of other processes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_that_another_machine_took_over_is_given_up(fits, monkeypatch, workers):
    """After a long silence, as of a machine that slept."""
    fits(lambda model, seed: [(500, 1.0), (1000, 1.0)])
    follow = objective.Objective.follow

    def slept(self, trial, *given):
        if trial.number == 1:
            trial.study.tell(1, state=optuna.trial.TrialState.FAIL)
            objective.retry(trial.study, trial.study.trials[1])
        follow(self, trial, *given)

    monkeypatch.setattr(objective.Objective, "follow", slept)
    study = sweep(CONFIG, SPACE, trials=4, workers=workers, quiet=True).study
    assert sorted(states(study)) == [*["COMPLETE"] * 4, "FAIL"]
    assert study.trials[1].state.name == "FAIL"
    assert len(counted(study)) == 4


def test_processes_that_begin_a_study_at_the_same_moment_share_it(capfd):
    together = multiprocessing.get_context("fork").Barrier(2)

    def begin(rank: int) -> str:
        together.wait(60)
        return search.open_study("sqlite:///shared.db", "study", ["score"]).study_name

    assert forked(begin) == ["study", "study"]
    assert capfd.readouterr().err == ""


def test_a_study_that_sought_something_else_does_not_resume(fits):
    fits(lambda model, seed: [(1000, 1.0)])
    sweep(CONFIG, SPACE, trials=1, quiet=True)
    with pytest.raises(InputError, match="study sweep was begun with another space: give this one a name"):
        sweep(CONFIG, {"model.gamma": [0.9, 0.99]}, trials=2, quiet=True)
    with pytest.raises(InputError, match="another metric"):
        sweep(CONFIG, SPACE, trials=2, metric="rollout/ep_rew_mean", quiet=True)


def test_a_journal_has_no_heartbeat_so_that_nothing_is_waited_for(fits):
    fits(lambda model, seed: [(1000, 1.0)])
    ask(sweep(CONFIG, SPACE, trials=2, storage="shared.journal", quiet=True).study)
    study = sweep(CONFIG, SPACE, trials=4, storage="shared.journal", quiet=True).study
    assert states(study) == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_stops_the_runs_and_queues_them(fits, monkeypatch, workers):
    begun: list[FitProcess] = []

    class Sleeps(FitProcess):
        def __init__(self, *given):
            super().__init__(*given)
            begun.append(self)
            if len(begun) == workers:
                os.kill(os.getpid(), signal.SIGINT)

    fits(lambda model, seed: [(1000, 1.0)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the console script leaves another one
    with monkeypatch.context() as patch:
        patch.setattr(objective, "POLL_S", 0.1)
        patch.setattr(objective, "FitProcess", Sleeps)
        patch.setattr(fit_process, "FIT", [sys.executable, "-c", "import time; time.sleep(60)"])
        with pytest.raises(KeyboardInterrupt):
            sweep(CONFIG, SPACE, trials=4, workers=workers, quiet=True)
    signal.signal(signal.SIGINT, before)
    assert [run.process.returncode for run in begun] == [-signal.SIGTERM] * workers
    study = sweep(CONFIG, SPACE, trials=4, quiet=True).study
    assert states(study) == ["FAIL"] * workers + ["COMPLETE"] * 4
    interrupted = [trial.params for trial in study.trials[:workers]]
    assert all(trial.params in interrupted for trial in study.trials[workers : 2 * workers])


# --- with real runs ---------------------------------------------------------------------------------------------------

SMALL = {
    "model.num_envs": 4, "model.num_steps": 32, "model.total_steps": 512, "model.num_eval_episodes": 1,
    "trainer.accelerator": "cpu",
}  # fmt: skip


def command(tmp_path: Path, *words: str) -> list[str]:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    config = str(ROOT / "configs/cartpole.yaml")
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    return ["--config", config, "--space", str(tmp_path / "space.yaml"), "--workers", "2", *flags, *words]


def test_a_sweep_on_the_command_line_leaves_a_config_that_fit_takes_a_table_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    main(command(tmp_path, "--trials", "2", "--metric", "rollout/ep_rew_mean", "--seed", "5"))
    place = tmp_path / "sweeps/cartpole"
    assert {"best.yaml", "trials.csv", "history.png", "study.db", "trials"} <= {file.name for file in place.iterdir()}
    said = capsys.readouterr().out
    assert "cartpole: 2 complete" in said
    assert "trial config (" in said
    assert f"fit --config {place / 'best.yaml'}" in said
    seeds = [
        yaml.safe_load(path.read_text())["seed_everything"]
        for path in sorted(place.rglob("lightning_logs/*/config.yaml"))
    ]
    assert seeds == [5, 6]
    best = search.full_config(place / "best.yaml")
    assert best["model"]["total_steps"] == 512
    assert best["trainer"]["callbacks"] is None
    told = [json.loads(line) for line in (place / "trials/0000/progress_5.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in told] == [128, 256, 384, 512]


def test_a_second_config_changes_the_first_as_with_fit(monkeypatch):
    seen = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(search, "sweep", lambda **given: seen.append((given["config"], given["flags"])))
    main(["--config", "a.yaml", "--config=b.yaml", "--space", "s.yaml", "--model.gamma", "0.9"])
    assert seen == [("a.yaml", ["--config=b.yaml", "--model.gamma", "0.9"])]


def test_bad_input_ends_the_command_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path, "--model.gama", "3"))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "--model.gama" in error
    assert "did you mean --model.gamma?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("metric", ["eval/mean_reward", "rollout/ep_rew_mean"])
def test_progress_is_reported_where_the_metric_is_new_and_the_run_ends_at_the_threshold(
    fit, tmp_path, monkeypatch, metric
):
    monkeypatch.setattr(fit_process, "exit_with_parent", lambda: None)
    told = tmp_path / "told.jsonl"

    def rows(**given) -> list[dict]:
        told.unlink(missing_ok=True)
        model = PPO("CartPole-v1", num_envs=2, num_steps=64, total_steps=1280, eval_interval=5, num_eval_episodes=1)
        fit(model, callbacks=[Progress(str(told), metric, **given)], limit_val_batches=1)
        return [json.loads(line) for line in told.read_text().splitlines()]

    every = 640 if metric.startswith("eval") else 128
    whole = rows()
    assert [row["steps"] for row in whole] == list(range(every, 1281, every))
    assert [row["steps"] for row in rows(threshold=whole[0]["value"])] == [every]


def test_a_metric_that_there_is_not_ends_the_run_with_one_sentence(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_process, "exit_with_parent", lambda: None)
    model = PPO("CartPole-v1", num_envs=2, num_steps=64, total_steps=128)
    with pytest.raises(InputError, match=r"metric train/los is not known: did you mean train/loss\?"):
        fit(model, callbacks=[Progress(str(tmp_path / "told.jsonl"), "train/los")])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/sweeps").glob("*.yaml")))
def test_the_first_trial_of_each_space_is_its_config(name):
    config = search.full_config(str(ROOT / f"configs/{name}.yaml"))
    assert None not in points_of(read_space(ROOT / f"configs/sweeps/{name}.yaml"), config).values()


def test_a_config_outside_of_the_space_is_said_to_be_no_trial(fits, capsys):
    fits(lambda model, seed: [(1000, model["gamma"])])
    sweep(CONFIG, {"model.gamma": [0.5, 0.6], "model.gae_lambda": [0.95]}, trials=2)
    assert "the config itself is no trial, its model.gamma 0.99 lies outside of the space" in capsys.readouterr().out


def test_the_documents_example_can_be_searched(fits, tmp_path):
    text = (ROOT / "docs/sweeps.md").read_text()
    (tmp_path / "space.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert len(read_space(tmp_path / "space.yaml")) == 6
    fits(lambda model, seed: [(1000, model["gamma"])])
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0].replace("trials=50", "trials=3"), names)
    assert names["found"].best_config["model"]["gamma"] >= 0.9


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_sweep_leaves_no_process_and_resumes(tmp_path):
    given = command(tmp_path, "--trials", "4", "--model.total_steps", "6000")
    words = [sys.executable, "-m", "ppo_lightning", "sweep", *given]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(words, env=environment, cwd=tmp_path)
    place = tmp_path / "sweeps/cartpole"
    deadline = time.monotonic() + 200
    while len(list(place.glob("trials/*/progress_*.jsonl"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 60  # one that has just begun notices when it has imported everything
    while (left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(place).encode() in _read(path)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert left == []
    subprocess.run(words, env=environment, cwd=tmp_path, check=True)
    study = search.open_study(f"sqlite:///{place / 'study.db'}", "cartpole", ["score"])
    assert states(study).count("COMPLETE") + states(study).count("PRUNED") == 4
    assert len(counted(study)) == 4
    assert 1 <= states(study).count("FAIL") <= 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
