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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import (
    CloudpickleWrapper,
    batch_space,
    create_shared_memory,
    iterate,
    read_from_shared_memory,
    write_to_shared_memory,
)
from typing_extensions import override

from ppo_lightning.envs.serial import step_and_reset
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.spaces import Array, split_sizes

Env = gym.Env[Any, Any]

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
    """Worker processes from a clean server, each with environments of its own; a failure to start ends all of them.

    It has Gymnasium's interface, and its mode ``SAME_STEP`` without copies: Gymnasium's own has a process for each environment.

    Args:
        makers: make the N environments, whose faults name them.
        first: number of the first environment, in messages.
        num_workers: processes, among which the environments are split, at most N.

    Raises:
        EnvironmentFault: an environment could not be made in its process, or has other spaces than the first.
    """

    def __init__(self, makers: Sequence[Callable[[], Env]], first: int, num_workers: int) -> None:
        self.num_envs, self.autoreset_mode = len(makers), AutoresetMode.SAME_STEP
        sizes = split_sizes(self.num_envs, num_workers)
        self.rows = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        """Environments of each process."""
        env = makers[0]()
        self.metadata = {**env.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        env.close()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.context = "forkserver"
        context: Any = multiprocessing.get_context(self.context)
        shared = Shared(
            self.num_envs,
            {
                "observation": self.single_observation_space,
                "action": self.single_action_space,
                "reward": Box(-np.inf, np.inf, (), np.float64),
                "terminated": Box(0, 1, (), np.uint8),
                "truncated": Box(0, 1, (), np.uint8),
            },
            context,
        )
        self._shared = shared.arrays()
        self.observations = self._shared["observation"]
        self._state, self.parent_pipes, self.processes = AsyncState.DEFAULT, [], []
        try:
            for rows in self.rows:
                own, theirs = context.Pipe()
                made = CloudpickleWrapper(cast(Any, [makers[row] for row in rows]))
                numbers = range(first + rows.start, first + rows.stop)
                process = context.Process(
                    target=_work,
                    args=(made, rows, numbers, theirs, shared),
                    name=f"environments {numbers.start} to {numbers.stop - 1}",
                    daemon=True,
                )
                self.processes.append(process)
                self.parent_pipes.append(own)
                process.start()
                theirs.close()
            spaces = WorkerMonitor(self, first).call("__init__", self._receive, START_S)
        except BaseException:
            kill(self)
            raise
        expected = self.single_observation_space, self.single_action_space
        for row, found in enumerate(chain.from_iterable(spaces)):
            if found != expected:
                kill(self)
                raise EnvironmentFault(
                    f"environment {first + row} has the spaces {found[0]} and {found[1]}, and the first one {expected[0]} and "
                    f"{expected[1]}: make all environments with the same spaces"
                )

    def _send(self, state: AsyncState, command: str, each: Iterable[Any]) -> None:
        """Send a command to each worker, with arguments of its own."""
        self._assert_is_running()
        for pipe, arguments in zip(self.parent_pipes, each, strict=True):
            pipe.send((command, arguments))
        self._state = state

    def _receive(self, timeout: float | None = None) -> list[Any]:
        """The answer of each worker to the last command."""
        if not self._poll_pipe_envs(timeout):
            raise multiprocessing.TimeoutError(f"{type(self).__name__} did not answer within {timeout} s")
        answers = [pipe.recv() for pipe in self.parent_pipes]
        self._state = AsyncState.DEFAULT
        for _, error in answers:
            if error is not None:
                raise EnvironmentFault(error)
        return [answer for answer, _ in answers]

    def _infos(self, answers: Iterable[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for rows, given in zip(self.rows, answers, strict=True):
            for index, info in zip(rows, given, strict=False):
                if info:
                    infos = self._add_info(infos, info, index)
        return infos

    @override
    def reset_async(self, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> None:
        seeds = (
            seed if isinstance(seed, list) else [None if seed is None else seed + row for row in range(self.num_envs)]
        )
        mask = np.ones(self.num_envs, dtype=bool)
        if options is not None and "reset_mask" in options:
            mask, options = options["reset_mask"], {key: own for key, own in options.items() if key != "reset_mask"}
        each = ((seeds[rows.start : rows.stop], options, mask[rows.start : rows.stop]) for rows in self.rows)
        self._send(AsyncState.WAITING_RESET, "reset", each)

    @override
    def reset_wait(self, timeout: float | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observations, self._infos(self._receive(timeout))

    @override
    def step_async(self, actions: Any) -> None:
        stored = self._shared["action"]
        if isinstance(stored, np.ndarray):
            stored[...] = actions
            each: Iterable[Any] = [(None,)] * len(self.rows)
        else:
            rows = list(iterate(self.action_space, actions))
            each = ((rows[own.start : own.stop],) for own in self.rows)
        self._send(AsyncState.WAITING_STEP, "step", each)

    @override
    def step_wait(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos = self._infos(self._receive(timeout))
        reward, terminated, truncated = (self._shared[name] for name in ("reward", "terminated", "truncated"))
        return self.observations, reward.copy(), terminated.astype(np.bool_), truncated.astype(np.bool_), infos

    @override
    def call_async(self, name: str, /, *args: object, **kwargs: object) -> None:
        self._send(AsyncState.WAITING_CALL, "call", [(name, args, kwargs)] * len(self.rows))

    @override
    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(self._receive(timeout)))

    @override
    def set_attr(self, name: str, values: Any) -> None:
        values = values if isinstance(values, list | tuple) else [values] * self.num_envs
        self._send(AsyncState.WAITING_CALL, "set_attr", ((name, values[own.start : own.stop]) for own in self.rows))
        self._receive()

    @override
    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        kill(self) if terminate else close(self)


class Shared:
    """Arrays that a vector and its worker processes share.

    Args:
        num_envs: N.
        spaces: of one environment's row, by name.
        context: in which the processes are started.
    """

    def __init__(self, num_envs: int, spaces: Mapping[str, gym.Space[Any]], context: Any) -> None:
        self.num_envs, self.spaces = num_envs, dict(spaces)
        self.memory = {name: create_shared_memory(space, n=num_envs, ctx=context) for name, space in spaces.items()}

    def arrays(self) -> dict[str, Any]:
        """[N, …] of each name: an array, or what Gymnasium makes for a composite space."""
        return {
            name: read_from_shared_memory(space, self.memory[name], n=self.num_envs)
            for name, space in self.spaces.items()
        }


class _Environments:
    """The environments of a worker process, which steps them one after another.

    Args:
        makers: make them.
        rows: their places in the shared memory.
        numbers: their numbers, in messages.
        shared: memory of all environments.
    """

    def __init__(self, makers: Sequence[Callable[[], Env]], rows: range, numbers: range, shared: Shared) -> None:
        self.rows, self.numbers, self.shared, self.arrays = rows, numbers, shared, shared.arrays()
        self.envs = [make() for make in makers]

    def spaces(self) -> list[Any]:
        """Observation and action space of each."""
        return [(env.observation_space, env.action_space) for env in self.envs]

    def reset(self, seeds: Sequence[int | None], options: dict[str, Any] | None, mask: Array) -> list[dict[str, Any]]:
        """Reset some; the info of each."""
        return self._each(self._reset, seeds, [options] * len(self.envs), mask)

    def _reset(
        self, row: int, env: Env, seed: int | None, options: dict[str, Any] | None, is_due: bool
    ) -> dict[str, Any]:
        if not is_due:
            return {}
        observation, info = env.reset(seed=seed, options=options)
        self._write(row, observation)
        return info

    def step(self, actions: Any) -> list[dict[str, Any]]:
        """Step each; their infos, nothing where all are empty. None stands for the actions in the shared memory."""
        if actions is None:  # a copy, since an environment may keep its action
            actions = self.arrays["action"][self.rows.start : self.rows.stop].copy()
        infos = self._each(self._step, actions)
        return infos if any(infos) else []

    def _step(self, row: int, env: Env, action: Any) -> dict[str, Any]:
        observation, reward, terminated, truncated, info = step_and_reset(env, action)
        self._write(row, observation)
        arrays = self.arrays
        arrays["reward"][row], arrays["terminated"][row], arrays["truncated"][row] = reward, terminated, truncated
        return info

    def _write(self, row: int, observation: Any) -> None:
        stored = self.arrays["observation"]
        if isinstance(stored, np.ndarray):
            stored[row] = observation
        else:
            write_to_shared_memory(
                self.shared.spaces["observation"], row, observation, self.shared.memory["observation"]
            )

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """An attribute of each, or what its method returns."""

        def call(_: int, env: Env) -> Any:
            found = env.get_wrapper_attr(name)
            return found(*args, **kwargs) if callable(found) else found

        return self._each(call)

    def set_attr(self, name: str, values: Sequence[Any]) -> list[Any]:
        """Set an attribute of each."""
        return self._each(lambda _, env, value: env.set_wrapper_attr(name, value), values)

    def _each(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        """The function of the row, environment and arguments of each; errors name the environment."""
        number, results = self.numbers.start, []
        try:
            for number, *given in zip(self.numbers, self.rows, self.envs, *arguments, strict=True):  # noqa: B007
                results.append(function(*given))
        except EnvironmentFault:
            raise
        except BaseException as error:  # in the run's own process a SystemExit would be a signal's
            raise EnvironmentFault(
                f"environment {number} raised {type(error).__name__}: {error}\n\n{traceback.format_exc()}"
            ) from error
        return results


def _work(makers: CloudpickleWrapper, rows: range, numbers: range, pipe: Any, shared: Shared) -> None:
    """Serve a vector: each answer is a pair of results and None, or of None and the text of an error."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the run handles them, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with contextlib.suppress(*PIPE_CLOSED), contextlib.ExitStack() as closing:  # closed: the run has ended
        try:
            environments = _Environments(cast(Any, makers.fn), rows, numbers, shared)
            for env in environments.envs:
                closing.callback(env.close)
            pipe.send((environments.spaces(), None))
            while (message := pipe.recv())[0] != "close":
                command, arguments = message
                _answer(pipe, command, getattr(environments, command)(*arguments))
        except EnvironmentFault as fault:  # the process ends, which the run notices while others are busy
            pipe.send((None, str(fault)))


def _answer(pipe: Any, command: str, answer: Any) -> None:
    """Send an answer, without values of ``info`` that cannot be pickled."""
    try:
        pipe.send((answer, None))
    except Exception as error:  # objects raise anything where they cannot be pickled; nothing was sent
        if command == "call":
            raise EnvironmentFault(
                f"an environment returned what cannot be sent to the run's process: {error}"
            ) from error
        pipe.send(([_picklable(info) for info in answer], None))


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
        self._is_ours = isinstance(env, ForkserverAsyncVectorEnv)
        if not self._is_ours:  # an error that cannot be pickled never arrives
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
        pipe = self.env.parent_pipes[index]
        answered = _has_data(pipe)
        if self._is_ours:
            error = pipe.recv()[1] if answered else None
            return self._died_error(where) if error is None else EnvironmentFault(error)
        if not answered:
            return self._died_error(where)
        number, kind, error, trace = self.env.error_queue.get()
        if kind is EnvironmentFault:
            return EnvironmentFault(str(error))
        return EnvironmentFault(f"environment {self.first + number} raised {kind.__name__}: {error}\n\n{trace}")

    def _numbers(self, workers: Iterable[int]) -> list[int]:
        """The environments of worker processes."""
        each = (
            self.env.rows
            if isinstance(self.env, ForkserverAsyncVectorEnv)
            else [[row] for row in range(self.env.num_envs)]
        )
        return [self.first + row for worker in workers for row in each[worker]]

    def _died_error(self, where: str) -> WorkerDied:
        ended = wait(list(self._index), timeout=5.0)
        codes = {index: self.env.processes[index].exitcode for one, index in self._index.items() if one in ended}
        names = self._numbers(sorted(codes))
        how = ", ".join(dict.fromkeys(_describe_exit(codes[index]) for index in sorted(codes)))
        return WorkerDied(f"the worker process of environment {names} died in {where}: {how}")

    def _timeout_error(self, where: str, timeout_s: float) -> WorkerDied:
        silent = [index for index, pipe in enumerate(self.env.parent_pipes) if not _has_data(pipe)]
        for index in silent:
            os.kill(cast(int, self.env.processes[index].pid), signal.SIGUSR1)
        time.sleep(0.2)  # for them to write their stacks
        names = self._numbers(silent)
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
