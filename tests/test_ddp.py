"""Two processes on loopback, by the command that users type."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from processes import fit as train
from processes import forked, free_port
from torch.testing import assert_close

from ppo_lightning import PPO
from ppo_lightning.cli import main

ROOT = Path(__file__).parent.parent
COMMAND = [
    sys.executable, "-m", "ppo_lightning", "fit", "--model.env", "CartPole-v1", "--model.num_envs", "4",
    "--model.num_steps", "32", "--model.total_steps", "2000", "--trainer.accelerator", "cpu",
    "--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.enable_progress_bar", "false",
    "--trainer.callbacks+=dump.Dump", "--seed_everything", "3", "--model.num_eval_episodes", "5",
    "--name", "version",
]  # fmt: skip


def environment() -> dict[str, str]:
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    known = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return {**known, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def fit(folder: Path, *flags: str) -> tuple[list[dict], np.ndarray]:
    """What both ranks ended with, and metrics.csv."""
    done = subprocess.run(
        [*COMMAND, *flags], cwd=folder, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return results(folder)


def fit_forked(folder: Path, *flags: str) -> tuple[list[dict], np.ndarray]:
    """The same by processes that are forked, for which nothing needs to be imported again."""

    def run(rank: int) -> str:
        os.chdir(folder)
        os.environ.pop("PL_GLOBAL_SEED")
        main([*COMMAND[3:], *flags])
        return "trained"

    assert forked(run) == ["trained", "trained"]
    return results(folder)


def results(folder: Path) -> tuple[list[dict], np.ndarray]:
    ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in (0, 1)]
    table = folder / "lightning_logs/version_0/metrics.csv"
    return ranks, np.genfromtxt(table, delimiter=",", names=True, deletechars="")


NORMALIZED = ["--model.normalize_observation=true", "--model.normalize_reward=true"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("plain"), *NORMALIZED)


def test_both_ranks_hold_equal_parameters_moments_and_counters(plain):
    (first, second), _ = plain
    assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert_close(first["optimizer"], second["optimizer"], rtol=0, atol=0)
    assert repr(first["window"]) == repr(second["window"])


def test_ranks_collect_different_episodes(plain):
    (first, second), _ = plain
    rows = torch.cat([first["first_observation"], second["first_observation"]])
    assert len(rows.unique(dim=0)) == 8


def test_steps_moments_and_schedules_count_all_ranks(plain):
    """2 ranks × 4 environments × 32 steps = 256 per iteration: 8 iterations make 2,048 ≥ 2,000."""
    (first, _), rows = plain
    iterations = rows[~np.isnan(rows["time/iterations"])]
    assert iterations["step"].tolist() == [256.0 * i for i in range(1, 9)]
    assert int(first["state_dict"]["policy.moments.count"]) == 2048
    assert int(first["state_dict"]["reward_normalizer.moments.count"]) == 2048
    assert iterations["train/learning_rate"] == pytest.approx([3e-4 * (1 - 256 * i / 2000) for i in range(8)])
    assert (iterations["time/fps"][2:] > 0).all()


def test_the_window_holds_the_episodes_of_both_ranks_once(plain):
    """The lengths in it sum to no more than all steps, and to more than one rank's."""
    (first, _), _ = plain
    lengths = [length for _, length, *_ in first["window"]]
    assert len(lengths) == 100 or 1024 < sum(lengths) <= 2048
    assert sum(lengths) <= 2048


def test_evaluation_shares_its_episodes_among_ranks(plain):
    (first, second), rows = plain
    assert first["evaluated"] == second["evaluated"]
    assert first["evaluated"]["eval/mean_reward"] * 5 == pytest.approx(
        round(first["evaluated"]["eval/mean_reward"] * 5)
    )
    assert np.isfinite(rows["eval/mean_reward"]).sum() == 8


def test_fewer_episodes_than_ranks_and_spawned_processes(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    main([*COMMAND[3:], "--model.num_eval_episodes=1", "--trainer.strategy=ddp_spawn"])
    (first, second), _ = results(tmp_path)
    assert first["evaluated"] == second["evaluated"]
    assert first["evaluated"]["eval/std_reward"] == 0
    assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    # Spawned processes share tensors, unless each makes its own: counters would count the steps of both twice.
    assert first["state_dict"]["env_steps"] == 256 * first["state_dict"]["iterations"]
    assert first["state_dict"]["iterations"] == 8


def test_a_rank_whose_own_divergence_would_stop_it_hangs_no_other_rank(tmp_path):
    """The decision is made on the mean over ranks, so both take the same number of steps."""
    (first, second), _ = fit_forked(tmp_path, "--model.target_kl=0.002", "--model.optimizer.lr=0.003")
    assert first["updates"] == second["updates"]
    assert min(first["updates"]) < 16
    assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)


