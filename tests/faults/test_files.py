"""Checkpoint files survive full disks, kill -9 and flipped bits, and the newest good one is found."""

import io
import multiprocessing
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning
import processes
import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ppo_lightning import PPO
from ppo_lightning.callbacks import BestCheckpoint, LastCheckpoint, PPOCallback, checkpoints
from ppo_lightning.cli import main
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.runs.checkpoint import VerifiedCheckpointIO, newest_checkpoint, read_checkpoint

SMALL = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 1, "num_eval_episodes": 1}


def steps_in(path):
    return int(read_checkpoint(path)["state_dict"]["env_steps"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run with three checkpoints."""
    root = tmp_path_factory.mktemp("run")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=root, **quiet)
    trainer.fit(PPO("CartPole-v1", total_steps=3 * 128, eval_interval=1, **SMALL))
    return root / "checkpoints"


def test_a_checkpoint_is_an_ordinary_file_of_torch(run):
    contents = torch.load(run / "last.ckpt", weights_only=True)
    assert contents["state_dict"]["env_steps"] == 3 * 128
    assert torch.load(run / "last.ckpt", weights_only=True, mmap=True).keys() == contents.keys()
    assert zipfile.ZipFile(run / "last.ckpt").testzip() is None


def test_the_file_before_the_last_is_kept(run):
    assert {path.name for path in run.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert [steps_in(run / name) for name in ("previous.ckpt", "last.ckpt")] == [2 * 128, 3 * 128]


def damages(size):
    """Ways in which a file of ``size`` bytes is damaged: 20 truncations, 20 flipped bits, and others."""
    draw = random.Random(0)
    cuts = [0, 1, size - 1, *(draw.randrange(size) for _ in range(17))]
    bits = [0, 8 * size - 1, *(draw.randrange(8 * size) for _ in range(18))]
    yield from ((f"cut at {cut}", lambda data, cut=cut: data[:cut]) for cut in cuts)
    for bit in bits:
        yield f"bit {bit}", lambda data, bit=bit: flipped(data, bit)
    yield "more bytes", lambda data: data + b"\0"
    yield "text", lambda data: b"hello"


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def is_read(path, contents):
    """Whether a file is read; it then has these contents to the bit (a flip of padding changes none)."""
    try:
        found = read_checkpoint(path)
    except InputError:
        return False
    assert saved(found) == saved(contents)
    return True


def saved(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def test_any_damage_is_refused_in_one_way_and_the_previous_file_taken(run, tmp_path):
    for name in ("previous.ckpt", "last.ckpt"):
        os.link(run / name, tmp_path / name)
    last, whole = tmp_path / "last.ckpt", (run / "last.ckpt").read_bytes()
    contents, refused = read_checkpoint(last), 0
    for name, damage in damages(len(whole)):
        last.unlink()
        last.write_bytes(damage(whole))
        if is_read(last, contents):
            assert name == "more bytes" or name.startswith("bit")
            continue
        with pytest.raises(InputError, match=r"last\.ckpt is no checkpoint that can be read .*use an older checkpoint"):
            PPO.load_from_checkpoint(last)
        with pytest.warns(UserWarning, match=r"last passes over a file: .*last\.ckpt"):
            assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt", name
        refused += 1
    assert refused >= 37


def test_a_flipped_bit_in_any_record_is_refused_and_no_other_changes_the_contents(run, tmp_path):
    path, draw = tmp_path / "last.ckpt", random.Random(2)
    contents, whole = read_checkpoint(run / "last.ckpt"), (run / "last.ckpt").read_bytes()
    with zipfile.ZipFile(run / "last.ckpt") as archive:
        records, directory = archive.infolist(), archive.start_dir
    for record in records:
        lengths = struct.unpack_from("<HH", whole, record.header_offset + 26)  # of the name, and of the padding
        start = record.header_offset + 30 + sum(lengths)
        path.write_bytes(flipped(whole, draw.randrange(8 * start, 8 * (start + record.file_size))))
        assert not is_read(path, contents), record.filename
        path.write_bytes(flipped(whole, draw.randrange(8 * record.header_offset, 8 * start)))
        is_read(path, contents)
    entry = directory
    for record in records:  # one whose entry says that it is a folder would not be read
        entry = whole.index(b"PK\1\2", entry + 1 if record is not records[0] else directory)
        path.write_bytes(flipped(whole, 8 * (entry + 38) + 4))
        assert not is_read(path, contents), record.filename
    for _ in range(100):
        path.write_bytes(flipped(whole, draw.randrange(8 * directory, 8 * len(whole))))
        is_read(path, contents)


@pytest.mark.long
def test_no_flipped_bit_changes_what_is_read_and_truncations_are_refused(run, tmp_path):
    whole, draw = (run / "last.ckpt").read_bytes(), random.Random(1)
    path, contents = tmp_path / "last.ckpt", read_checkpoint(run / "last.ckpt")
    for _ in range(500):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        assert not is_read(path, contents)
        path.write_bytes(flipped(whole, draw.randrange(8 * len(whole))))
        is_read(path, contents)


def test_a_run_resumes_from_the_previous_file_where_the_last_is_damaged(tmp_path):
    words = [
        "fit",
        "--model.env",
        "CartPole-v1",
        "--model.eval_interval",
        "2",
        "--trainer.enable_progress_bar",
        "false",
    ]
    words += [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
    words += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    main([*words, "--model.total_steps", "512"])
    last = tmp_path / "checkpoints/last.ckpt"
    last.write_bytes(flipped(last.read_bytes(), 4000))
    with pytest.warns(UserWarning, match="checksum"):
        main([*words, "--ckpt_path", "last", "--model.total_steps", "640"])
    assert steps_in(last) == 640


def test_an_object_store_gets_the_same_files():
    VerifiedCheckpointIO().save_checkpoint(a_checkpoint(1), "memory://run/last.ckpt")
    assert steps_in("memory://run/last.ckpt") == 1


def test_bytes_are_on_disk_before_they_have_the_files_name(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    kinds = {True: "folder synchronised", False: "file synchronised"}
    monkeypatch.setattr(os, "fsync", lambda number: events.append(kinds[stat.S_ISDIR(os.fstat(number).st_mode)]))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("named"), replace(path, to)))
    VerifiedCheckpointIO().save_checkpoint(a_checkpoint(1), tmp_path / "deep/er/last.ckpt")
    assert events == ["file synchronised", "named", "folder synchronised"]


# --- kill -9 -----------------------------------------------------------------------------------------------------------


def a_checkpoint(number):
    ours = dict.fromkeys(("observation_space", "action_space", "seed", "episodes", "not_saved"))
    weights = torch.full((500_000,), float(number))
    state = {"env_steps": torch.tensor(number), "weights": weights}
    return {"state_dict": state, "hyper_parameters": {}, "ppo_lightning": ours}


def save_for_ever(path):
    number = 1
    while True:
        VerifiedCheckpointIO().save_checkpoint(a_checkpoint(number), path)
        number += 1


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.long)])
def test_a_file_is_whole_however_its_writer_is_killed(times, tmp_path):
    path, draw = tmp_path / "last.ckpt", random.Random(2)
    VerifiedCheckpointIO().save_checkpoint(a_checkpoint(0), path)
    for _ in range(times):
        writer = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        writer.start()
        time.sleep(draw.uniform(0.02, 0.3))
        writer.kill()
        writer.join()
        state = read_checkpoint(path)["state_dict"]
        assert (state["weights"] == float(state["env_steps"])).all()
    VerifiedCheckpointIO().save_checkpoint(a_checkpoint(7), path)
    assert [left.name for left in tmp_path.iterdir()] == ["last.ckpt"]
    assert steps_in(path) == 7


def trains(folder, words):
    """Run a command in a folder; it writes down its steps after each iteration."""
    os.chdir(folder)
    ended, steps = LastCheckpoint.on_train_epoch_end, os.open("steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tells(self, trainer, pl_module):
        ended(self, trainer, pl_module)
        os.write(steps, b"%d\n" % pl_module.num_env_steps)

    LastCheckpoint.on_train_epoch_end = tells
    main(words)


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_killed_run_resumes_and_has_lost_one_save_interval_at_most(times, tmp_path):
    total, interval = 128 * 200, 128 * 5
    words = ["fit", "--model.env", "CartPole-v1", "--model.total_steps", str(total), "--model.eval_interval", "5"]
    words += [word for name, value in SMALL.items() for word in (f"--model.{name}", str(value))]
    words += [
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
        "--trainer.limit_val_batches",
        "0",
    ]
    draw = random.Random(time.time_ns())
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = multiprocessing.get_context("fork").Process(target=trains, args=(folder, words))
        process.start()
        steps = folder / "steps"
        while process.is_alive() and (not steps.exists() or steps.read_bytes().count(b"\n") < 5):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        told = int(steps.read_text().split()[-1])
        assert 0 < told < total
        assert told - steps_in(newest_checkpoint(folder)) <= interval
        os.chdir(folder)
        longer = told + 128 * 10
        main([*words, "--ckpt_path", "last", "--model.total_steps", str(longer)])
        assert steps_in("lightning_logs/version_0/checkpoints/last.ckpt") == longer


# --- full disks --------------------------------------------------------------------------------------------------------


class FillsTheDisk(Callback):
    """No file can grow beyond 20 kB in some iterations."""

    def __init__(self, iterations):
        self.iterations, self.saved = iterations, []

    def on_train_epoch_start(self, trainer, pl_module):
        last = Path(trainer.default_root_dir, "checkpoints/last.ckpt")
        self.saved.append(steps_in(last) // 128 if last.exists() else 0)
        room(20_000 if trainer.current_epoch + 1 in self.iterations else resource.RLIM_INFINITY)

    def on_train_end(self, trainer, pl_module):
        room(resource.RLIM_INFINITY)


def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full_disk_ends():
    """Around a test: pytest writes its result into a file that may be longer than the limit."""
    try:
        yield
    finally:
        room(resource.RLIM_INFINITY)


@full_disk_ends()
def test_a_full_disk_keeps_the_old_files_and_training(tmp_path, fit):
    disk, best = FillsTheDisk({3, 4}), BestCheckpoint()
    model = PPO("CartPole-v1", total_steps=6 * 128, eval_interval=1, **SMALL)
    with pytest.warns(UserWarning, match=r"could not be written after iteration .*File too large.*is kept") as caught:
        fit(model, callbacks=[disk, best, LastCheckpoint()], enable_checkpointing=True, limit_val_batches=1)
    folder = tmp_path / "checkpoints"
    texts = [str(warning.message) for warning in caught if "could not be written" in str(warning.message)]
    assert [text.partition("iteration ")[2][0] for text in texts if "last.ckpt" in text] == ["3", "4"]
    assert disk.saved == [0, 1, 2, 2, 2, 5]
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert [steps_in(folder / name) for name in ("previous.ckpt", "last.ckpt")] == [5 * 128, 6 * 128]


@full_disk_ends()
def test_a_score_that_could_not_be_saved_is_not_the_best(tmp_path, fit, monkeypatch):
    scores = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(PPO, "evaluate", lambda self, **given: {"eval/mean_reward": next(scores)})
    disk, best = FillsTheDisk({2}), BestCheckpoint()
    model = PPO("CartPole-v1", total_steps=3 * 128, eval_interval=1, **SMALL)
    with pytest.warns(UserWarning, match=r"best\.ckpt could not be written after iteration 2"):
        fit(model, callbacks=[disk, best, LastCheckpoint(100)], enable_checkpointing=True, limit_val_batches=1)
    assert best.best_model_score == 2.0
    assert steps_in(tmp_path / "checkpoints/best.ckpt") == 3 * 128


@full_disk_ends()
def test_a_checkpoint_that_was_asked_for_is_not_lost_in_silence(tmp_path, fit):
    trainer = fit(PPO("CartPole-v1", total_steps=128, **SMALL))
    trainer.save_checkpoint("mine.ckpt")
    room(20_000)
    with pytest.raises(OSError, match="File too large"):
        trainer.save_checkpoint("mine.ckpt")
    room(resource.RLIM_INFINITY)
    assert steps_in("mine.ckpt") == 128
    assert [path.name for path in tmp_path.iterdir()] == ["mine.ckpt"]


@full_disk_ends()
@pytest.mark.filterwarnings("ignore:.*could not be written", "ignore:no report was drawn")  # of other files
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_logger_whose_disk_is_full_stops_and_training_continues(tmp_path, fit, kind, monkeypatch, capsys):
    monkeypatch.setattr("ppo_lightning.runs.loggers.FLUSH_INTERVAL_S", 0.0)  # in each iteration
    logger = kind(tmp_path)
    model = PPO("CartPole-v1", total_steps=40 * 128, **SMALL)
    fills = PPOCallback(on_iteration_end=lambda trainer, *_: room(1_000) if trainer.current_epoch == 5 else None)
    with pytest.warns(UserWarning, match=f"{kind.__name__} stops logging, since it cannot write .*File too large"):
        fit(model, logger=logger, callbacks=[fills], log_every_n_steps=1)
    assert model.num_env_steps == 40 * 128
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_is_its_own_context_reaches_the_user():
    """As TensorBoard raises it: the same error again and again, each time within the one before."""
    full, wrapped = OSError("no space left"), ValueError("cannot be logged")
    wrapped.__cause__, full.__context__ = full, wrapped
    with pytest.raises(ValueError, match="cannot be logged"), exit_on_user_error():
        raise wrapped


def test_a_full_disk_of_the_first_process_holds_up_no_other():
    """The processes' clocks decide, too: the first one's is followed by all."""

    def train(rank):
        model = PPO("CartPole-v1", total_steps=6 * 256, eval_interval=1, **SMALL)
        callbacks = [FillsTheDisk({3, 4}), LastCheckpoint(100, minutes=1e-9 if rank == 0 else 1e9)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processes.fit(model, strategy="ddp", devices=2, callbacks=callbacks, enable_checkpointing=True)
        return [str(warning.message) for warning in caught if "could not be written" in str(warning.message)]

    first, second = processes.forked(train)
    assert [text.partition("iteration ")[2][0] for text in first] == ["3", "4"], first
    assert second == []
    assert [steps_in(f"checkpoints/{name}.ckpt") for name in ("previous", "last")] == [5 * 256, 6 * 256]


# --- when --------------------------------------------------------------------------------------------------------------


def test_the_clock_saves_too(tmp_path, fit, monkeypatch):
    clock = iter(range(0, 10**6, 50))  # seconds; asked once as training starts, at each iteration, and at each save
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    callback, look = LastCheckpoint(every_n_epochs=100, minutes=2), FillsTheDisk(())
    fit(PPO("CartPole-v1", total_steps=8 * 128, **SMALL), callbacks=[look, callback], enable_checkpointing=True)
    assert look.saved == [0, 0, 0, 3, 3, 3, 6, 6]
    assert steps_in(tmp_path / "checkpoints/last.ckpt") == 8 * 128


def test_minutes_are_more_than_none():
    with pytest.raises(InputError, match="minutes must be more than 0"):
        LastCheckpoint(minutes=0)


@pytest.mark.long
def test_the_contents_of_checkpoints_have_an_order_that_does_not_depend_on_the_hash_seed(tmp_path):
    """Keys of all dictionaries, and all strings in lists, of two runs that differ by their hash seed alone."""
    trains = """
import lightning, torch
from functools import partial
from ppo_lightning import PPO, PopArt
from ppo_lightning.callbacks import Curriculum, Level, RolloutDetails, Stage, Stages
from probes import Spaces

class Logs(Spaces):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        parts = {f"part_{index}": float(index) for index in range(20)}
        numbers = {f"key_{index}": index for index in range(20)}
        return observation, reward, terminated, truncated, {**info, **numbers, "reward_components": parts}

lightning.seed_everything(1, verbose=False)
model = PPO(
    partial(Logs, "both", "dict", True), num_envs=2, num_steps=16, total_steps=64, popart=PopArt(),
    normalize_observation=True, normalize_reward=True, info_keys=[f"key_{index}" for index in range(20)],
)
callbacks = [Curriculum([Level()]), Stages([Stage()]), RolloutDetails()]
trainer = lightning.Trainer(accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False)
trainer.fit(model)
trainer.save_checkpoint("end.ckpt")
"""
    orders = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", trains], cwd=folder, env=environment, check=True, timeout=200)
        text = repr(_order(torch.load(folder / "end.ckpt", weights_only=True)))
        orders.append(text.replace(str(folder), "").replace(f"/{seed}/", "/"))
    assert orders[0] == orders[1]


def _order(contents):
    if isinstance(contents, dict):
        return [(key, _order(value)) for key, value in contents.items()]
    if isinstance(contents, list | tuple):
        return [_order(value) for value in contents]
    return contents if isinstance(contents, str) else type(contents).__name__
