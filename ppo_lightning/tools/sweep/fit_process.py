"""A training run of a trial: ``fit`` with one seed, in a process of its own."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

GRACE_S = 10.0
"""Time that a process gets to shut down after SIGTERM; the end of a long iteration takes five seconds."""
FIT = [sys.executable, "-m", "ppo_lightning", "fit"]


class Measurement(NamedTuple):
    """The metric at one point of a run."""

    steps: int
    """Environment steps."""
    seconds: float
    """Since training began."""
    value: float
    """Of the metric."""


class RunOptions(NamedTuple):
    """What every run of a sweep has in common."""

    metric: str
    threshold: float | None
    """Value of the metric at which a run stops; None never."""
    threads: int | None
    """Of torch, at most (count); None leaves torch's number."""


class FitProcess:
    """One ``fit`` with one seed.

    Args:
        folder: of the trial, with its ``config.yaml``.
        seed: of the run.
        options: of all runs.
    """

    def __init__(self, folder: Path, seed: int, options: RunOptions) -> None:
        self.metric = options.metric
        self.file, self.log = folder / f"progress_{seed}.jsonl", folder / f"log_{seed}.txt"
        self.file.unlink(missing_ok=True)
        self._measurements: list[Measurement] = []
        self._position = 0
        given = {"file": self.file, **options._asdict()}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *FIT,
                    f"--config={folder / 'config.yaml'}",
                    f"--seed_everything={seed}",
                    f"--trainer.default_root_dir={folder}",
                    "--trainer.callbacks+=ppo_lightning.tools.sweep.progress.Progress",
                    *[f"--trainer.callbacks.{name}={value}" for name, value in given.items() if value is not None],
                ],
                stdin=subprocess.PIPE,  # closes with this process, however that ends
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal sends Ctrl-C to the sweep only, which stops its runs
            )

    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self.process.poll() is None

    def measurements(self) -> list[Measurement]:
        """All measurements so far; reads only new lines of the file, and no line before it is complete."""
        if self.file.exists():
            with self.file.open("rb") as lines:
                lines.seek(self._position)
                complete = lines.read().rpartition(b"\n")[0]
            if complete:
                self._position += len(complete) + 1
                self._measurements += [Measurement(**json.loads(line)) for line in complete.splitlines()]
        return self._measurements

    def stop(self) -> None:
        """Terminate the process if it is running, kill it if that takes too long, and close its standard input."""
        if self.is_running():
            self.process.terminate()
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def failure(self) -> str | None:
        """The reason why the ended process failed, in one line; None if it succeeded."""
        status = self.process.returncode
        if status == 0:
            rows = self.measurements()
            finite = rows and math.isfinite(rows[-1].value)
            return None if finite else f"the run reported no finite value of {self.metric}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        if status < 0 or not lines:
            return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        last = errors[-1] if errors else len(lines) - 1
        until = next((index for index in range(last, len(lines)) if not lines[index].endswith(":")), len(lines) - 1)
        return " ".join(lines[last : until + 1]).removeprefix("error: ")
