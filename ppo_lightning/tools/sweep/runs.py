"""A trial's runs: ``fit`` in processes of their own, one seed after the other."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

GRACE_S = 10.0
"""For a run to end in good order; it takes five seconds where an iteration is long."""
FIT = [sys.executable, "-m", "ppo_lightning", "fit"]


class Row(NamedTuple):
    """What a run has told."""

    steps: int
    """Environment steps."""
    seconds: float
    """Since its training began."""
    value: float
    """Of the metric."""


@dataclass(frozen=True)
class Watched:
    """What is measured of each run."""

    metric: str
    threshold: float | None
    """Value at which a run may end."""
    threads: int | None


class Run:
    """One ``fit`` with one seed.

    Args:
        folder: of the trial, with its ``config.yaml``.
        seed: of the run.
        watched: what it is to tell.
    """

    def __init__(self, folder: Path, seed: int, watched: Watched) -> None:
        self.metric = watched.metric
        self.file, self.log = folder / f"progress_{seed}.jsonl", folder / f"log_{seed}.txt"
        self.file.unlink(missing_ok=True)
        self._rows: list[Row] = []
        self._read = 0
        given = {
            "file": self.file,
            "metric": watched.metric,
            "threshold": watched.threshold,
            "threads": watched.threads,
        }
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
                stdin=subprocess.PIPE,  # which ends with this process, however that ends
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its runs
            )

    def rows(self) -> list[Row]:
        """What it has told so far; of the file only what is new is read."""
        if self.file.exists():
            with self.file.open("rb") as lines:
                lines.seek(self._read)
                whole = lines.read().rpartition(b"\n")[0]
            if whole:
                self._read += len(whole) + 1
                self._rows += [Row(**json.loads(line)) for line in whole.splitlines()]
        return self._rows

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def end(self) -> None:
        """Wait until it has ended, and kill whatever is left of it."""
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.close()

    def close(self) -> None:
        """Let go of its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def failure(self) -> str | None:
        """Why it has ended badly, in a line; None where it has not."""
        status = self.process.returncode
        if status == 0:
            rows = self.rows()
            return (
                None
                if rows and math.isfinite(rows[-1].value)
                else f"it told no value of {self.metric} that is a number"
            )
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        if status < 0 or not lines:
            return f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        last = errors[-1] if errors else len(lines) - 1
        until = next((index for index in range(last, len(lines)) if not lines[index].endswith(":")), len(lines) - 1)
        return " ".join(lines[last : until + 1]).removeprefix("error: ")


def prepare(folder: Path, config: dict[str, Any]) -> None:
    """Make a trial's folder and config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def end_all(runs: Sequence[Run]) -> None:
    """End runs together."""
    for run in runs:
        run.ask_to_end()
    for run in runs:
        run.end()
