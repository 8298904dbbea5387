"""Worker processes of environments: started, monitored, and ended in any state."""

import contextlib
import faulthandler
import fcntl
import multiprocessing
import os
import queue
import select
import signal
import struct
import termios
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import _async_worker

from ppo_lightning.errors import EnvironmentFault

START_S = 300.0
"""Timeout for worker processes to make their environments (seconds)."""

FAULT_S = 1.0
"""Timeout for an error that a worker process has announced (seconds)."""

CLOSE_S = 2.0
"""Seconds that worker processes have to close their environments."""

PIPE_CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)
"""What a pipe raises when its other end is closed."""


class WorkerDied(EnvironmentFault):
    """A worker process died, or did not answer in time."""


class ForkserverAsyncVectorEnv(AsyncVectorEnv):
    """Gymnasium's worker processes from a clean server; a failure to start ends all of them.

    Args:
        makers: make the environments, whose faults name them.
        first: number of the first environment, in messages.

    Raises:
        EnvironmentFault: an environment could not be made in its process.
    """

    processes, parent_pipes = cast(Any, ((), ()))  # of a vector whose first environment could not be made

    def __init__(self, makers: Sequence[Callable[[], gym.Env[Any, Any]]], first: int) -> None:
        self._first = first
        try:
            # SAME_STEP has no dummy steps, and a rollout copies what it stores.
            super().__init__(
                makers,
                copy=False,
                context="forkserver",
                worker=cast(Any, partial(_work, first=first)),
                autoreset_mode=AutoresetMode.SAME_STEP,
            )
        except BaseException:
            kill(self)
            raise

    def _check_spaces(self) -> None:
        hear = lambda: [pipe.recv() for pipe in self.parent_pipes]  # noqa: E731
        failures = [failure for failure in WorkerMonitor(self, self._first).call("__init__", hear, START_S) if failure]
        if failures:
            raise EnvironmentFault(failures[0])
        super()._check_spaces()


def _work(
    index: int,
    make: Callable[[], gym.Env[Any, Any]],
    pipe: Any,
    parent_pipe: Any,
    memory: Any,
    faults: Any,
    mode: AutoresetMode,
    semaphore: Any,
    *,
    first: int,
) -> None:
    """Gymnasium's worker, which also reports whether its environment could be made, and always its errors."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the run handles them, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        env = make()
    except EnvironmentFault as fault:
        pipe.send(str(fault))
        return
    pipe.send(None)
    told = cast(Any, _TextErrorQueue(faults, first))
    try:
        _async_worker(index, lambda: env, cast(Any, _PicklingPipe(pipe)), parent_pipe, memory, told, mode, semaphore)
    except SystemExit as error:  # in the run's own process it would be a signal's
        told.put((index, SystemExit, error, traceback.format_exc()))
        pipe.send((None, False))


class _PicklingPipe:
    """A worker's end of its pipe, which drops values of ``info`` that cannot be pickled."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.recv, self.close = pipe, pipe.recv, pipe.close

    def send(self, message: tuple[Any, bool]) -> None:
        try:
            self.pipe.send(message)
        except Exception:  # objects raise anything where they cannot be pickled; nothing was sent
            answer, succeeded = message
            if not (isinstance(answer, tuple) and len(answer) in (2, 5) and isinstance(answer[-1], dict)):
                raise
            self.pipe.send(((*answer[:-1], _picklable(answer[-1])), succeeded))


