"""The progress bar, and what is printed beside it."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator

import lightning
import pytest
from lightning import Callback
from lightning.pytorch.utilities import rank_zero_info

from ppo_lightning import PPO
from ppo_lightning.callbacks import StepProgressBar

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 160, "num_minibatches": 2}


class Stream(io.StringIO):
    """One of two standard streams of the same screen."""

    def __init__(self, screen: list[str]) -> None:
        super().__init__()
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.append(text)
        return len(text)


@contextlib.contextmanager
def screen() -> Iterator[list[str]]:
    """What both standard streams write within, in its order, Lightning's log included."""
    written: list[str] = []
    out, err = Stream(written), Stream(written)
    logger, handler = logging.getLogger("lightning.pytorch"), logging.StreamHandler(err)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield written
        assert (sys.stdout, sys.stderr, handler.stream) == (out, err, err)
    logger.removeHandler(handler)


class Talks(Callback):
    """Writes a message in every way."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.policy_version == 2:
            rank_zero_info("MESSAGE: logged")
            print("MESSAGE: printed")
            print("MESSAGE: printed", file=sys.stderr)
            pl_module.print("MESSAGE: printed by the module")


class Fails(Callback):
    """Ends the run by an exception."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.policy_version == 3:
            raise RuntimeError("broken")


def visible(written: list[str]) -> list[str]:
    """Lines as a terminal shows them: a carriage return begins a line again, and spaces delete what they cover."""
    lines = []
    for line in "".join(written).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def train(model, *callbacks):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model)


def test_messages_start_on_a_line_of_their_own_while_the_bar_is_shown(monkeypatch):
    monkeypatch.setattr(StepProgressBar, "INTERVAL_S", 0.0)
    with screen() as written:
        train(PPO("CartPole-v1", **SMALL), Talks())
        print("afterwards")
    lines = visible(written)
    assert [line for line in lines if "MESSAGE" in line] == [
        "MESSAGE: logged", "MESSAGE: printed", "MESSAGE: printed", "MESSAGE: printed by the module"
    ]  # fmt: skip
    assert lines[-3].startswith("PPO: 100%")
    assert lines[-2] == "afterwards"


def test_what_follows_a_failed_run_starts_on_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr(StepProgressBar, "INTERVAL_S", 0.0)
    with screen() as written:
        with pytest.raises(RuntimeError, match="broken"):
            train(PPO("CartPole-v1", **SMALL), Fails())
        print("error: broken", file=sys.stderr)
    assert "error: broken" in visible(written)


def test_lightning_advertises_nothing_in_python():
    with screen() as written:
        trainer = lightning.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(PPO("CartPole-v1", **SMALL, num_eval_episodes=1))
        rank_zero_info("a message of the run")
    assert "Tip" not in "".join(written)
    assert "a message of the run" in "".join(written)
