"""What is logged of the machine."""

import os
import sys
import time

import psutil
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor
from test_ppo import Memory

from ppo_lightning import PPO
from ppo_lightning.callbacks import HardwareMonitor
from ppo_lightning.cli import main
from ppo_lightning.errors import InputError
from ppo_lightning.tools.hardware import Hardware

SMALL = {"num_envs": 4, "num_steps": 32, "total_steps": 5 * 128, "update_epochs": 1, "num_minibatches": 2}
CPU = {"hardware/cpu_percent", "hardware/ram_percent", "hardware/process_ram_mb"}


def test_each_iteration_logs_its_use_at_its_environment_step(fit):
    logger = Memory()
    trainer = fit(PPO("CartPole-v1", **SMALL), logger=logger, callbacks=[HardwareMonitor(interval_s=0)])
    rows = [(step, row) for step, row in logger.rows if CPU & row.keys()]
    assert [step for step, _ in rows] == [128, 256, 384, 512, 640]
    for _, row in rows:
        assert row.keys() == CPU
        assert 0 <= row["hardware/cpu_percent"] <= 100
        assert 0 < row["hardware/ram_percent"] < 100
        assert 1 < row["hardware/process_ram_mb"] < psutil.virtual_memory().total / 1e6
    assert {name: trainer.callback_metrics[name].item() for name in CPU} == rows[-1][1]
    assert trainer.callback_metrics["hardware/cpu_percent"].dtype == torch.float64


def test_numbers_are_those_of_the_machine():
    hardware = Hardware(torch.device("cpu"), interval_s=0)
    measured = hardware.read()
    assert measured["hardware/process_ram_mb"] == pytest.approx(
        psutil.Process(os.getpid()).memory_info().rss / 1e6, rel=0.2
    )
    assert measured["hardware/ram_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=10)
    busy = time.monotonic() + 0.3
    while time.monotonic() < busy:
        pass
    assert hardware.read()["hardware/cpu_percent"] > 0.5 * 100 / psutil.cpu_count()


def test_short_iterations_share_a_measurement_and_log_it_once(fit):
    logger = Memory()
    fit(PPO("CartPole-v1", **SMALL), logger=logger, callbacks=[HardwareMonitor(interval_s=3600)])
    assert not any(CPU & row.keys() for _, row in logger.rows)
    hardware = Hardware(torch.device("cpu"), interval_s=3600)
    assert hardware.read() == {}
    hardware.interval_s = 0
    measured = hardware.read()
    hardware.interval_s = 3600
    assert measured.keys() == CPU
    assert hardware.read() is measured


def test_reading_waits_for_nothing():
    hardware = Hardware(torch.device("cpu"), interval_s=0)
    began = time.process_time()
    for _ in range(200):
        hardware.read()
    assert (time.process_time() - began) / 200 < 1e-3
    held = Hardware(torch.device("cpu"))
    began = time.process_time()
    for _ in range(10_000):
        held.read()
    assert (time.process_time() - began) / 10_000 < 2e-5


def test_a_gpu_has_its_memory_and_where_the_driver_tells_its_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 37)
    hardware = Hardware(torch.device("cuda", 0), interval_s=0)
    measured = hardware.read()
    assert measured["hardware/gpu_memory_mb"] == 50_000
    assert measured["hardware/gpu_percent"] == 37.0

    def forbidden(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(torch.cuda, "utilization", forbidden)
    for one in (hardware, Hardware(torch.device("cuda", 0), interval_s=0)):  # which may also cease to tell
        with pytest.warns(UserWarning, match="gpu_percent is not measured: ModuleNotFoundError: nvidia-ml-py does not"):
            measured = one.read()
        assert "hardware/gpu_percent" not in measured
        assert measured["hardware/gpu_memory_mb"] == 50_000
        assert one.read().keys() == measured.keys()  # and says so once


def test_lightnings_own_monitor_logs_at_environment_steps(fit):
    logger = Memory()
    fit(PPO("CartPole-v1", **SMALL), logger=logger, callbacks=[DeviceStatsMonitor()])
    steps = [step for step, row in logger.rows if "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in row]
    assert steps == [128, 256, 384, 512, 640]


def test_without_psutil_a_sentence_says_what_to_install(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(InputError, match=r'pip install "ppo-lightning\[hardware\]"'):
        fit(PPO("CartPole-v1", **SMALL), callbacks=[HardwareMonitor()])


def test_a_negative_interval_is_refused():
    with pytest.raises(InputError, match="interval_s must be 0 or more seconds, got -1"):
        HardwareMonitor(interval_s=-1)


def test_the_command_line_logs_it():
    main(
        [
            "fit", "--model.env", "CartPole-v1", "--model.num_envs", "4", "--model.num_steps", "32",
            "--model.total_steps", "256", "--model.num_eval_episodes", "2", "--trainer.accelerator", "cpu",
            "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.callbacks+=ppo_lightning.callbacks.HardwareMonitor", "--trainer.callbacks.interval_s", "0",
        ]
    )  # fmt: skip
    with open("lightning_logs/version_0/metrics.csv") as file:
        names = file.readline().strip().split(",")
    assert set(names) >= CPU
