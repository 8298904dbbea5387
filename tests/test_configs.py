import inspect
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import simulators
import yaml

from ppo_lightning import PPO
from ppo_lightning.__main__ import run
from ppo_lightning.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.paints
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trains_two_iterations_as_it_stands(config, tmp_path, monkeypatch):
    """Simulators of robots are stood in for."""
    simulators.install(monkeypatch)
    main(
        f"fit --config {config} --trainer.max_epochs 2 --trainer.default_root_dir {tmp_path} --trainer.accelerator cpu "
        "--trainer.enable_progress_bar false --trainer.enable_model_summary false --model.num_eval_episodes 1 "
        "--model.num_steps 64 --model.num_minibatches 4 --model.num_envs 4 --model.compile false".split()
    )
    assert (tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_holds_only_what_differs_from_the_defaults_in_the_order_of_the_data(config):
    model = yaml.safe_load(config.read_text())["model"]
    parameters = inspect.signature(PPO).parameters
    order = [name for name in parameters if name in model]
    assert list(model) == order
    for name, value in model.items():
        if name != "env":
            assert value != parameters[name].default, name


def test_the_readme_lists_every_config():
    readme = (ROOT / "README.md").read_text()
    for config in CONFIGS:
        assert config.name in readme


def test_module_and_console_script_are_the_same(monkeypatch, capsys):
    script = [str(Path(sys.executable).parent / "ppo-lightning"), "--help"]
    said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "fit" in said
    monkeypatch.setattr(sys, "argv", script)
    monkeypatch.delitem(sys.modules, "ppo_lightning.__main__", raising=False)  # else runpy warns
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ppo_lightning", run_name="__main__", alter_sys=False)
    assert (ended.value.code, capsys.readouterr().out) == (0, said)


def test_the_readmes_yaml_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    Path("readme.yaml").write_text(text)
    flags = "--trainer.max_epochs 1 --model.num_envs 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    main(["fit", "--config", "readme.yaml", *flags.split(), "--model.num_eval_episodes", "1"])
    assert (tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").exists()


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in ("pendulum", str(ROOT / "configs/pendulum.yaml")):
        with pytest.raises(SystemExit):
            main(["fit", "--config", given, "--print_config"])
    by_name, by_path = capsys.readouterr().out.split("seed_everything", 2)[1:]
    assert by_name.splitlines()[1:] == by_path.splitlines()[1:]
    (tmp_path / "pendulum").write_text("model: {env: Acrobot-v1}")  # a file of that name wins
    with pytest.raises(SystemExit):
        main(["fit", "--config", "pendulum", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["env"] == "Acrobot-v1"


def test_configs_are_listed_with_what_they_reach_and_printed(capsys):
    run(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == sorted(path.stem for path in CONFIGS)
    place = next(place for place, line in enumerate(lines) if line.startswith("mountain_car "))
    assert lines[place + 1].strip().startswith("Reaches −99")
    said = [after.strip() for line, after in pairwise(lines) if not line.startswith(" ")]
    assert all(one.startswith("Reaches ") or one == "Its return has not been measured." for one in said)
    run(["configs", "hopper"])
    assert capsys.readouterr().out == (ROOT / "configs/hopper.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["configs", "hoper"], "there is no config hoper: did you mean hopper?"),
        (["configs", "xyz"], "there is no config xyz: `ppo-lightning configs` lists them"),
        (["fit", "--config", "half_cheeta"], "there is no config file half_cheeta: did you mean half_cheetah?"),
        (["fit", "--config", "xyz"], "give the path of a YAML file, or a name of `ppo-lightning configs`"),
    ],
)
def test_a_wrong_name_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        run(words)
    said = capsys.readouterr().err or str(ended.value.code)
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
