"""What export, enjoy and push have in common: a checkpoint of the user's own modules, and files that cannot be written."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
from gymnasium.spaces import Box, Discrete

from ppo_lightning import PPO, ActorCritic, EnvironmentFault, InputError
from ppo_lightning.__main__ import run
from ppo_lightning.cli import main
from ppo_lightning.tools import hub
from ppo_lightning.tools.video import record

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 64, "num_minibatches": 2}
FLAGS = [f"--model.{name}={value}" for name, value in SMALL.items()]
MODULE = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv
from ppo_lightning import ActorCritic

class Env(CartPoleEnv):
    pass

def make(render_mode=None):
    return gym.make("CartPole-v1", render_mode=render_mode)

class Network(ActorCritic):
    pass
"""


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run([str(word) for word in words])
    return f"{ended.value.code} {capsys.readouterr().err}"


@pytest.fixture
def forget(monkeypatch, tmp_path):
    """Work in an empty folder, and import the user's module again at each call."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        sys.modules.pop("module_of_the_user", None)
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    yield forget
    forget()


@pytest.mark.parametrize("env", ["Env", "make"])
def test_a_checkpoint_of_the_users_own_modules_is_used_where_it_is_trusted(env, forget, capsys):
    Path("module_of_the_user.py").write_text(MODULE)
    own = [f"--model.env=module_of_the_user.{env}", "--model.policy=module_of_the_user.Network"]
    main(["fit", *own, *FLAGS, "--seed_everything=3", "--trainer.accelerator=cpu"])
    forget()
    for words in (["export"], ["enjoy"], ["push", "me/it", "--local-folder", "policy"]):
        message = refused([words[0], *words[1:2], "last", *words[2:]], capsys)
        assert "which no checkpoint may choose" in message
        assert "--trust" in message
        assert "module_of_the_user" not in sys.modules
    run(["export", "last", "--trust", "--out", "policy.onnx"])
    observation = np.zeros((1, 4), np.float32)
    assert onnxruntime.InferenceSession("policy.onnx").run(None, {"observation": observation})[0].shape == (1,)
    forget()
    run(["push", "me/it", "last", "--trust", "--local-folder", "policy", "--episodes", "1", "--no-video"])
    assert "module_of_the_user" in Path("policy/config.yaml").read_text()


def test_push_takes_what_no_file_can_hold(fit, tmp_path):
    network = partial(ActorCritic, hidden_sizes=(8,))
    fit(PPO("CartPole-v1", policy=network, **SMALL)).save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(InputError, match="pass policy=… again"):
        hub.push("me/it", tmp_path / "own.ckpt", local_folder=tmp_path / "policy")
    hub.push("me/it", tmp_path / "own.ckpt", local_folder=tmp_path / "policy", episodes=1, video=False, policy=network)
    model = PPO.from_pretrained(tmp_path / "policy", policy=network)
    assert model.predict(np.zeros(4, np.float32)) in (0, 1)


def test_files_that_cannot_be_written_are_refused_before_anything_is_done(fit, forget, capsys):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint("run.ckpt")
    Path("a_file").write_text("kept")
    Path("folder.onnx").mkdir()
    Path("folder.mp4").mkdir()
    Path("there.mp4").write_text("kept")
    Path("blocked/model.safetensors").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    push = ["push", "me/it", "run.ckpt", "--force", "--local-folder"]
    for words, message in (
        (["export", "run.ckpt", "--force", "--out", "folder.onnx"], "folder.onnx is a folder"),
        (["export", "run.ckpt", "--out", "a_file/policy.onnx"], "the folder a_file does not exist"),
        (["export", ""], "the checkpoint's name is empty"),
        (["enjoy", "run.ckpt", "--out", "folder.mp4", "--force"], "folder.mp4 is a folder"),
        (["enjoy", "run.ckpt", "--out", "a_file/x.mp4"], "the folder a_file does not exist"),
        (["enjoy", "run.ckpt", "--out", "there.mp4"], "there.mp4 exists"),
        ([*push, "a_file/policy"], "a_file is no folder that can be written to"),
        ([*push, "a_file"], "a_file is no folder that can be written to"),
        ([*push, "blocked"], "blocked/model.safetensors is a folder"),
    ):
        found = refused(words, capsys)
        assert message in found
        assert "Traceback" not in found
    assert sorted(Path().rglob("*")) == before
    assert Path("there.mp4").read_text() == "kept"


def test_a_file_system_that_refuses_is_one_sentence(fit, forget, capsys, monkeypatch):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint("run.ckpt")

    def fails(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "policy.onnx")

    monkeypatch.setattr("ppo_lightning.tools.export.export", fails)
    assert "error: policy.onnx: permission denied" in refused(["export", "run.ckpt"], capsys)


def test_push_replaces_all_files_of_an_earlier_policy(fit, forget, capsys):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint("run.ckpt")
    Path("policy").mkdir()
    for name in ("replay.mp4", "learning_curve.png", "README.md"):
        Path("policy", name).write_text("of another")
    Path("policy/notes.txt").write_text("mine")
    hub.push("me/it", "run.ckpt", local_folder="policy", episodes=1, video=False, force=True)
    assert {path.name for path in Path("policy").iterdir()} == {
        *("README.md", "config.yaml", "model.safetensors", "notes.txt")
    }


@pytest.mark.parametrize("config", ["model: null", "model: [1]", "model: hello", "[]"])
def test_a_damaged_config_is_one_sentence(config, fit, forget):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint("run.ckpt")
    hub.push("me/it", "run.ckpt", local_folder="policy", episodes=1, video=False)
    Path("policy/config.yaml").write_text(config)
    with pytest.raises(InputError, match="policy holds no policy of ppo_lightning"):
        PPO.from_pretrained("policy")


class NeedsPackage(gym.Env):
    """Cannot draw, as Gymnasium's own where pygame is missing."""

    observation_space, action_space, metadata = Box(-1.0, 1.0, (2,)), Discrete(2), {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        if self.render_mode is not None:
            raise gym.error.DependencyNotInstalled("pygame is not installed, run `pip install pygame`")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {}


def test_a_package_that_drawing_needs_is_one_sentence(fit, tmp_path):
    model = PPO(NeedsPackage, **SMALL)
    fit(model)
    with pytest.raises(EnvironmentFault) as raised:
        record(model, tmp_path)
    assert (
        str(raised.value) == "environment 0 needs a package in reset: pygame is not installed, run `pip install pygame`"
    )


def test_seeds_and_help_print_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["fit", "--seeds", "2", "--help"])
    assert ended.value.code in (0, None)
    assert "--seeds" in capsys.readouterr().out


def test_a_terminated_export_leaves_nothing(fit, forget):
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint("run.ckpt")
    Path("out").mkdir()
    command = [sys.executable, "-m", "ppo_lightning", "export", "run.ckpt", "--out", "out/policy.pt2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not any(Path("out").iterdir()) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not any(Path("out").iterdir())
