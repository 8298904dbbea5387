"""Model repositories: what ``push`` writes, ``from_pretrained`` loads, from a folder and from a server on this machine."""

import base64
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from probes import Recall
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.__main__ import run
from ppo_lightning.cli import main
from ppo_lightning.tools import hub

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 64, "num_minibatches": 2}
FLAGS = [f"--model.{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a run of the command line, in its folder, and not of this process, whose seed would win over the checkpoint's."""
    words = ["--model.env=CartPole-v1", "--model.normalize_reward=true", "--seed_everything=3", *FLAGS]
    main(["fit", *words, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"])
    monkeypatch.delenv("PL_GLOBAL_SEED")
    return tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"


def test_a_policy_from_a_folder_returns_what_the_card_says(checkpoint, tmp_path, capsys):
    folder = tmp_path / "out/policy"
    run(["push", "me/cartpole", str(checkpoint), "--local-folder", str(folder), "--episodes", "5"])
    assert str(folder) in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.yaml", "model.safetensors", "learning_curve.png", "replay.mp4")
    }
    own, model = PPO.load_from_checkpoint(checkpoint), PPO.from_pretrained(folder)
    for name, value in own.state_dict().items():
        assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    assert (model.seed, model.num_env_steps) == (3, 64)
    found = [one.evaluate(num_episodes=5, deterministic=True)["eval/mean_reward"] for one in (own, model)]
    assert found[0] == found[1]
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    (result,) = card["model-index"][0]["results"]
    assert result["dataset"]["type"] == "CartPole-v1"
    assert result["metrics"][0]["value"].startswith(f"{found[0]:.2f} +/- ")
    assert "64 environment steps with seed 3" in (folder / "README.md").read_text()


def test_a_folder_is_loaded_without_the_library_of_the_hub(checkpoint, tmp_path, monkeypatch):
    hub.save_folder(checkpoint, tmp_path / "policy", "me/it", episodes=1, video=False)
    find = hub.importlib.util.find_spec
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))
    assert PPO.from_pretrained(tmp_path / "policy").num_env_steps == 64
    with pytest.raises(InputError, match="huggingface_hub is not installed"):
        PPO.from_pretrained("me/it")


def test_no_file_is_a_pickle(checkpoint, tmp_path):
    hub.save_folder(checkpoint, tmp_path / "policy", "me/it", episodes=1, video=False)
    for path in (tmp_path / "policy").iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", bytes([pickle.PROTO[0]]))), path


def test_the_config_trains_the_same_model_again(checkpoint, tmp_path):
    hub.save_folder(checkpoint, tmp_path / "policy", "me/it", episodes=1, video=False)
    again = main(
        ["fit", f"--config={tmp_path}/policy/config.yaml", "--seed_everything=3", "--trainer.logger=false"]
    ).model
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in again.state_dict().items():
        assert_close(value, weights[name], rtol=0, atol=0)


def test_layers_in_common_are_kept_once_under_each_name(tmp_path, monkeypatch):
    policy = ["--model.policy.init_args.rnn=lstm", "--model.policy.init_args.shared=true"]
    main(
        [
            "fit",
            "--model.env=CartPole-v1",
            *policy,
            *FLAGS,
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu",
        ]
    )
    hub.save_folder(next(tmp_path.rglob("last.ckpt")), tmp_path / "policy", "me/it", episodes=1, video=False)
    model = PPO.from_pretrained(tmp_path / "policy", gamma=0.5)
    assert model.policy.network.actor_trunk is model.policy.network.critic_trunk
    assert (model.policy.state_size, model.gamma) == (128, 0.5)


def test_of_a_model_made_in_python_what_no_file_holds_is_given_again(fit, tmp_path):
    fit(PPO(Recall, policy=partial(ActorCritic, hidden_sizes=(8,)), **SMALL)).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(InputError, match="pass env=… again"):
        hub.save_folder(tmp_path / "run.ckpt", tmp_path / "policy", "me/it")
    assert not (tmp_path / "policy").exists()


