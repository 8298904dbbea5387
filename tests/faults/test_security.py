"""A checkpoint is data: it executes nothing, names little, and writes nowhere else. A config is code."""

import functools
import http.server
import io
import os
import sys
import threading
import warnings
from pathlib import Path

import gymnasium as gym
import lightning
import pytest
import torch
import yaml

from ppo_lightning import PPO
from ppo_lightning.cli import main
from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import read_checkpoint

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "num_eval_episodes": 1}
FLAGS = [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
FLAGS += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
CONFIGS = Path(__file__).parents[2] / "configs"
EVIL = """
import os
import gymnasium
os.system("touch executed")


def make(**kwargs):
    os.system("touch called")
    return gymnasium.make("CartPole-v1")


class Network:
    def __init__(self, *given):
        os.system("touch called")
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Contents of a checkpoint that the command line wrote."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--model.env", "CartPole-v1", "--model.total_steps", "64", "--name", "version", *FLAGS])
        return torch.load("lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def _evil(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported, and another where something of it is called."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("evil", None)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def changed(contents, *path, value):
    """A copy of nested contents in which one item is another."""
    first, *rest = path
    copied = list(contents) if isinstance(contents, list) else dict(contents)
    copied[first] = changed(contents[first], *rest, value=value) if rest else value
    return copied


PAYLOADS = {
    "state_dict": (("state_dict", "env_steps"), Payload()),
    "hyperparameters": (("hyper_parameters", "gamma"), Payload()),
    "callbacks": (("callbacks", "Theirs"), Payload()),
    "optimizer": (("optimizer_states", 0, "state"), Payload()),
    "instantiator": (("hyper_parameters", "_instantiator"), "evil.make"),
}


def by_fit(path, fit):
    fit(PPO("CartPole-v1", total_steps=128, **SMALL), ckpt_path=path, enable_checkpointing=True)


def by_loading(path, fit):
    PPO.load_from_checkpoint(path, weights_only=False)


def by_command(path, fit):
    main(["fit", "--model.total_steps", "128", "--ckpt_path", str(path), *FLAGS])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *given):
        """Nothing."""


@pytest.fixture
def served(tmp_path):
    """Address under which the files of the test's folder are served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def saved(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def nothing_ran(tmp_path):
    return not (tmp_path / "executed").exists() and not (tmp_path / "called").exists() and "evil" not in sys.modules


def refused(way, path, fit):
    """What a way to load a checkpoint says, in one sentence."""
    with pytest.raises((InputError, SystemExit)) as caught:
        way(path, fit)
    said = str(caught.value)
    assert said not in ("0", "2")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("way", [by_fit, by_loading, by_command, "url"])
def test_no_payload_is_executed(way, payload, plain, fit, tmp_path, served):
    place, value = PAYLOADS[payload]
    Path("bad.ckpt").write_bytes(saved(changed(plain, *place, value=value)))
    if way == "url":
        for by in (by_fit, by_loading, by_command):
            assert "bad.ckpt" in refused(by, f"{served}/bad.ckpt", fit)
    else:
        assert "bad.ckpt" in refused(way, Path("bad.ckpt"), fit)
    assert nothing_ran(tmp_path)


def test_the_payloads_would_execute(plain, tmp_path):
    place, value = PAYLOADS["callbacks"]
    Path("bad.ckpt").write_bytes(saved(changed(plain, *place, value=value)))
    torch.load("bad.ckpt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_url_is_verified_like_a_file(plain, fit, served):
    whole = saved(plain)
    Path("good.ckpt").write_bytes(whole)
    Path("bad.ckpt").write_bytes(whole[:1000] + b"?" + whole[1001:])
    assert PPO.load_from_checkpoint(f"{served}/good.ckpt").num_env_steps == 64
    for way in (by_fit, by_loading, by_command):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # best.ckpt, of fit's
            way(f"{served}/good.ckpt", fit)
        assert "checksum" in refused(way, f"{served}/bad.ckpt", fit)
        assert "there is no checkpoint at" in refused(way, f"{served}/none.ckpt", fit)
    assert {path.name for path in Path().iterdir() if path.is_dir()} <= {"checkpoints", "lightning_logs"}


NAMES = {
    "a function of a module that is imported already": {"env": "os.system", "env_kwargs": {"command": "touch called"}},
    "the command line, with a config": {"env": "ppo_lightning.cli.main", "env_kwargs": {"args": ["fit"]}},
    "a function of another module": {"env": "evil.make"},
    "a module with an environment": {"env": "evil:CartPole-v1"},
    "a class of another module": {"policy": {"class_path": "evil.Network"}},
    "the same as text": {"policy": '{"class_path": "evil.Network"}'},
    "a config elsewhere": {"policy": "http://127.0.0.1:1/evil.yaml"},
    "a class within a class": {
        "policy": {"class_path": "ppo_lightning.ActorCritic", "init_args": {"activation": "evil.Network"}}
    },
    "a class among arguments": {"env_kwargs": {"x": {"class_path": "evil.Network"}}},
    "a class among arguments, as a key of observations": {
        "env_kwargs": {"actor_keys": [{"class_path": "evil.Network"}]}
    },
    "a class among keys of observations": {
        "policy": {
            "class_path": "ppo_lightning.ActorCritic",
            "init_args": {"actor_keys": [{"class_path": "evil.Network"}]},
        }
    },
    "a class among keys of info": {"info_keys": [{"class_path": "evil.Network"}]},
    "text among arguments": {"env_kwargs": {"x": '{"class_path": "evil.Network"}'}},
    "text in the place of arguments": {"env_kwargs": "evil.yaml"},
    "a wrapper": {"wrappers": [{"class_path": "evil.Network"}]},
    "a wrapper that writes elsewhere": {
        "wrappers": [{"class_path": "gymnasium.wrappers.RecordVideo", "init_args": {"video_folder": "../called"}}]
    },
    "an optimiser": {"optimizer": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "called"]}}},
    "a class of the wrong kind": {"lr_scheduler": {"class_path": "gymnasium.vector.utils.CloudpickleWrapper"}},
    "another model": {"_class_path": "evil.Network"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_may_not_name_what_is_called(name, plain, fit, tmp_path):
    (key,) = NAMES[name].keys() - {"env_kwargs"} or {"env_kwargs"}
    hyperparameters = {**plain["hyper_parameters"], **NAMES[name]}
    Path("bad.ckpt").write_bytes(saved({**plain, "hyper_parameters": hyperparameters}))
    assert f"the checkpoint's {key} is" in refused(by_loading, Path("bad.ckpt"), fit)
    if key != "_class_path":  # which the command line does not read
        assert f"the checkpoint's {key} is" in refused(by_command, Path("bad.ckpt"), fit)
    assert nothing_ran(tmp_path)


RECORDER = {"class_path": "gymnasium.wrappers.RecordVideo", "init_args": {"video_folder": "elsewhere"}}
PLACES = {
    "a wrapper that writes videos": {"wrappers": [RECORDER]},
    "its folder among further arguments": {
        "wrappers": [{**RECORDER, "init_args": {}, "dict_kwargs": {"video_folder": "a"}}]
    },
    "a file for the environment": {"env_kwargs": {"xml_file": "robot.xml"}},
    "a folder for the environment, under any name": {"env_kwargs": {"recordings": {"to": "../elsewhere"}}},
    "a list of files": {"env_kwargs": {"scene_paths": ["one", "two"]}},
    "a home": {"env_kwargs": {"where": "~"}},
    "a network's file": {"policy": {"class_path": "ppo_lightning.ActorCritic", "init_args": {"logdir": "elsewhere"}}},
}


@pytest.mark.parametrize("name", PLACES)
def test_a_checkpoint_may_not_name_files_and_folders(name, plain, fit, tmp_path):
    (key,) = PLACES[name]
    Path("bad.ckpt").write_bytes(saved({**plain, "hyper_parameters": {**plain["hyper_parameters"], **PLACES[name]}}))
    before = set(tmp_path.rglob("*"))
    for words in (["validate"], ["fit", "--model.total_steps=128"]):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--ckpt_path", "bad.ckpt", *FLAGS])
        assert str(caught.value.code).startswith(f"error: the checkpoint's {key} is ")
    assert f"the checkpoint's {key} is" in refused(by_loading, Path("bad.ckpt"), fit)
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_may_be_given_again(plain):
    recorder = {**RECORDER, "init_args": {"video_folder": "theirs", "disable_logger": True}}
    named = {**plain["hyper_parameters"], "wrappers": [recorder], "env_kwargs": {"render_mode": "rgb_array"}}
    Path("named.ckpt").write_bytes(saved({**plain, "hyper_parameters": named}))
    Path("again.yaml").write_text("model: {wrappers: []}")
    main(["validate", "--config", "again.yaml", "--ckpt_path", "named.ckpt", *FLAGS])
    assert PPO.load_from_checkpoint("named.ckpt", wrappers=()).hparams["env_kwargs"] == {"render_mode": "rgb_array"}
    assert not Path("theirs").exists()


@pytest.mark.parametrize("place", ["hparams", "module_arguments", "dotted"])
def test_hyperparameters_have_one_place(place, plain, fit, tmp_path):
    evil = {"env": "evil.make"}
    bad = {**plain, place: evil}
    if place == "dotted":
        bad = {**plain, "hyper_parameters": {**plain["hyper_parameters"], "policy.class_path": "evil.Network"}}
    Path("bad.ckpt").write_bytes(saved(bad))
    for way in (by_fit, by_loading, by_command):
        refused(way, Path("bad.ckpt"), fit)
    assert nothing_ran(tmp_path)


def test_what_a_checkpoint_may_not_name_can_be_given_again(plain, monkeypatch):
    named = {**plain["hyper_parameters"], "env": "evil.make", "gamma": 0.5}
    Path("named.ckpt").write_bytes(saved({**plain, "hyper_parameters": named}))
    assert PPO.load_from_checkpoint("named.ckpt", env="CartPole-v1").gamma == 0.5
    words = ["fit", "--model.total_steps", "128", "--ckpt_path", "named.ckpt", *FLAGS]
    main([*words, "--model.env", "CartPole-v1"])
    Path("again.yaml").write_text("model: {env: evil.make, total_steps: 192}")
    main([*words, "--config", "again.yaml"])
    hyperparameters = torch.load("lightning_logs/version_1/checkpoints/last.ckpt")["hyper_parameters"]
    assert (hyperparameters["env"], hyperparameters["gamma"]) == ("evil.make", 0.5)


@pytest.mark.parametrize(
    "bad", [[], {"state_dict": 1}, {"ppo_lightning": {}}, {"hyper_parameters": [1]}, {"state_dict": {}}]
)
def test_other_contents_are_refused(bad, fit):
    Path("bad.ckpt").write_bytes(saved(bad))
    for way in (by_fit, by_loading, by_command):
        assert "is not a checkpoint of ppo_lightning" in refused(way, Path("bad.ckpt"), fit)


def test_hyperparameters_of_another_version_are_refused(plain, fit):
    for other in ({"momentum": 0.9}, {"gamma": "high"}):
        bad = {**plain, "hyper_parameters": {**plain["hyper_parameters"], **other}}
        Path("bad.ckpt").write_bytes(saved(bad))
        (name,) = other
        assert name in refused(by_command, Path("bad.ckpt"), fit)
    assert "gamma" in refused(by_loading, Path("bad.ckpt"), fit)


@pytest.mark.parametrize(
    "config", sorted(path.stem for path in CONFIGS.glob("*.yaml")) if CONFIGS.exists() else ["none"]
)
def test_checkpoints_of_our_configs_name_what_a_checkpoint_may(config):
    from ppo_lightning.runs.hyperparameters import disallowed_names

    model = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]
    of_tests = {"env"} if model["env"].startswith("tests.") else set()
    assert disallowed_names(model).keys() == of_tests


