"""``ppo-lightning enjoy``: a window where there is a display, else a video."""

import re
from functools import partial

import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from probes import ConstantReward

from ppo_lightning import PPO
from ppo_lightning.__main__ import run
from ppo_lightning.tools import video

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 64, "num_minibatches": 2}


@pytest.fixture
def checkpoint(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 20)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    fit(PPO("CartPole-v1", **SMALL)).save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def returns(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"^episode \d+: return (\S+) in \d+ steps$", printed, re.MULTILINE)]


def test_without_a_display_a_video_is_written_and_returns_are_those_of_evaluate(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    run(["enjoy", str(checkpoint), "--episodes", "3"])
    printed = capsys.readouterr().out
    assert f"video  {checkpoint.with_suffix('.mp4')}" in printed
    assert checkpoint.with_suffix(".mp4").stat().st_size > 0
    model = PPO.load_from_checkpoint(checkpoint, num_envs=1)
    found = model.evaluate(num_episodes=3, deterministic=True)
    assert np.mean(returns(printed)) == pytest.approx(found["eval/mean_reward"], abs=0.01)


def test_a_video_that_is_there_is_kept_unless_it_is_to_be_replaced(checkpoint):
    video = checkpoint.with_suffix(".mp4")
    video.write_text("another")
    with pytest.raises(SystemExit, match=r"run\.mp4 exists: give another name, or force"):
        run(["enjoy", str(checkpoint)])
    assert video.read_text() == "another"
    run(["enjoy", str(checkpoint), "--force"])
    assert video.stat().st_size > 100


def test_with_a_display_a_window_is_opened_and_no_file_is_written(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    before = sorted(checkpoint.parent.iterdir())
    run(["enjoy", str(checkpoint), "--episodes", "2"])
    assert len(returns(capsys.readouterr().out)) == 2
    assert sorted(checkpoint.parent.iterdir()) == before
    run(["enjoy", str(checkpoint), "--out", str(checkpoint.parent / "chosen.mp4"), "--stochastic"])
    assert (checkpoint.parent / "chosen.mp4").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0"], "--episodes must be 1 or more"),
        (["--out", "film.gif"], "give a name that ends in .mp4"),
        (["--episode", "2"], "--episodes"),
    ],
)
def test_bad_input_is_one_sentence(words, message, checkpoint, capsys):
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        run(["enjoy", str(checkpoint), *words])
    said = capsys.readouterr().err or str(ended.value.code)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(checkpoint.parent.iterdir()) == before


def test_an_environment_that_renders_nothing_is_named(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "choose_renderer", lambda: None)
    model = PPO(partial(TimeLimit, ConstantReward(), 5), **SMALL)
    for mode, what in (("rgb_array", "renders no images"), ("human", "renders in no window")):
        with pytest.raises(ValueError, match=what):
            video.rendering_environment(model, mode, lambda env: env)