# --- a server on this machine ------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Keeps the files of one commit as the Hub does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Requests(http.server.BaseHTTPRequestHandler):
    """What of the Hub's interface a commit and a download call."""

    server: Server
    SHA = "a" * 40

    def answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body, path = self.rfile.read(length), self.path.partition("?")[0]
        if self.server.refuses:
            self.reply(403, b"{}")
        elif path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply_json({"url": f"{self.server.url}/me/cartpole", "name": "me/cartpole"})
        elif "/preupload/" in path:
            kept = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.reply_json({"files": kept})
        elif "/commit/" in path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.server.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            self.reply_json(
                {"success": True, "commitOid": self.SHA, "commitUrl": f"{self.server.url}/me/cartpole/commit/a"}
            )
        elif "/resolve/" in path:
            data = self.server.files.get(path.rpartition("/")[2])
            headers = {"ETag": f'"{abs(hash(data))}"', "X-Repo-Commit": self.SHA}
            self.reply(200 if data is not None else 404, data or b"", headers)
        elif "/tree/" in path:
            self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "b" * 40}
                    for name, data in self.server.files.items()
                ]
            )
        elif "/revision/" in path or path == "/api/models/me/cartpole":
            siblings = [{"rfilename": name} for name in self.server.files]
            self.reply_json(
                {
                    "id": "me/cartpole",
                    "sha": self.SHA,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                }
            )
        else:
            self.reply_json({})

    do_GET = do_POST = do_HEAD = answer  # noqa: N815 - names of http.server

    def reply_json(self, contents: object) -> None:
        self.reply(200, json.dumps(contents).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Not to the tests' output."""


@pytest.fixture
def server():
    one = Server()
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    yield one
    one.shutdown()
    thread.join()
    one.server_close()


def elsewhere(
    server: Server, folder: Path, *words: str, token: str | None = "hf_x"
) -> subprocess.CompletedProcess[str]:
    """Run Python with the server in place of the Hub."""
    places = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | places
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False, timeout=200
    )


LOAD = """
from ppo_lightning import PPO
model = PPO.from_pretrained("me/cartpole")
print(model.seed, model.num_env_steps)
"""


def test_push_and_download(checkpoint, server, tmp_path):
    words = ["-m", "ppo_lightning", "push", "me/cartpole", str(checkpoint), "--episodes=1", "--no-video", "--private"]
    done = elsewhere(server, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert f"{server.url}/me/cartpole" in done.stdout
    assert server.created[0]["name"] == "cartpole"
    assert set(server.files) == {"README.md", "config.yaml", "model.safetensors", "learning_curve.png"}
    loaded = elsewhere(server, tmp_path, "-c", LOAD)
    assert loaded.stdout.split() == ["3", "64"], loaded.stderr
    refused = elsewhere(server, tmp_path, *words, token=None)
    assert refused.returncode == 1
    assert "HF_TOKEN" in refused.stderr.strip().splitlines()[-1]
    server.refuses = True
    for command in (words, ["-c", LOAD.replace("cartpole", "other")]):
        failed = elsewhere(server, tmp_path, *command)
        assert failed.returncode == 1
        assert "could not be " in failed.stderr.strip().splitlines()[-1], failed.stderr


# --- bad input ---------------------------------------------------------------------------------------------------------


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run(["push", *map(str, words)])
    said = capsys.readouterr().err or str(ended.value.code)
    assert "\n" not in said.strip()
    return said


def test_bad_input_is_one_sentence_and_leaves_no_file(checkpoint, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "policy"
    for name in ("cartpole", "a/b/c", "me/car pole", ""):
        assert "is no name of a repository: give user/name" in refused(
            [name, checkpoint, "--local-folder", folder], capsys
        )
    assert "there is no checkpoint" in refused(["me/it", tmp_path / "no.ckpt", "--local-folder", folder], capsys)
    assert "num_episodes" in refused(["me/it", checkpoint, "--episodes", 0, "--local-folder", folder], capsys)
    assert not folder.exists()
    folder.mkdir()
    (folder / "kept").touch()
    assert "holds something" in refused(["me/it", checkpoint, "--local-folder", folder], capsys)
    assert [path.name for path in folder.iterdir()] == ["kept"]
    with pytest.raises(InputError, match=r"holds no policy of ppo_lightning .* config\.yaml"):
        PPO.from_pretrained(folder)
    with pytest.raises(InputError, match="neither a folder here nor a repository's name"):
        PPO.from_pretrained("not a folder")
    (folder / "config.yaml").write_text("model: {env: CartPole-v1}")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="holds no policy of ppo_lightning"):
        PPO.from_pretrained(folder)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "ppo-lightning[hub]"' in refused(
        ["me/it", checkpoint, "--local-folder", tmp_path / "x"], capsys
    )


def test_a_config_from_elsewhere_may_not_name_what_no_checkpoint_may(checkpoint, tmp_path):
    folder = tmp_path / "policy"
    hub.save_folder(checkpoint, folder, "me/it", episodes=1, video=False)
    contents = yaml.safe_load((folder / "config.yaml").read_text())
    contents["model"]["policy"] = {"class_path": "os.system", "init_args": {"command": "true"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(contents))
    with pytest.raises(InputError, match=r"'os\.system', which no checkpoint may choose"):
        PPO.from_pretrained(folder)
