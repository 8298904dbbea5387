"""What the documents say is there, and what they show runs."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from ppo_lightning import PPO
from ppo_lightning.cli import main

ROOT = Path(__file__).parent.parent
README, POLICIES = (ROOT / "README.md").read_text(), (ROOT / "docs/policies.md").read_text()
SPEED = (ROOT / "docs/speed.md").read_text()
RUNS, DISTRIBUTED = (ROOT / "docs/runs.md").read_text(), (ROOT / "docs/distributed.md").read_text()
STEERING = (ROOT / "docs/steering.md").read_text()
REPORT = (ROOT / "docs/report.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()
DOCUMENTS = {path.stem: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES = ("loggers", "by_hand", "profiling", "checkpoints", "tuning", "pendulum")
FEW = (
    "--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false --model.num_eval_episodes 1 "
)
FEW += "--model.num_steps 64 --model.num_minibatches 4"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENTS[page], re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [words[3:] for line in lines if (words := shlex.split(line, comments=True))[:3] == FIT]


FIT = ["python", "-m", "ppo_lightning"]
WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture
def _at_home(monkeypatch):
    """Nothing leaves this folder, and what a page leaves open is closed."""
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)  # which the logger sets
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    budget = re.compile(r"total_steps=(\d+)_000\b")
    code = budget.sub(lambda match: f"total_steps={int(match[1]) * 10}", "".join(blocks(page, "python")))
    code = code.replace("num_minibatches=64", "num_minibatches=4")
    exec(compile(code, f"docs/{page}.md", "exec"), {"__name__": page})


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_the_commands_of_a_page_train(page, words):
    main([*words, *FEW.split()])
    assert len(list(Path().rglob("checkpoints/last.ckpt"))) == 1


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("page", ["loggers", "checkpoints"])
def test_the_yaml_of_a_page_trains(page, tmp_path):
    (text,) = blocks(page, "yaml")
    Path("page.yaml").write_text(text.replace("sqlite:///mlflow.db", f"file:{tmp_path}/mlruns"))
    main(["fit", "--config", "configs/cartpole.yaml", "--config", "page.yaml", *FEW.split()])
    assert len(list(Path().rglob("checkpoints/last.ckpt"))) == 1


def test_every_test_that_the_documents_name_exists():
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", "".join(DOCUMENTS.values()))
    assert len(names) > 30
    for file, name in names:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), name


def test_every_place_in_the_code_that_the_readme_names_exists():
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)", README):
        if not file.startswith("test_"):
            assert re.search(rf"(class|def) {name}\b", (ROOT / "ppo_lightning" / file).read_text()), name


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_links_lead_somewhere(text):
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists() or (ROOT / "docs" / link).exists(), link


def test_the_example_network_is_short_and_trains(fit):
    code = next(block for block in re.findall(r"```python\n(.*?)```", POLICIES, re.DOTALL) if "MyNetwork" in block)
    body = code.split("class MyNetwork")[1].split("model =")[0]
    assert len(body.strip().splitlines()) <= 15
    space: dict = {}
    exec(code.replace("policy=MyNetwork)", "policy=MyNetwork, num_envs=2, num_steps=32, total_steps=128)"), space)
    model = space["model"]
    fit(model)
    assert int(model.iterations) == 2
    action = model.predict(np.zeros(3, np.float32))
    assert model.action_space.contains(action)


def test_every_option_of_the_network_is_in_the_documents():
    import inspect

    from ppo_lightning import ActorCritic

    options = list(inspect.signature(ActorCritic.__init__).parameters)[3:]
    known = POLICIES + README
    for option in options:
        assert option in known or option in ("activation", "layer_norm", "log_std_init"), option


@pytest.mark.parametrize("compile", [False, True])
def test_the_example_of_an_environment_that_is_tensors_learns(fit, compile):
    space: dict = {}
    exec(re.findall(r"```python\n(.*?)```", SPEED, re.DOTALL)[0], space)
    model = PPO(space["Walk"], num_envs=32, num_steps=32, total_steps=20_000, compile=compile, num_eval_episodes=4)
    fit(model)
    assert model.evaluate(4)["eval/mean_reward"] == 1.0


def test_every_metric_is_in_the_documents(fit):
    """And none is there that nobody logs."""
    from lightning import Callback
    from probes import ActionMustMatch

    class Sees(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.update(trainer.callback_metrics)

        def on_validation_end(self, trainer, *_):
            logged.update(trainer.callback_metrics)

    logged: set = set()
    options = {"num_envs": 2, "num_steps": 16, "total_steps": 256, "target_kl": 0.1, "clip_range_vf": 0.2}
    for env in (ActionMustMatch, "MountainCarContinuous-v0"):
        model = PPO(env, **options, num_eval_episodes=1, eval_interval=4)
        fit(model, callbacks=[Sees()], limit_val_batches=1)
    table = METRICS.split("## What environments say")[0]
    named = set(re.findall(r"`((?:rollout|train|time|eval)/\w+)`", table))
    rare = {"train/skipped_steps", "time/env_restarts", "rollout/fail_rate", "rollout/failures", "eval/fail_rate"}
    assert logged - {"step"} == named - rare


def test_the_example_of_events_runs(fit):
    (code,) = re.findall(r"```python\n(.*?)```", METRICS, re.DOTALL)
    space: dict = {}
    exec(code, space)
    fit(PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=64), callbacks=[space["watch"]])
