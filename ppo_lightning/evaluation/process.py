"""Evaluations of snapshots of weights, in a separate process."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle  # of Gymnasium's requirements
import gymnasium as gym
import torch
from gymnasium.envs.registration import EnvSpec

from ppo_lightning.envs import EnvFactory, EnvOverrides, RestartBudget, VectorEnvAdapter
from ppo_lightning.envs.make import find_spec
from ppo_lightning.envs.streams import temporarily_seeded
from ppo_lightning.errors import InputError
from ppo_lightning.evaluation.episodes import MAX_EPISODE_STEPS, evaluate_episodes, info_metrics, summarize
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import without_mask

PIPE_CLOSED = (EOFError, ConnectionError)
"""What a pipe raises when its other end is closed."""


class EvaluationFailed(RuntimeError):  # noqa: N818 - what it is
    """An evaluation failed: its process died or hangs, or its environments failed."""


@dataclass(frozen=True)
class Evaluation:
    """Inputs of an evaluation besides weights and a seed."""

    policy: Policy
    """On the CPU; its weights are replaced before each evaluation."""
    env_factory: EnvFactory
    observation_space: gym.Space[Any]
    """Of one environment."""
    num_envs: int
    """Environments that are stepped together, as many as in an evaluation in the training process (count)."""
    num_episodes: int
    deterministic: bool
    timeout_s: float
    """For one step of the environments' own worker processes (seconds)."""
    restarts: int
    """How often crashed environments may be restarted."""
    info_keys: tuple[str, ...]
    """Further keys of ``info`` whose values are averaged."""
    bfloat16: bool
    """Training rounds to bfloat16."""
    max_steps: int = MAX_EPISODE_STEPS
    """Of an episode of an environment without a time limit (steps)."""
    seed: int = 0
    """Of the run, for environments that are random when they are made."""

    def make_environments(self, overrides: EnvOverrides, restarts: RestartBudget) -> VectorEnvAdapter:
        """The environments, with these overrides."""
        with temporarily_seeded(self.seed):
            return VectorEnvAdapter(
                overrides.apply_to(self.env_factory),
                self.num_envs,
                self.timeout_s,
                restarts=restarts,
                info_keys=self.info_keys,
                attributes=overrides.attributes,
            )

    def pickled(self) -> bytes:
        """This evaluation and its registration in Gymnasium, for another process.

        Raises:
            InputError: a part of it cannot be pickled.
        """
        name = self.env_factory.env  # a module before the colon registers by itself
        ids = [name] if isinstance(name, str) and ":" not in name else []
        settings = [find_spec(env) for env in ids], torch.get_float32_matmul_precision(), self
        return _pickle(settings, f"the policy and {self.env_factory.name}")


def _pickle(value: Any, name: str) -> bytes:
    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # objects raise anything where they cannot be pickled
        raise InputError(
            f"AsyncEvaluation cannot send {name} to another process ({error}): give functions and classes that can be "
            "pickled, or leave it out"
        ) from error


class EvalProcess:
    """A process that evaluates, one evaluation at a time.

    It is no multiprocessing.Process, which would import the user's script again. It has its own process session, so that
    Ctrl-C in the terminal does not reach it, and its children end with it. It ends when its parent does.

    Args:
        evaluation: the result of :meth:`Evaluation.pickled`.
        timeout_s: seconds after which an evaluation is aborted.
    """

    def __init__(self, evaluation: bytes, timeout_s: float) -> None:
        self.timeout_s, self._submitted_at = timeout_s, 0.0
        self._connection, theirs = multiprocessing.Pipe()
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        call = f"from ppo_lightning.evaluation.process import serve; serve({theirs.fileno()}, {os.getpid()})"
        with theirs, tempfile.TemporaryFile() as file:
            file.write(evaluation)
            file.seek(0)
            self.process = subprocess.Popen(
                [sys.executable, "-c", call],
                stdin=file,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def submit(self, weights: bytes, seed: int, overrides: EnvOverrides) -> None:
        """Begin an evaluation, without waiting for the process to be ready.

        Args:
            weights: a ``state_dict`` of the policy, as ``torch.save`` writes it.
            seed: of the episodes.
            overrides: of the environments.
        """
        self._submitted_at = time.monotonic()
        pickled = _pickle(overrides, f"{dict(overrides.attributes)} and {dict(overrides.env_kwargs)} of a level")

        def send() -> None:
            with contextlib.suppress(OSError):  # poll() reports a process that has died
                self._connection.send((weights, seed, pickled))

        threading.Thread(target=send, daemon=True).start()

    def poll(self, wait_s: float) -> dict[str, float] | None:
        """The statistics of the submitted evaluation; None where they do not arrive within ``wait_s`` seconds.

        Raises:
            EvaluationFailed: the evaluation failed.
        """
        if not self._connection.poll(wait_s):
            if time.monotonic() - self._submitted_at > self.timeout_s:
                raise EvaluationFailed(f"it took longer than timeout_s = {self.timeout_s:g} s")
            return None
        try:
            statistics = self._connection.recv()
        except PIPE_CLOSED as error:
            status = self.process.wait()
            end = (
                f"by {signal.Signals(-status).name}"
                if status < 0
                else f"with status {status}, after what it has printed"
            )
            raise EvaluationFailed(f"its process ended {end}") from error
        if isinstance(statistics, str):
            raise EvaluationFailed(statistics)
        return statistics

    def close(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._connection.close()


def serve(descriptor: int, parent: int) -> None:
    """Serve evaluation requests until the connection closes.

    Args:
        descriptor: of the connection to the requesting process.
        parent: id of that process.
    """
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    specs: list[EnvSpec]
    evaluation: Evaluation
    specs, precision, evaluation = cloudpickle.load(sys.stdin.buffer)
    torch.set_float32_matmul_precision(precision)
    evaluation.policy.eval()
    for spec in specs:
        gym.registry.setdefault(spec.id, spec)
    connection = Connection(descriptor)
    restarts, applied = RestartBudget(evaluation.restarts), b""
    environments: VectorEnvAdapter | None = None
    while True:
        try:
            weights, seed, overrides = connection.recv()
        except PIPE_CLOSED:
            break
        answer: dict[str, float] | str
        try:
            if environments is not None and overrides != applied:
                environments.close()
                environments = None
            if environments is None:
                environments = evaluation.make_environments(cloudpickle.loads(overrides), restarts)
                applied = overrides
            answer = evaluate_snapshot(evaluation, environments, weights, seed)
        except Exception as error:  # the other side raises it
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)
    if environments is not None:
        environments.close()


def evaluate_snapshot(
    evaluation: Evaluation, environments: VectorEnvAdapter, weights: bytes, seed: int
) -> dict[str, float]:
    """Statistics of the episodes of a policy's weights, as ``torch.save`` writes them."""
    evaluation.policy.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=evaluation.bfloat16):
        episodes = evaluate_episodes(
            evaluation.policy,
            environments,
            without_mask(evaluation.observation_space),
            num_episodes=evaluation.num_episodes,
            seed=seed,
            deterministic=evaluation.deterministic,
            max_steps=evaluation.max_steps,
        )
    return {**summarize(episodes), **info_metrics(environments.info_accumulator.pop(evaluation=True))}


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
