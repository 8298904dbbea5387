"""The dashboard: what it shows, in any width; what it costs; how it leaves the terminal."""

import io
import logging
import math
import pickle
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.cells import cell_len
from rich.console import Console

from ppo_lightning import PPO
from ppo_lightning.callbacks import Dashboard, HardwareMonitor, StepProgressBar
from ppo_lightning.cli import main
from ppo_lightning.runs.history import Records
from ppo_lightning.tools import dashboard
from ppo_lightning.tools.dashboard import (
    HEALTHY,
    MAX_USER_METRICS,
    Frame,
    metric_rows,
    number,
    phase_rows,
    render,
    user_rows,
)

SMALL = {"num_envs": 4, "num_steps": 32, "update_epochs": 1, "num_minibatches": 2}
DOCUMENT = (Path(__file__).parent.parent / "docs/dashboard.md").read_text()

METRICS = {
    "rollout/ep_rew_mean": 312.42,
    "rollout/ep_len_mean": 298.0,
    "eval/mean_reward": 500.0,
    "eval/std_reward": 12.5,
    "eval/mean_ep_length": 499.0,
    "train/approx_kl": 0.0123,
    "train/clip_fraction": 0.0812,
    "train/explained_variance": 0.2114,
    "train/entropy_loss": -0.5213,
    "train/policy_gradient_loss": -0.00213,
    "train/value_loss": 31.22,
    "train/loss": 15.31,
    "train/grad_norm": 0.4431,
    "train/learning_rate": 1.1e-4,
    "time/fps": 13412.2,
    "reward/forward": 1.25,
    "reward/control": -0.031,
}
SHOWN = {
    "return": "312.4",
    "length": "298",
    "eval return": "500",
    "eval std": "12.5",
    "eval length": "499",
    "approx_kl": "0.0123",
    "clip_fraction": "0.0812",
    "explained_variance": "0.2114",
    "entropy_loss": "-0.5213",
    "policy_gradient_loss": "-0.00213",
    "value_loss": "31.22",
    "loss": "15.31",
    "grad_norm": "0.4431",
    "learning_rate": "0.00011",
    "reward/forward": "1.25",
    "reward/control": "-0.031",
}
FINDING = {
    "name": "critic_not_learning",
    "value": 0.2114,
    "healthy": "above 0.7",
    "since_step": 12288,
    "until_step": None,
    "advice": "give the critic more room (--model.policy.init_args.hidden_sizes [256,256]) or weight (--model.vf_coef)",
}
FRAME = Frame(
    name="CartPole-v1",
    status="training",
    env_steps=62_464,
    total_steps=100_000,
    iteration=61,
    elapsed=8.2,
    remaining=3725.3,
    phases={"collect": 5.0, "update": 4.0, "evaluate": 0.6, "other": 0.4},
    metrics=METRICS,
    returns=[20.0, 22.0, 31.0, 48.0, 40.0, 90.0, 180.0, 170.0, 260.0, 312.42],
    hardware={
        "hardware/cpu_percent": 52.3,
        "hardware/ram_percent": 41.0,
        "hardware/process_ram_mb": 1812.3,
        "hardware/gpu_percent": 37.0,
        "hardware/gpu_memory_mb": 20480.0,
    },
    findings=[FINDING],
)


def drawn(frame: Frame, width: int) -> str:
    """As text, on a console that is wide enough to show what is too wide."""
    console = Console(width=300, file=io.StringIO(), color_system=None)
    console.print(render(frame, width))
    return console.file.getvalue()


def test_a_curve_rises_where_the_values_rise():
    assert dashboard.curve_line(range(8), 19) == "return 0 ▁▂▃▄▅▆▇█ 7"
    assert dashboard.curve_line([0.0, 1.0, 0.0], 14) == "return 0 ▁█▁ 1"


@pytest.mark.parametrize(
    ("values", "line"),
    [([1.0], ""), ([], ""), ([math.nan, 1.0], ""), ([3.0, 3.0], "return 3 ▁▁▁▁ 3"), ([1e9, math.nan, 2e9], "")],
)
def test_curves_of_few_or_equal_values_or_without_room(values, line):
    assert dashboard.curve_line(values, 15) == line


@pytest.mark.parametrize("width", [80, 60, 40])
def test_each_number_stands_beside_its_name(width):
    picture = drawn(FRAME, width)
    for name, value in SHOWN.items():
        assert re.search(rf"[│ ]{name} +{re.escape(value)} ", picture), name
    words = " ".join(re.sub("[│\n]", " ", picture).split())
    assert "PPO CartPole-v1" in words
    assert " 62 %" in words
    for fact in (
        "training",
        "62,464 of 100,000 steps",
        "iteration 61",
        "13,412 steps/s",
        "0:00:08 elapsed",
        "1:02:05 left",
    ):
        assert fact in words, fact
    for phase, share in {"collect": "50 %", "update": "40 %", "evaluate": "6 %", "other": "4 %"}.items():
        assert re.search(rf"{phase} +{share}", picture), phase
    for fact in ("CPU 52 %", "RAM 41 %", "process 1,812 MB", "GPU 37 %", "VRAM 20,480 MB"):
        assert fact in words, fact
    assert "! critic_not_learning since step 12,288: give the critic more room (--model.policy" in words


