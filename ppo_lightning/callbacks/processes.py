"""Reports which rank failed, and why."""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed
from typing_extensions import override

from ppo_lightning.module import PPOModule
from ppo_lightning.runs.shared_memory import PeerLost, is_alive

KEEPALIVE_S = 30.0
"""Seconds between messages of a busy rank 0 to the other ranks, which would time out without them."""


@contextmanager
def long_rank_zero_task(trainer: Trainer) -> Iterator[None]:
    """Let other ranks wait at the end for a long task of rank 0, as long as it is alive."""
    if trainer.world_size == 1:
        yield
        return
    broadcast, done = trainer.strategy.broadcast, threading.Event()

    def keep_alive() -> None:
        while not done.wait(KEEPALIVE_S):
            broadcast(True)

    sender = threading.Thread(target=keep_alive, daemon=True)
    if trainer.is_global_zero:
        sender.start()
    try:
        yield
    finally:
        done.set()
    if trainer.is_global_zero:
        sender.join()
    while broadcast(False):  # rank 0 decides
        pass


class RankFailureReporter(Callback):
    """Names the rank that failed, and ends all ranks.

    Where a rank raised, died or hangs, the other ranks get a closed connection or a timeout, and collectives fail. So each
    rank writes to the process group's store: at most once a second its iteration, the time and its process id, and at its
    end the reason. A rank that has written no reason is the one at fault. (The store lives in rank 0, or in torchrun; where
    it does not answer, rank 0 is gone.)
    """

    INTERVAL_S = 1.0
    """Seconds between two entries."""
    PATIENCE_S = 2.0
    """Seconds that ranks wait for each other's reasons after a fault."""

    _written = 0.0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        atexit.unregister(_end_process_group)
        atexit.register(_end_process_group)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._store = distributed.distributed_c10d._get_default_store()
        self._write_heartbeat(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if time.time() - self._written >= self.INTERVAL_S:
            self._write_heartbeat(trainer, pl_module)

    def _write_heartbeat(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = time.time()
        iteration = cast(PPOModule, pl_module).policy_version + 1
        here = f"{socket.gethostname()} {os.getpid()}"
        self._store.set(f"alive {trainer.global_rank}", f"{iteration} {self._written} {here}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report the failed rank at once: the launcher may be about to end all ranks."""
        if not (self._written and isinstance(exception, Exception)):  # interrupts end all ranks
            return
        rank = trainer.global_rank
        # NCCL, the store and gloo raise where another rank fails; gloo's errors have no type.
        if isinstance(exception, distributed.DistError) or "/gloo/" in str(exception):
            message = self._find_failed_ranks(rank, trainer.world_size, exception)
            exception.args = (f"{message} ({exception})",)
        else:
            message = f"rank {rank}: {type(exception).__name__}: {exception}"
            self._store.set(f"end {rank}", message)
        print(message, file=sys.stderr, flush=True)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)  # one that hangs would never end

    def _find_failed_ranks(self, rank: int, world_size: int, exception: Exception) -> str:
        """One sentence per rank at fault, as far as the store knows; else the exception."""
        answer: list[str] = []
        reader = threading.Thread(
            target=lambda: answer.append(self._read_store(rank, world_size, exception)), daemon=True
        )
        reader.start()
        reader.join(3 * self.PATIENCE_S)  # a store has timeouts, but waits for its server without one
        if reader.is_alive():
            return "rank 0, which holds the ranks' store, does not answer: it hangs"
        return answer[0] if answer else str(exception)

    def _read_store(self, rank: int, world_size: int, exception: Exception) -> str:
        store, others = self._store, [other for other in range(world_size) if other != rank]
        store.set_timeout(timedelta(seconds=self.PATIENCE_S))
        try:
            store.set(f"end {rank}", "")
            seen = {other: store.get(f"alive {other}").decode().split() for other in others}
            hosts, pids = ({other: entry[place] for other, entry in seen.items()} for place in (2, 3))
            dead = [other for other in others if hosts[other] == socket.gethostname() and not is_alive(pids[other])]
            until = time.time() + self.PATIENCE_S
            while True:
                silent = [other for other in others if not store.check([f"end {other}"])]
                if dead or len(silent) <= 1 or time.time() > until:
                    break
                time.sleep(0.05)  # other ranks notice it, too
            reasons = [store.get(f"end {other}").decode() for other in others if other not in silent]
            self._acknowledge(rank, [other for other in others if other not in (dead or silent)])
        except distributed.DistError:
            if isinstance(exception, PeerLost):
                return str(exception)
            return "rank 0, which holds the ranks' store, does not answer: it is gone"
        if any(reasons):
            return "; ".join(filter(None, reasons))
        if not silent:
            return "the connection between the ranks was lost"
        return "; ".join(
            f"rank {other} has sent no heartbeat since iteration {seen[other][0]} "
            f"({time.time() - float(seen[other][1]):.0f} s ago): it {'died' if other in dead else 'died or hangs'}"
            for other in (set(dead) & set(silent) or silent)
        )

    def _acknowledge(self, rank: int, living: list[int]) -> None:
        """Mark this rank as done with the store; rank 0, with which the store ends, waits for the other ranks."""
        self._store.set(f"left {rank}", "")
        until = time.time() + self.PATIENCE_S
        while rank == 0 and time.time() < until and not all(self._store.check([f"left {other}"]) for other in living):
            time.sleep(0.01)


def _end_process_group() -> None:
    """End gloo's threads before the interpreter: a thread that frees a tensor afterwards aborts the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
