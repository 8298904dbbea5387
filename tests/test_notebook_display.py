"""What a notebook shows of a run."""

import base64
import importlib.util
import re
from types import SimpleNamespace

import IPython.display
import lightning
import pytest
from rich.console import Console

from ppo_lightning import PPO
from ppo_lightning.callbacks import AsyncEvaluation, NotebookDisplay
from ppo_lightning.errors import InputError
from ppo_lightning.runs.history import Records
from ppo_lightning.tools import notebook
from ppo_lightning.tools.charts import RETURN, draw, to_png
from ppo_lightning.tools.dashboard import UPDATE, metric_rows
from ppo_lightning.tools.notebook import learning_curves, page
from ppo_lightning.tools.page import number

pytestmark = pytest.mark.paints

SMALL = {"num_envs": 4, "num_steps": 32, "update_epochs": 1, "num_minibatches": 2, "num_eval_episodes": 2}
PNG = b"\x89PNG"


@pytest.fixture
def shown(monkeypatch):
    """Pretend that this is a notebook; what it shows, one page after another."""
    pages: list[str] = []

    def display(first, display_id):
        assert display_id is True
        return SimpleNamespace(update=lambda html: pages.append(html.data))

    monkeypatch.setattr(notebook, "Console", lambda: Console(force_jupyter=True))
    monkeypatch.setattr(IPython.display, "display", display)
    return pages


@pytest.fixture
def curves(monkeypatch):
    """What was drawn, one picture after another."""
    drawn: list[list] = []

    def record(records):
        drawn.append(learning_curves(records))
        return drawn[-1]

    monkeypatch.setattr(notebook, "learning_curves", record)
    return drawn


def train(fit, shown, total_steps=8 * 128, **kwargs):
    display = NotebookDisplay()
    model = PPO("CartPole-v1", total_steps=total_steps, eval_interval=4, **SMALL)
    return model, fit(model, callbacks=[display], limit_val_batches=1, **kwargs), display


def test_the_last_page_has_the_last_numbers_and_a_picture(fit, shown, curves):
    _, trainer, _ = train(fit, shown)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    last = shown[-1]
    assert "CartPole-v1: 1,024 of 1,024 steps" in last
    for label, name in {
        "return": "rollout/ep_rew_mean",
        "eval return": "eval/mean_reward",
        "loss": "train/loss",
    }.items():
        assert re.search(rf">{label}</td><td [^>]*>{re.escape(number(metrics[name]))}", last), label
    assert base64.b64decode(re.search('base64,([^"]+)', last)[1]).startswith(PNG)
    trained, evaluated = curves[-1]
    assert trained.steps == [128 * count for count in range(1, 9)]
    assert evaluated.steps == [512, 1024]
    assert trained.values[-1] == metrics["rollout/ep_rew_mean"]
    assert evaluated.values[-1] == metrics["eval/mean_reward"]
    assert evaluated.high[-1] - evaluated.values[-1] == pytest.approx(metrics["eval/std_reward"])
    assert evaluated.values[-1] - evaluated.low[-1] == pytest.approx(metrics["eval/std_reward"])


def test_pages_come_every_few_seconds_and_at_the_end(fit, shown, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(notebook.time, "perf_counter", lambda: clock[0])

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_):
            clock[0] += 1.0

    model = PPO("CartPole-v1", total_steps=8 * 128, **SMALL)
    fit(model, callbacks=[Clock(), NotebookDisplay()])
    counts = [int(re.search(r"([\d,]+) of 1,024 steps", page)[1].replace(",", "")) for page in shown]
    assert counts == [128, 4 * 128, 7 * 128, 8 * 128]


def test_a_picture_that_takes_long_is_drawn_less_often(fit, shown, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(notebook.time, "perf_counter", lambda: clock[0])

    def slow(*_):
        clock[0] += 1.0
        return b""

    monkeypatch.setattr(notebook, "to_png", slow)
    display = NotebookDisplay()
    fit(PPO("CartPole-v1", total_steps=128, **SMALL), callbacks=[display])
    assert len(shown) == 2  # the first and the last
    assert display.next_draw == clock[0] + 30.0


def test_the_curve_continues_with_a_resumed_run_and_restarts_with_another(fit, shown, curves):
    model, _, display = train(fit, shown)
    model.total_steps = 10 * 128
    fit(model, callbacks=[display])
    assert curves[-1][0].steps == [128 * count for count in range(1, 11)]
    fit(PPO("CartPole-v1", total_steps=128, **SMALL), callbacks=[display])
    assert [curve.steps for curve in curves[-1]] == [[128]]


def test_evaluations_in_another_process_are_in_the_curve(fit, shown, curves):
    model = PPO("CartPole-v1", total_steps=256, **SMALL)
    fit(model, callbacks=[NotebookDisplay(), AsyncEvaluation(every=2)])
    model.total_steps = 384
    fit(model, callbacks=[NotebookDisplay()])
    assert curves[-1][1].steps == [256]


def test_an_error_leaves_a_last_page(fit, shown):
    class Fails(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.policy_version == 3:
                raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError):
        fit(PPO("CartPole-v1", total_steps=1024, **SMALL), callbacks=[NotebookDisplay(), Fails()])
    assert "384 of 1,024 steps" in shown[-1]


def test_outside_of_notebooks_nothing_is_shown(fit, capsys):
    display = NotebookDisplay()
    fit(PPO("CartPole-v1", total_steps=256, **SMALL), callbacks=[display])
    assert capsys.readouterr().out == ""


def test_without_matplotlib_a_sentence_says_what_to_install(fit, shown, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(notebook, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(InputError, match=r'pip install "ppo-lightning\[plot\]"'):
        fit(PPO("CartPole-v1", total_steps=256, **SMALL), callbacks=[NotebookDisplay()])


def test_names_are_text_and_values_have_the_colour_of_their_health():
    made = page({"<b>": metric_rows({"train/approx_kl": 0.2, "train/clip_fraction": 0.2}, UPDATE)}, b"")
    assert "&lt;b&gt;" in made
    assert re.search(r"approx_kl</td><td [^>]*#cf222e[^>]*>0.2 !▲</td>", made)
    assert re.search(r"clip_fraction</td><td [^>]*#1a7f37[^>]*>0.2</td>", made)


def test_a_curve_without_points_is_drawn_too():
    assert to_png(draw(RETURN, learning_curves(Records())), 110).startswith(PNG)


@pytest.mark.long
def test_a_real_notebook_shows_one_page_and_the_plain_bar(tmp_path):
    """In a kernel: the dashboard is the bar there, and updates replace the page instead of adding to it."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    code = f"""
import lightning
from ppo_lightning import PPO
from ppo_lightning.callbacks import Dashboard, NotebookDisplay
model = PPO("CartPole-v1", total_steps=1024, **{SMALL})
callbacks = [Dashboard(), NotebookDisplay()]
lightning.Trainer(accelerator="cpu", logger=False, enable_model_summary=False, callbacks=callbacks).fit(model)
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(
        book, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = book.cells[0].outputs
    (made,) = [one["data"]["text/html"] for one in outputs if "text/html" in one.get("data", {})]
    assert "1,024 of 1,024 steps" in made
    text = "".join(one.get("text", "") for one in outputs)
    assert "PPO: 100%" in text
    assert "╭" not in text