@pytest.mark.parametrize("width", [200, 80, 76, 75, 60, 40, 30])
def test_no_line_is_wider_than_the_terminal(width):
    long = {f"environment/a_very_long_name_of_a_metric_{index}": -1.234567e-30 for index in range(50)}
    odd = {"奖励/平衡的奖励平衡的奖励平衡的奖励平衡的奖励": 1.0, "[bold]unclosed": float("nan")}
    finding = {**FINDING, "advice": "x" * 500}
    picture = drawn(
        Frame(
            "e" * 300,
            "training",
            10**12,
            10**13,
            10**7,
            1e7,
            1e8,
            FRAME.phases,
            {**METRICS, **long, **odd},
            FRAME.hardware,
            [finding] * 9,
            [-1e30, 1e30],
        ),
        width,
    )
    assert {cell_len(line) for line in picture.splitlines()} == {width}


def test_a_usual_picture_fits_80_columns_and_24_lines():
    usual = {name: value for name, value in METRICS.items() if not name.startswith("reward/")}
    picture = drawn(
        Frame("CartPole-v1", "training", 1, 2, 3, 4.0, 5.0, FRAME.phases, usual, FRAME.hardware, [], [0, 1]), 80
    )
    assert len(picture.splitlines()) < 24  # one is the cursor's
    assert "✔ health: no alert" in picture


def test_without_a_monitor_nothing_is_reported_about_health():
    assert "health:" not in drawn(Frame("CartPole-v1", "training", 1, 2, 3, 4.0), 80)


def test_findings_that_are_over_are_left_out_and_those_beyond_three_counted():
    over = {**FINDING, "until_step": 20_000}
    picture = drawn(Frame("CartPole-v1", "training", 1, 2, 3, 4.0, findings=[over, over]), 80)
    assert "✔ health: no alert" in picture
    picture = drawn(Frame("CartPole-v1", "training", 1, 2, 3, 4.0, findings=[over, *[FINDING] * 5]), 80)
    assert picture.count("! critic_not_learning") == 3
    assert "and 2 more" in picture


