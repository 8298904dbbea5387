"""The benchmarks run, and print what their driver reads."""

import contextlib
import importlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from processes import forked

from ppo_lightning.cli import main

ROOT = Path(__file__).parent.parent / "benchmarks"


def run(*words: str) -> dict:
    command = [sys.executable, str(ROOT / words[0]), *words[1:], "--warm-up", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_forked(*words: str) -> dict:
    """The same in a process that is forked, which has imported everything."""

    def script(_: int) -> str:
        sys.argv = [*words, "--warm-up", "1"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return said.getvalue()

    (said,) = forked(script, world_size=1)
    assert isinstance(said, str), said
    assert "Traceback" not in said, said
    return json.loads(said.strip().splitlines()[-1])


@pytest.mark.parametrize("flags", ["--eager", "--eager --plain", "--eager --bare", "--eager --parts"])
def test_ours_counts_the_steps_that_it_times(flags):
    result = (run if "--parts" in flags else run_forked)(
        "ours.py", "--workload", "w1", "--steps", "2000", *flags.split()
    )
    assert result["steps"] == 2048
    assert 0 < result["seconds"] < 60
    assert result["peak_rss_mb"] > 50
    if "--plain" not in flags:
        assert ({"HealthMonitor", "RunSummary"} <= set(result["callbacks"])) == ("--bare" not in flags)
    if "--parts" in flags:
        parts = result["parts_s"]
        assert set(parts) == {"environment", "policy", "advantage", "update", "logging", "Lightning and the rest"}
        assert min(parts.values()) > 0
        assert sum(parts.values()) == pytest.approx(result["seconds"], abs=1e-2)


@pytest.mark.parametrize("workload", sorted(path.stem for path in ROOT.glob("w*.yaml")))
def test_fit_takes_every_workload(workload, tmp_path):
    main(
        f"fit --config {ROOT / workload}.yaml --trainer.max_epochs 1 --trainer.default_root_dir {tmp_path} "
        "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.limit_val_batches 0 "
        "--trainer.enable_model_summary false "
        "--model.num_steps 8 --model.num_envs 4 --model.compile false --model.num_minibatches 4".split()
    )
    assert (tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt").exists()


def test_a_peer_that_cannot_do_a_workload_says_so_and_the_table_names_it(tmp_path):
    command = [sys.executable, str(ROOT / "peers" / "rejax.py"), "--workload", "w4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "gymnax" in json.loads(done.stdout.strip().splitlines()[-1])["unsupported"]
    sys.path.insert(0, str(ROOT.parent))
    from benchmarks.run import table

    timed = {"steps": 100, "seconds": 2.0, "first_s": 1.0, "peak_rss_mb": 5.0, "versions": {"torch": "2"}}
    runs = {"ppo_lightning": [timed], "skrl": [{**timed, "seconds": 4.0}], "cleanrl": [{**timed, "seconds": 8.0}]}
    text = table({"w1": {"runs": runs, "missing": {"rejax": "no"}, "parts_s": {"update": 2.0}, "threads": 1}})
    assert "| skrl | 25 | 25 – 25 | 2.00 | 1.0 | 5 |" in text
    assert "Over the best of skrl (skrl): **2.00**." in text
    assert "- rejax: no" in text


def test_a_trial_into_a_folder_of_its_own_leaves_the_documents_alone(monkeypatch, tmp_path):
    sys.path.insert(0, str(ROOT.parent))
    from benchmarks import run as driver

    timed = {"steps": 100, "seconds": 2.0, "first_s": 1.0, "peak_rss_mb": 5.0, "versions": {"torch": "2"}}
    measured = {"runs": {"ppo_lightning": [timed]}, "missing": {}, "parts_s": {}, "threads": 1}
    monkeypatch.setattr(driver, "measure", lambda *_: measured)
    monkeypatch.setattr(sys, "argv", ["run.py", "--workloads", "w1", "--out", str(tmp_path / "trial")])
    before = (ROOT / "README.md").read_bytes()
    driver.main()
    assert (ROOT / "README.md").read_bytes() == before
    assert json.loads((tmp_path / "trial/results.json").read_text()) == {"w1": measured}


def test_the_guard_measures_ours_and_the_plain_loop_and_names_what_is_slower(monkeypatch):
    monkeypatch.syspath_prepend(ROOT.parent)
    quick = importlib.import_module("benchmarks.quick")
    assert quick.rate("peers/cleanrl.py", "w1", 1024) > 0
    rates = {"ours.py": 300.0, "peers/cleanrl.py": 100.0}
    monkeypatch.setattr(quick, "rate", lambda script, workload, steps: rates[script])
    ratios = quick.measure(2)
    assert ratios == dict.fromkeys(["w1", "w1t", "w2", "w4"], 3.0)
    assert quick.slower(ratios, {"w1": 3.0, "w1t": 3.3, "w2": 3.4, "w4": 2.0}) == [
        "w2: 3.00 times the plain loop, 88% of the recorded 3.40"
    ]