def _picklable(info: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of an info that can be pickled."""
    kept = {}
    for key, value in info.items():
        try:
            ForkingPickler.dumps({key: value})
            kept[key] = value
        except Exception:  # as above
            if isinstance(value, dict):
                kept[key] = _picklable(value)
    return kept


def _exit_with_parent() -> None:
    """End with the run's process: a worker that hangs would not see its pipe close."""
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    os._exit(1)


class _TextErrorQueue:
    """The queue of a worker's errors, as text: an error that cannot be pickled would never arrive."""

    def __init__(self, faults: Any, first: int) -> None:
        self.faults, self.first = faults, first

    def put(self, fault: tuple[int, type[BaseException], BaseException, str]) -> None:
        index, kind, error, trace = fault
        text = str(error)
        if not issubclass(kind, EnvironmentFault):
            text = f"environment {self.first + index} raised {kind.__name__}: {error}\n\n{trace}"
        self.faults.put((index, EnvironmentFault, text, ""))


class WorkerMonitor:
    """Waits for the answers of worker processes, and notices at once when one has died.

    Args:
        env: the vector, just made.
        first: number of its first environment, in messages.
    """

    def __init__(self, env: AsyncVectorEnv, first: int) -> None:
        self.env, self.first = env, first
        self._index = {process.sentinel: index for index, process in enumerate(env.processes)}
        self._poll = select.poll()  # a selector per call would cost more than the call
        for sentinel in self._index:
            self._poll.register(sentinel, select.POLLIN)
        # In a vector that was not made here, an error that cannot be pickled never arrives.
        env.error_queue.get = partial(env.error_queue.get, timeout=FAULT_S)

    def call(self, where: str, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """Send to the workers, or receive from them; any failure ends all of them.

        Args:
            where: what they do, in messages.
            call: sends or receives.
            timeout_s: wait this long for all answers first; None does not wait.

        Raises:
            WorkerDied: one died, or did not answer in time.
        """
        try:
            if timeout_s is not None:
                self._wait(where, timeout_s)
            return call()
        except PIPE_CLOSED as error:
            lost = self._died_error(where)
            kill(self.env)
            raise lost from error
        except queue.Empty as error:
            kill(self.env)
            raise EnvironmentFault(
                f"an environment raised in {where} what its worker process could not send: it is on the error stream"
            ) from error
        except Exception:
            kill(self.env)  # the remaining workers cannot be closed gracefully
            raise

    def _wait(self, where: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for pipe in self.env.parent_pipes:
            own = pipe.fileno()
            self._poll.register(own, select.POLLIN)
            try:
                ready = dict(self._poll.poll(1000 * max(0.0, deadline - time.monotonic())))
                if not ready:
                    raise self._timeout_error(where, timeout_s)
                if own not in ready:
                    raise self._error_of_ended(where, min(self._index[sentinel] for sentinel in ready))
            finally:
                self._poll.unregister(own)

    def _error_of_ended(self, where: str, index: int) -> EnvironmentFault:
        """Why a worker has ended: it died, or its environment raised, which it reports before it ends."""
        if not _has_data(self.env.parent_pipes[index]):
            return self._died_error(where)
        number, kind, error, trace = self.env.error_queue.get()
        if kind is EnvironmentFault:
            return EnvironmentFault(str(error))
        return EnvironmentFault(f"environment {self.first + number} raised {kind.__name__}: {error}\n\n{trace}")

    def _died_error(self, where: str) -> WorkerDied:
        ended = wait(list(self._index), timeout=5.0)
        codes = {index: self.env.processes[index].exitcode for one, index in self._index.items() if one in ended}
        names = [self.first + index for index in sorted(codes)]
        how = ", ".join(dict.fromkeys(_describe_exit(codes[index]) for index in sorted(codes)))
        return WorkerDied(f"the worker process of environment {names} died in {where}: {how}")

    def _timeout_error(self, where: str, timeout_s: float) -> WorkerDied:
        silent = [index for index, pipe in enumerate(self.env.parent_pipes) if not _has_data(pipe)]
        for index in silent:
            os.kill(cast(int, self.env.processes[index].pid), signal.SIGUSR1)
        time.sleep(0.2)  # for them to write their stacks
        names = [self.first + index for index in silent]
        longer = "" if where == "__init__" else ", or raise env_timeout_s"
        return WorkerDied(
            f"environment {names} did not answer within {timeout_s} s in {where}: look at what it waits for (its stack is "
            f"on the error stream){longer}"
        )


def close(*envs: AsyncVectorEnv) -> None:
    """End worker processes: gracefully, and by force where they have not ended in time."""
    try:
        for env in envs:
            for pipe in env.parent_pipes:
                if pipe is not None and not pipe.closed:
                    with contextlib.suppress(OSError):  # the worker may be dead
                        pipe.send(("close", None))
        deadline = time.monotonic() + CLOSE_S
        running = {process.sentinel for env in envs for process in env.processes}
        while running and (left := deadline - time.monotonic()) > 0:
            running.difference_update(wait(list(running), left))
    finally:
        kill(*envs)


def kill(*envs: AsyncVectorEnv) -> None:
    """Kill worker processes: Gymnasium's own way waits forever where one is dead or busy."""
    started = [process for env in envs for process in env.processes if process.pid is not None]
    for process in started:
        process.kill()
    for process in started:
        process.join(CLOSE_S)
    for env in envs:
        for pipe in env.parent_pipes:
            if pipe is not None:
                pipe.close()
        env.closed = True


def _has_data(pipe: Any) -> bool:
    """Whether a pipe holds unread data: the pipe of a dead process is readable, too."""
    return struct.unpack("i", fcntl.ioctl(pipe.fileno(), termios.FIONREAD, b"\0" * 4))[0] > 0


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit code {code}"
    known = {one.value for one in signal.Signals}  # real-time signals have no names
    name = f" ({signal.Signals(-code).name})" if -code in known else ""
    why = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code}{name}{why}"