def test_metrics_that_users_log_are_shown_as_they_are_named_and_counted_beyond_thirty():
    own = {f"mine/[{index:02}]": float(index) for index in range(MAX_USER_METRICS + 4)}
    picture = drawn(Frame("CartPole-v1", "training", 1, 2, 3, 4.0, metrics={**own, "step": 7.0}), 80)
    assert all(f"mine/[{index:02}] " in picture for index in range(MAX_USER_METRICS))
    assert f"mine/[{MAX_USER_METRICS}]" not in picture
    assert "and 4 more" in picture
    details = {"obs_raw/min": 0.0, "obs_raw_mean/angle": 0.0, "health/alerts": 1.0, "popart/mu": 0.0}
    assert user_rows({**METRICS, **details, "step": 7.0}) == user_rows(
        {"reward/control": -0.031, "reward/forward": 1.25}
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (312.42, "312.4"),
        (-0.00213, "-0.00213"),
        (1.234e-5, "1.2e-05"),
        (12345.6, "12,346"),
        (-1.234e6, "-1.23e+06"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_take_nine_characters_at_most(value, text):
    assert number(value) == text
    assert len(text) <= 9


@pytest.mark.parametrize(
    ("name", "value", "style", "mark"),
    [
        ("approx_kl", 0.02, "green", ""),
        ("approx_kl", 0.04, "yellow", "▲"),
        ("approx_kl", 0.06, "bold red", "!▲"),
        ("approx_kl", 0.001, "yellow", "▼"),
        ("explained_variance", 0.8, "green", ""),
        ("explained_variance", 0.5, "yellow", "▼"),
        ("explained_variance", -2.0, "bold red", "!▼"),
        ("clip_fraction", float("nan"), "bold red", "!"),
        ("value_loss", float("inf"), "bold red", "!"),
        ("value_loss", 1e9, "", ""),
    ],
)
def test_a_value_is_marked_outside_of_its_range_and_beyond_its_alert(name, value, style, mark):
    (row,) = metric_rows({f"train/{name}": value}, {f"train/{name}": name})
    assert (row.style, row.mark) == (style, mark)
    assert row.note == str(HEALTHY.get(f"train/{name}", ""))


def test_shares_of_the_time_add_up():
    assert [row.value for row in phase_rows({"collect": 1.0, "update": 2.0, "other": 1.0})] == ["25 %", "50 %", "25 %"]
    assert phase_rows({"collect": 0.0}) == []


# --- in a terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Give the dashboard a terminal of 80 columns; what was written to it is read by :func:`screen`."""
    monkeypatch.setattr(
        dashboard, "Console", lambda: Console(force_terminal=True, width=80, height=50, color_system=None)
    )
    return capsys


def screen(written: str) -> str:
    """What a terminal shows after that was written to it."""
    lines, y, x = [""], 0, 0
    for code, command, end, text in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)", written):
        if command == "A":
            y -= int(code or 1)
        elif command == "K":
            lines[y] = ""
        elif end == "\r":
            x = 0
        elif end == "\n":
            y, x = y + 1, 0
            lines += [""] * (y + 1 - len(lines))
        else:
            lines[y] = lines[y][:x].ljust(x) + text + lines[y][x + len(text) :]
            x += len(text)
    return "\n".join(lines)


class Talks(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        match pl_module.policy_version:
            case 3:
                print("printed by a callback")
            case 4:
                print("an error", file=sys.stderr)
            case 5:
                rank_zero_info("logged by Lightning")
            case 6:
                logging.getLogger("lightning.pytorch").warning("a warning of Lightning")
            case 7:
                pl_module.print("said by the model")

    def on_train_end(self, trainer, pl_module):
        pl_module.print("said at the end")


def train(*callbacks, **kwargs) -> PPO:
    settings = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    torch.manual_seed(0)
    trainer = lightning.Trainer(callbacks=list(callbacks), **{**settings, "limit_val_batches": 0, **kwargs})
    model = PPO("CartPole-v1", total_steps=8 * 128, **SMALL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(model)
    return model


def test_what_is_printed_stands_above_the_last_picture(terminal, monkeypatch):
    handler = next(
        one for one in logging.getLogger("lightning.pytorch").handlers if isinstance(one, logging.StreamHandler)
    )
    monkeypatch.setattr(handler, "stream", sys.stderr)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    monkeypatch.setattr(Dashboard, "INTERVAL_S", 0.0)
    monkeypatch.setattr(Dashboard, "SHARE", 1e9)  # after every iteration
    streams = sys.stdout, sys.stderr
    train(Dashboard(), Talks())
    assert sys.stdout is streams[0]
    assert sys.stderr is streams[1]
    assert handler.stream is sys.stderr
    written = terminal.readouterr().out
    shown = screen(written)
    before, _, picture = shown.partition("╭─ PPO CartPole-v1")
    for line in (
        "printed by a callback",
        "an error",
        "logged by Lightning",
        "a warning of Lightning",
        "said by the model",
    ):
        assert line in before.splitlines(), line
    assert picture.rstrip().splitlines()[-2:] == ["╰" + 78 * "─" + "╯", "said at the end"]
    assert shown.count("╭") == shown.count("╰") == 1
    assert "finished · 1,024 of 1,024 steps · iteration 8" in picture
    assert " left" not in picture
    assert written.count("╭") >= 8
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "PPO:" not in shown, "nor is there a bar"


def test_errors_that_go_to_a_file_still_go_there(terminal):
    train(Talks(), Dashboard())
    captured = terminal.readouterr()
    assert "an error" in captured.err
    assert "an error" not in captured.out


@pytest.mark.parametrize("error", [ZeroDivisionError("planted"), KeyboardInterrupt()])
def test_errors_and_interrupts_leave_the_terminal_as_it_was(terminal, error):
    class Fails(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.policy_version == 3:
                raise error

    streams, bar = (sys.stdout, sys.stderr), Dashboard()
    with pytest.raises((ZeroDivisionError, SystemExit)):
        train(Fails(), bar)
    assert sys.stdout is streams[0]
    assert sys.stderr is streams[1]
    written = terminal.readouterr().out
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert "stopped · 384 of 1,024 steps · iteration 3" in screen(written)
    bar._trainer = None
    assert pickle.loads(pickle.dumps(bar)).live is None, "it can be sent to another process"


def test_errors_without_a_terminal_leave_the_streams_as_they_were():
    class Fails(lightning.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError("planted")

    streams = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError):
        train(Fails(), Dashboard())
    assert sys.stdout is streams[0]
    assert sys.stderr is streams[1]


def test_numbers_of_a_run_are_those_that_are_logged(terminal):
    class Own(PPO):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("mine/version", float(self.policy_version))
            super().on_train_batch_end(outputs, batch, batch_idx)

    class Monitor(lightning.Callback):
        findings = (FINDING,)

    settings = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    monitor = HardwareMonitor(interval_s=0)
    trainer = lightning.Trainer(callbacks=[Dashboard(), monitor, Monitor()], **settings)
    trainer.fit(Own("CartPole-v1", total_steps=8 * 128, num_eval_episodes=2, eval_interval=4, **SMALL))
    shown = screen(terminal.readouterr().out)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for label, name in {
        "return": "rollout/ep_rew_mean",
        "eval return": "eval/mean_reward",
        "approx_kl": "train/approx_kl",
    }.items():
        assert re.search(rf"[│ ]{label} +{re.escape(number(metrics[name]))} ", shown), label
    assert re.search(r"mine/version +8 ", shown)
    assert f"{metrics['time/fps']:,.0f} steps/s" in shown
    assert "process " in shown
    assert "! critic_not_learning since step 12,288" in shown
    assert all(re.search(rf"{phase} +\d+ %", shown) for phase in ("collect", "update", "evaluate", "other"))


def test_without_psutil_only_the_hardware_is_missing(terminal, monkeypatch):
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    train(Dashboard())
    shown = screen(terminal.readouterr().out)
    assert "finished · 1,024 of 1,024 steps" in shown
    assert "CPU" not in shown


def test_training_is_the_same_bit_for_bit_with_and_without(terminal):
    first, second = (
        train(*callbacks).state_dict() for callbacks in ([Dashboard(), HardwareMonitor()], [StepProgressBar()])
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_line_takes_it_in_the_place_of_the_bar(terminal):
    main(
        [
            "fit", "--model.env", "CartPole-v1", "--model.num_envs", "4", "--model.num_steps", "32",
            "--model.total_steps", "512", "--model.num_eval_episodes", "2", "--trainer.accelerator", "cpu",
            "--trainer.enable_model_summary", "false", "--trainer.callbacks+=ppo_lightning.callbacks.Dashboard",
        ]
    )  # fmt: skip
    shown = screen(terminal.readouterr().out)
    assert "finished · 512 of 512 steps · iteration 4" in shown
    assert shown.index("╰") < shown.index("trained 512 environment steps")
    assert "PPO:" not in shown


# --- where there is none ----------------------------------------------------------------------------------------------


def test_without_a_terminal_it_is_the_plain_bar(capsys):
    train(Dashboard())
    shown = capsys.readouterr().out
    assert "PPO: 100%" in shown
    assert "1.02k/1.02k" in shown
    assert "╭" not in shown


@pytest.mark.parametrize(
    ("change", "redraws"),
    [
        ({}, True),
        ({"force_terminal": False}, False),
        ({"_environ": {"TERM": "dumb"}}, False),
        ({"force_jupyter": True}, False),
        ({"file": io.TextIOWrapper(io.BytesIO(), "ascii")}, False),
    ],
)
def test_only_terminals_that_can_redraw_get_pictures(change, redraws):
    given = {
        "force_terminal": True,
        "file": io.TextIOWrapper(io.BytesIO(), "utf-8"),
        "_environ": {},
        "force_jupyter": False,
    }
    assert dashboard.can_redraw(Console(**{**given, **change})) == redraws


def test_only_the_first_process_draws(terminal):
    bar = Dashboard()
    bar.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    assert bar.is_disabled


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_pictures_take_a_hundredth_of_the_time_and_come_four_times_a_second_at_most(monkeypatch):
    clock, drawn_at, cost = [0.0], [], [0.0]

    class Screen:
        def refresh(self):
            drawn_at.append(clock[0])
            clock[0] += cost[0]

    monkeypatch.setattr(dashboard.time, "perf_counter", lambda: clock[0])
    bar = Dashboard()
    bar.live, model = Screen(), SimpleNamespace(records=Records(), num_env_steps=0)
    monkeypatch.setattr(bar, "frame", lambda status: FRAME)
    for cost[0], apart in [(0.0, 0.25), (0.001, 0.25), (0.01, 1.0)]:
        drawn_at.clear()
        for _ in range(5000):
            clock[0] += 0.001
            bar.on_train_batch_end(None, model, None, None, 0)
        assert min(later - sooner for sooner, later in pairwise(drawn_at)) >= apart
        assert len(drawn_at) >= 4
        assert cost[0] * len(drawn_at) <= 0.01 * 5 + cost[0]


def test_between_pictures_an_iteration_costs_microseconds(monkeypatch):
    import timeit

    bar = Dashboard()
    bar.live, bar.next_draw = object(), float("inf")
    model = SimpleNamespace(records=Records(), num_env_steps=0)

    def iteration():
        bar.on_train_epoch_start(None)
        bar.on_train_batch_start(None, None, None, 0)
        bar.on_train_batch_end(None, model, None, None, 0)

    assert min(timeit.repeat(iteration, number=100, repeat=20)) / 100 < 5e-5


def test_the_picture_in_the_document_is_what_is_drawn():
    assert drawn(FRAME, 80).strip() in DOCUMENT
    assert drawn(FRAME, 40).strip() in DOCUMENT
