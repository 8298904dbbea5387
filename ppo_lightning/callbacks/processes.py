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
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import distributed
from typing_extensions import override

from ppo_lightning.module import PPOModule
from ppo_lightning.runs.shared_memory import PeerLost

BREATH_S = 30.0
"""Seconds between messages of a busy rank 0 to the other ranks, which would time out without them."""


@contextmanager
def others_wait(trainer: Trainer) -> Iterator[None]:
    """Let other ranks wait at the end for a long task of rank 0, as long as it is alive."""
    if trainer.world_size == 1:
        yield
        return
    broadcast, done = trainer.strategy.broadcast, threading.Event()

    def breathe() -> None:
        while not done.wait(BREATH_S):
            broadcast(True)

    breathing = threading.Thread(target=breathe, daemon=True)
    if trainer.is_global_zero:
        breathing.start()
    try:
        yield
    finally:
        done.set()
    if trainer.is_global_zero:
        breathing.join()
    while broadcast(False):  # rank 0 decides
        pass


class WatchProcesses(Callback):
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
        self._beat(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if time.time() - self._written >= self.INTERVAL_S:
            self._beat(trainer, pl_module)

    def _beat(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        if _is_of_others(exception):
            message = self._blame(rank, trainer.world_size, exception)
            exception.args = (f"{message} ({exception})",)
        else:
            message = f"process {rank}: {type(exception).__name__}: {exception}"
            self._store.set(f"end {rank}", message)
        print(message, file=sys.stderr, flush=True)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)  # one that hangs would never end

    def _blame(self, rank: int, world_size: int, exception: Exception) -> str:
        """One sentence per rank at fault, as far as the store knows; else the exception."""
        answer: list[str] = []
        asking = threading.Thread(target=lambda: answer.append(self._ask(rank, world_size, exception)), daemon=True)
        asking.start()
        asking.join(3 * self.PATIENCE_S)  # a store has timeouts, but waits for its server without one
        if asking.is_alive():
            return "process 0, which the others meet at, does not answer: it hangs"
        return answer[0] if answer else str(exception)

    def _ask(self, rank: int, world_size: int, exception: Exception) -> str:
        store, others = self._store, [other for other in range(world_size) if other != rank]
        store.set_timeout(timedelta(seconds=self.PATIENCE_S))
        try:
            store.set(f"end {rank}", "")
            seen = {other: store.get(f"alive {other}").decode().split() for other in others}
            dead = [other for other in others if _died(*seen[other][2:])]
            until = time.time() + self.PATIENCE_S
            while True:
                silent = [other for other in others if not store.check([f"end {other}"])]
                if dead or len(silent) <= 1 or time.time() > until:
                    break
                time.sleep(0.05)  # other ranks notice it, too
            said = [store.get(f"end {other}").decode() for other in others if other not in silent]
            self._leave(rank, [other for other in others if other not in (dead or silent)])
        except distributed.DistError:
            if isinstance(exception, PeerLost):
                return str(exception)
            return "process 0, which the others meet at, does not answer: it is gone"
        if any(said):
            return "; ".join(filter(None, said))
        if not silent:
            return "the connection between the processes was lost"
        return "; ".join(
            f"process {other} has not been heard of since iteration {seen[other][0]} "
            f"({time.time() - float(seen[other][1]):.0f} s ago): it {'died' if other in dead else 'died or hangs'}"
            for other in (set(dead) & set(silent) or silent)
        )

    def _leave(self, rank: int, living: list[int]) -> None:
        """Mark this rank as done with the store; rank 0, with which the store ends, waits for the other ranks."""
        self._store.set(f"left {rank}", "")
        until = time.time() + self.PATIENCE_S
        while rank == 0 and time.time() < until and not all(self._store.check([f"left {other}"]) for other in living):
            time.sleep(0.01)


def _end_process_group() -> None:
    """End gloo's threads before the interpreter: a thread that frees a tensor afterwards aborts the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _died(host: str, pid: str) -> bool:
    """Whether a process of this machine has ended; False for another machine."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"  # a zombie


def _is_of_others(exception: Exception) -> bool:
    """Whether an exception is due to another rank's fault: from NCCL, the store, or gloo, whose errors have no type."""
    return isinstance(exception, distributed.DistError) or "/gloo/" in str(exception)
