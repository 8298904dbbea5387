import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ppo_lightning import PPO
from ppo_lightning.cli import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.paints
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_trains_two_iterations_as_it_stands(config, tmp_path):
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