def test_compiled_steps_reduce_gradients_and_agree_on_when_to_stop(tmp_path):
    """The flat gradient is averaged with the divergence on it; what comes out is what eager processes learn."""
    flags = ["--model.target_kl", "0.0005", "--model.optimizer.lr", "0.001"]
    (tmp_path / "eager").mkdir()
    (tmp_path / "compiled").mkdir()
    (eager, _), _ = fit_forked(tmp_path / "eager", *flags)
    (first, second), table = fit_forked(tmp_path / "compiled", *flags, "--model.compile", "true")
    assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert_close(first["state_dict"], eager["state_dict"], rtol=1e-5, atol=1e-5)
    updates = np.nanmax(table["train/n_updates"])
    assert updates < 4 * np.isfinite(table["train/n_updates"]).sum()  # or the stop was not tested


@pytest.mark.parametrize("compile", ["true", "false"])
def test_ranks_recompute_advantages_alike(compile, tmp_path):
    """In each epoch by the moments of both ranks' new advantages: without them the run is another."""
    flags = ["--model.normalize_advantage=all_ranks", "--model.optimizer.lr=0.003", f"--model.compile={compile}"]
    parameters = []
    for recomputed in ("true", "false"):
        (tmp_path / recomputed).mkdir()
        (first, second), _ = fit_forked(tmp_path / recomputed, *flags, f"--model.recompute_advantages={recomputed}")
        assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
        parameters.append(first["state_dict"]["policy.network.value_head.weight"])
    assert not torch.equal(*parameters)


# --- beyond one machine ------------------------------------------------------------------------------------------------

NODES = [*COMMAND[1:], *NORMALIZED, "--trainer.devices=1", "--trainer.num_nodes=2"]


def assert_same_run(folder: Path, plain) -> None:
    """Both ranks of a run in ``folder`` ended bit for bit where those of two devices did."""
    (first, second), _ = plain
    for rank, expected in enumerate((first, second)):
        ended = torch.load(folder / f"rank_{rank}.pt")
        for key in ("state_dict", "optimizer", "updates", "first_observation", "evaluated"):
            assert_close(ended[key], expected[key], rtol=0, atol=0)
        assert repr(ended["window"]) == repr(expected["window"])


def test_two_nodes_of_torchrun_are_the_run_of_two_devices(plain, tmp_path):
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port), *NODES,
            ],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    told = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert_same_run(tmp_path, plain)


def test_the_documents_job_of_kubeflow_trains_on_two_nodes(tmp_path):
    """What its runtime does: the job's command on each node, with torchrun's options in variables."""
    text = (Path(__file__).parent.parent / "docs/recipes/kubeflow.md").read_text()
    job = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["spec"]["trainer"]
    few = "--trainer.max_epochs=1 --trainer.accelerator=cpu --model.num_steps=64 --model.num_minibatches=2 --model.num_envs=2"
    few += f" --model.compile=false --model.num_eval_episodes=1 --trainer.default_root_dir={tmp_path} --name=job"
    rendezvous = {"PET_NNODES": str(job["numNodes"]), "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    rendezvous["PET_MASTER_PORT"] = str(free_port())
    assert job["command"][0] == "torchrun"
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *job["command"][1:], *job["args"], *few.split()],
            env={**environment(), **rendezvous, "PET_NODE_RANK": str(node)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(job["numNodes"])
    ]  # fmt: skip
    told = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    checkpoint = torch.load(tmp_path / "lightning_logs/job_0/checkpoints/last.ckpt", weights_only=True)
    assert int(checkpoint["state_dict"]["env_steps"]) == 2 * 2 * 64


def test_two_tasks_of_slurm_are_the_run_of_two_devices(plain, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED")
    env = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_PROCID": "{rank}",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "{rank}", "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "ppo",
    }  # fmt: skip
    assert forked(lambda rank: "trained" if main(NODES[2:]) else "", env=env) == ["trained", "trained"]
    assert_same_run(tmp_path, plain)


# --- notebooks ---------------------------------------------------------------------------------------------------------


def test_fitting_twice_with_ddp_notebook_continues_counting():
    """Processes are forked for each fit: what they learnt and counted comes back with the weights."""
    model = PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=10_000, normalize_observation=True)
    counted = []
    for _ in range(2):
        train(model, strategy="ddp_notebook", devices=2, max_epochs=3)
        counted.append((model.num_env_steps, model.policy_version, int(model.n_updates)))
        assert int(model.policy.moments.count) == model.num_env_steps
    assert counted == [(192, 3, 12), (384, 6, 24)]
