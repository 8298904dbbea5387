"""Processes of a test, forked from it: what they need is imported already."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from torch import multiprocessing

from ppo_lightning import PPO
from ppo_lightning.__main__ import COMMANDS, main

PORTS = itertools.cycle(range(1000))


def free_port() -> int:
    """A free port; each process of pytest-xdist has a range of its own, below those that systems give."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in PORTS:
        port = 12_000 + 1000 * (worker % 16) + number
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def forked(function: Callable[[int], Any], world_size: int = 2, env: dict[str, Any] | None = None) -> list[Any]:
    """What ``function(rank)`` returns in each of several processes, or the text of what it raised; None of the dead.

    Args:
        function: may fit a model; Lightning takes the processes for ones that torchrun started.
        world_size: processes.
        env: environment variables by which Lightning knows its processes, with {rank}; the default are Lightning's own.
    """
    known = env or {"LOCAL_RANK": "{rank}", "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    files = [Path(f"result_{rank}.pt").absolute() for rank in range(world_size)]

    def run(rank: int) -> None:
        os.environ.update(place, **{name: value.format(rank=rank) for name, value in known.items()})
        try:
            result = function(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, files[rank])

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    results = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return results


class Ended(NamedTuple):
    """How a command ended."""

    status: int | None
    """Exit status, or the negative number of the signal that ended it; None where it ran past its time and was killed."""
    output: str
    error: str
    """What it wrote on its standard streams."""


def command(words: list[str], before: Callable[[], Any] | None = None, timeout_s: float = 120) -> Ended:
    """Run ``ppo-lightning`` in a process that is forked from this one, in the present folder.

    Args:
        words: of the command line.
        before: runs first, in that process.
        timeout_s: after which it is killed, with all processes that it has started.
    """
    for module in ("cli", *COMMANDS.values()):  # once, for all
        import_module(f"ppo_lightning.{module}")
    files = [Path(name).absolute() for name in (".output", ".error")]
    process = os.fork()
    if process == 0:
        os.setsid()
        sys.stdout, sys.stderr = (file.open("w", buffering=1) for file in files)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        for logger in map(logging.getLogger, ["lightning.pytorch", "lightning.fabric"]):
            logger.handlers = [logging.StreamHandler()]
        os._exit(_status(words, before))
    deadline = time.monotonic() + timeout_s
    ended = status = 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status) if ended else None, *(file.read_text() for file in files))


def _status(words: list[str], before: Callable[[], Any] | None) -> int:
    """What Python's own end would make of a command: its exit status, with the last words on the standard error."""
    sys.argv = ["ppo-lightning", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if before is not None:
            before()
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def fit(model: PPO, **kwargs: Any) -> lightning.Trainer:
    """Train quietly, in one process or in those of :func:`forked`."""
    defaults = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
        "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    trainer = lightning.Trainer(**{**defaults, **kwargs})
    trainer.fit(model)
    return trainer
