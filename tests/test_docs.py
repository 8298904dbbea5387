"""What the documents say is there, and what they show runs."""

import re
from pathlib import Path

import numpy as np
import pytest

from ppo_lightning import PPO

ROOT = Path(__file__).parent.parent
README, POLICIES = (ROOT / "README.md").read_text(), (ROOT / "docs/policies.md").read_text()
SPEED = (ROOT / "docs/speed.md").read_text()
RUNS, DISTRIBUTED = (ROOT / "docs/runs.md").read_text(), (ROOT / "docs/distributed.md").read_text()
METRICS = (ROOT / "docs/metrics.md").read_text()
DOCUMENTS = {path.stem: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


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