# --- names -------------------------------------------------------------------------------------------------------------


IDS = ["../../x", "/tmp/../x", "a/../../b", "..:..", "~/x", "$HOME/x", "C:\\x", "odd/Cart..Pole-v0"]


@pytest.mark.parametrize("name", IDS)
def test_no_environment_is_named_such_that_files_leave_the_folder(name, tmp_path, monkeypatch):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(gym.registry, "odd/Cart..Pole-v0", gym.registry["CartPole-v1"])
    before = {path for path in tmp_path.rglob("*") if inner not in path.parents}
    if name in gym.registry:
        main(["fit", "--model.env", name, "--model.total_steps", "64", *FLAGS])
        assert Path("lightning_logs/version_0/checkpoints/last.ckpt").exists()
    else:
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--model.env", name, "--model.total_steps", "64", *FLAGS])
        assert str(caught.value).startswith("error: ")
    assert {path for path in tmp_path.rglob("*") if inner not in path.parents} == before


@pytest.mark.parametrize("folder", ["theirs", "ours"])
def test_paths_in_a_checkpoint_write_and_delete_nothing_elsewhere(folder, tmp_path, plain):
    """Lightning deletes what was the best file before, wherever it was, so long as it begins with the run's folder."""
    root = tmp_path / "root"
    run = root / "checkpoints"
    elsewhere = tmp_path / "elsewhere"
    run.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("data")
    target = f"{run}/../../elsewhere/precious"
    paths = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), target)
    bad = plain
    for name in ("BestCheckpoint", "LastCheckpoint"):
        state = {**plain["callbacks"][name], **paths, "dirpath": str(run if folder == "ours" else elsewhere)}
        state |= {"best_k_models": {target: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
        bad = changed(bad, "callbacks", name, value=state)
    Path("bad.ckpt").write_bytes(saved(bad))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=root, **quiet)
    model = PPO("CartPole-v1", total_steps=128, eval_interval=1, **SMALL)
    trainer.fit(model, ckpt_path="bad.ckpt")
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    assert {path.name for path in run.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert all(value.startswith(str(run)) or not value for value in paths_of(run / "last.ckpt"))


def paths_of(path):
    states = read_checkpoint(path)["callbacks"].values()
    savers = [state for state in states if "best_model_path" in state]
    assert len(savers) == 2
    return [state[key] for state in savers for key in ("best_model_path", "kth_best_model_path", "last_model_path")]


# --- configs -----------------------------------------------------------------------------------------------------------

NEVER = {
    "a tag of Python's in YAML": "model: {env: !!python/object/apply:os.system ['touch called']}",
    "a function that makes no network": "model: {env: CartPole-v1, policy: os.system}",
    "a class that is no optimiser": (
        "model: {env: CartPole-v1, optimizer: {class_path: subprocess.Popen, init_args: {args: [touch, called]}}}"
    ),
    "a shell's words": "model: {env: '$(touch called)', env_kwargs: {render_mode: '`touch called`'}}",
}


@pytest.mark.parametrize("name", NEVER)
def test_a_config_calls_what_it_names_and_nothing_else(name, tmp_path):
    Path("bad.yaml").write_text(NEVER[name])
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "bad.yaml", *FLAGS])
    assert caught.value.code not in (0, None)
    assert nothing_ran(tmp_path)


@pytest.mark.parametrize(("env", "called"), [("evil:CartPole-v1", False), ("evil.make", True)])
def test_a_config_is_code(env, called, tmp_path):
    """It imports the module and calls the function that it names as the environment, as the README says."""
    main(["fit", "--model.env", env, "--model.total_steps", "64", *FLAGS])
    assert (tmp_path / "executed").exists()
    assert (tmp_path / "called").exists() == called
