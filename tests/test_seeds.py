"""``fit --seeds N``: one run for each seed, in processes of their own, and one report."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ppo_lightning.__main__ import run
from ppo_lightning.tools import seeds

SMALL = ["--model.env=CartPole-v1", "--model.num_envs=2", "--model.num_steps=16", "--model.total_steps=128"]
CPU = ["--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]


@pytest.mark.paints
def test_seeds_leave_a_run_each_and_one_report_of_all(capsys):
    run(["fit", *SMALL, *CPU, "--seeds", "2", "--seed_everything", "5"])
    printed = capsys.readouterr()
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == [
        *("cartpole-v1_s5-6.html", "cartpole-v1_s5_0", "cartpole-v1_s6_0")
    ]
    for seed in (5, 6):
        config = yaml.safe_load(Path(f"lightning_logs/cartpole-v1_s{seed}_0/config.yaml").read_text())
        assert config["seed_everything"] == seed
        assert f"seed {seed}: mean return " in printed.err
    assert "2 seeds: mean return " in printed.out
    assert "cartpole-v1_s5-6.html" in printed.out
    assert "95 %" in Path("lightning_logs/cartpole-v1_s5-6.html").read_text()


def test_as_many_run_at_a_time_as_are_asked_for(monkeypatch):
    commands = []

    def started(command, **options):
        commands.append((command, options["env"]))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    assert seeds.fit_seeds(["--config", "cartpole"], range(1, 4), jobs=1) == []
    assert [command[-3] for command, _ in commands] == ["1", "2", "3"]
    command, environment = commands[0]
    assert command[:7] == [sys.executable, "-m", "ppo_lightning", "fit", "--config", "cartpole", "--seed_everything"]
    assert "PL_GLOBAL_SEED" not in environment


def test_a_name_has_the_seed_so_that_runs_side_by_side_have_folders_of_their_own(monkeypatch):
    named = []
    monkeypatch.setattr(
        seeds, "fit_seed", lambda words, seed, name: named.append((seed, name)) or seeds.Ended(seed, 0, "", None)
    )
    seeds.main([*SMALL, "--seeds", "2", "--name", "mine", "--jobs", "1"])
    assert named == [(1, "mine"), (2, "mine")]
    monkeypatch.undo()
    commands = []

    def started(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    seeds.fit_seed([], 7, "mine")
    assert commands[0][commands[0].index("--name") + 1] == "mine_s7"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["--seeds", "x"], "--seeds must be a whole number, got 'x'"),
        (["--seeds=2", "--jobs=0"], "--jobs must be 1 or more, got 0"),
        (["--seeds=2", "--seed_everything=-1"], "--seed_everything must be 0 or more"),
        (["--seeds=2", "--ckpt_path=last"], "--seeds begins new runs: leave --ckpt_path out"),
        (["--seeds=2", "--trainer.logger", "false"], "--trainer.logger false makes none: leave it out"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(words, message, capsys, monkeypatch):
    monkeypatch.setattr(seeds, "fit_seed", None)
    with pytest.raises(SystemExit) as ended:
        run(["fit", *SMALL, *words])
    said = capsys.readouterr().err or str(ended.value.code)
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_what_a_run_refuses_is_said_once_with_its_seeds(monkeypatch):
    def refused(words, seed, name):
        return seeds.Ended(seed, 2, "error: there is no key model.gama", None)

    monkeypatch.setattr(seeds, "fit_seed", refused)
    with pytest.raises(ValueError, match=r"of seeds 1, 2: there is no key model\.gama"):
        seeds.fit_seeds([], [1, 2], jobs=2)
