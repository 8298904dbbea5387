"""A run of several processes of which one raises, dies, hangs or is stopped: ``python failing_job.py RANK FAULT TIMEOUT_S``."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch
from lightning import Callback
from processes import fit
from torch import distributed

from ppo_lightning import PPO

FOREVER_S = 600.0


class Fails(Callback):
    """Lets one process fail in the third iteration, with both processes' ids on disk."""

    def __init__(self, rank: int, fault: str, timeout_s: float, hang_s: float = FOREVER_S) -> None:
        self.rank, self.fault, self.timeout_s, self.hang_s = rank, fault, timeout_s, hang_s

    def on_train_start(self, trainer, pl_module):
        # A group that waits for seconds only would not wait for processes to start.
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s))
        with open(f"pid_{trainer.global_rank}", "w") as file:
            file.write(str(os.getpid()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and pl_module.policy_version == 2:
            print(f"\nfault at {time.time()}", file=sys.stderr, flush=True)
            match self.fault:
                case "raise":
                    raise ZeroDivisionError("the pole is at infinity")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    time.sleep(self.hang_s)
                    os._exit(1)
                case "freeze":
                    if self.hang_s < FOREVER_S:  # else the launcher ends this one
                        other = f"result_{1 - self.rank}.pt"  # of :func:`forked`, once the other process has ended
                        wait = f"for _ in $(seq {10 * self.hang_s:.0f}); do [ -e {other} ] && break; sleep 0.1; done"
                        subprocess.Popen(["sh", "-c", f"{wait}; kill -KILL {os.getpid()}"])
                    os.kill(os.getpid(), signal.SIGSTOP)


def run(fault: Fails, devices: int = 2) -> None:
    """Train until the fault."""
    torch.set_num_threads(1)
    # Compiling takes longer than processes wait for each other here.
    model = PPO("CartPole-v1", num_envs=2, num_steps=8, total_steps=10**9, compile=False)
    fit(model, strategy="ddp", devices=devices, callbacks=[fault])


if __name__ == "__main__":
    run(Fails(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
