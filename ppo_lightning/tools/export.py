"""A policy as one file for other processes: ``ppo-lightning export``, and :meth:`PPO.export`.

The file has everything between an observation and an action: encoding, normalisation, network, mask, recurrent state,
distribution, scaling and clipping. It is compared with :meth:`PPO.predict` before it gets its name.
"""

import copy
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.policy import Policy
from ppo_lightning.policy.distributions import Composite, MultiCategorical
from ppo_lightning.policy.prediction import act
from ppo_lightning.ppo import PPO
from ppo_lightning.spaces import (
    MASK,
    action_dims,
    flatten_spaces,
    numpy_dtype,
    signature,
    tensor_spec,
    without_mask,
)
from ppo_lightning.tools.trained_policy import add_checkpoint, check_output, checkpoint_path, load

FORMATS = {".onnx": "onnx", ".pt2": "pt2"}
OPSET = 20
"""Of ONNX."""
TRACING_ERRORS = RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError
"""Of torch.export, and of a network's code that it traces; the compiler's own are RuntimeErrors."""
INPUT_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_BOUNDS = 32
"""Elements of a Box up to which its bounds are listed where they differ."""
METADATA = "ppo_lightning"
"""Key of the JSON in the file: ONNX's metadata, or a further file within a .pt2."""
SAMPLES = 256
"""Observations on which a file is compared with the policy."""
TOLERANCE, TOLERANCE_OF_DRAWN = 1e-5, 1e-4
"""Highest difference of an action from the policy's, relative where the action is above 1.

A drawn action of gsde is a sum over hundreds of products that cancel, each as exact as float32 is."""


@dataclass(frozen=True)
class Port:
    """An input or output of an exported policy."""

    name: str
    dtype: str
    shape: list[int]
    """Of one sample, without the dimension of the batch."""
    meaning: str
    """What it is, with its unit or range."""


class PolicyGraph(nn.Module):
    """A policy as a function of tensors alone, one argument per input.

    Args:
        model: whose policy it is; the copy here is on the CPU.
        stochastic: draw actions, by an input of random numbers, instead of taking the most probable ones.
    """

    def __init__(self, model: PPO, *, stochastic: bool) -> None:
        super().__init__()
        self.policy: Policy = copy.deepcopy(model.policy).cpu().eval()
        space = without_mask(model.observation_space)
        distribution, dims = self.policy.distribution, action_dims(model.action_space)
        self.observations = {_port_name("observation", path): path for path in flatten_spaces(space)}
        self.stored = {path: tensor_spec(leaf).dtype for path, leaf in flatten_spaces(space).items()}
        """Types of the observations in a rollout; inputs have those of the environment."""
        self.is_masked = bool(dims) and (model.trained_with_masks or space is not model.observation_space)
        self.inputs = [
            Port(
                _port_name("observation", path),
                _input_dtype(leaf),
                list(tensor_spec(leaf).shape),
                f"observation as the environment gives it, {_range(leaf)}",
            )
            for path, leaf in flatten_spaces(space).items()
        ]
        self.outputs = [
            Port(
                _port_name("action", path),
                str(leaf.dtype),
                list(cast(Any, leaf).shape),
                f"action as the environment takes it, {_range(leaf)}",
            )
            for path, leaf in flatten_spaces(model.action_space).items()
        ]
        if self.policy.state_size:
            size = [self.policy.state_size]
            self.inputs.append(
                Port("state", "float32", size, "next_state of the step before, zeros at an episode's start")
            )
            self.outputs.append(Port("next_state", "float32", size, "recurrent state after this step"))
        if self.is_masked:
            meaning = f"true where an action is allowed; alternatives of each choice: {list(dims)}, concatenated"
            self.inputs.append(Port(MASK, "bool", [sum(dims)], meaning))
        self.unused: dict[str, Port] = {}
        """Inputs that the actions do not depend on, by name: parts of the observation that only the critic sees."""
        self.is_stochastic = stochastic
        if stochastic:
            size = [2 * distribution.num_noise]
            self.inputs.append(Port("random", "float32", size, "uniform on [0, 1), different in every call"))

    @override
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs in their order, for the inputs in theirs."""
        given = dict(zip((port.name for port in self.inputs), tensors, strict=True))
        rows = self.rows(given)
        noise = self.policy.distribution.noise_from_uniform(given["random"]) if self.is_stochastic else None
        action, state = act(self.policy, rows, given.get("state"), given.get(MASK), noise)
        actions = list(action.values()) if isinstance(action, dict) else [action]
        return tuple(actions if state is None else [*actions, state])

    def rows(self, given: Mapping[str, Tensor]) -> Any:
        """Observations as rollouts store them, from inputs by name; zeros for unused parts."""
        batch = next(iter(given.values())).shape[0]  # len would make it a constant of the trace
        zeros = {
            name: torch.zeros(batch, *port.shape, dtype=getattr(torch, port.dtype))
            for name, port in self.unused.items()
        }
        rows = {path: {**given, **zeros}[name].to(self.stored[path]) for name, path in self.observations.items()}
        return rows.get("", rows)

    def leave_out_unused(self, program: torch.export.ExportedProgram) -> bool:
        """Take observations that a trace does not use out of the inputs; whether there were any."""
        if len(self.observations) == 1:  # without inputs there would be no batch
            return False
        with _quiet():  # without changes in place, all that outputs depend on are arguments
            functional = program.run_decompositions()
        nodes, used = list(functional.graph_module.graph.nodes)[-1:], set()
        while nodes:
            node = nodes.pop()
            if node not in used:
                used.add(node)
                nodes += node.all_input_nodes
        used = {node.name for node in used}
        names = dict(zip((port.name for port in self.inputs), functional.graph_signature.user_inputs, strict=True))
        unused = {name for name in self.observations if names[name] not in used}
        if len(unused) == len(self.observations):
            return False
        self.unused = {port.name: port for port in self.inputs if port.name in unused}
        self.inputs = [port for port in self.inputs if port.name not in unused]
        return bool(unused)


def _input_dtype(space: Any) -> str:
    """The environment's own type of observations, so that they need no conversion; what rollouts store where torch lacks it."""
    name = str(space.dtype)
    return name if name in INPUT_DTYPES else str(numpy_dtype(tensor_spec(space).dtype))


def _port_name(kind: str, path: str) -> str:
    return f"{kind}.{path}" if path else kind


def _range(space: Any) -> str:
    """The space, and its range where that is short."""
    if not isinstance(space, Box):
        return str(space)
    bounds = []
    for bound in (space.low.flatten(), space.high.flatten()):
        values = [f"{value:g}" for value in bound.astype(float)]
        several = len(set(values)) > 1 and len(values) <= MAX_BOUNDS
        bounds.append(f"[{', '.join(values)}]" if several else values[0])
    alike = all(len(np.unique(bound)) == 1 or bound.size <= MAX_BOUNDS for bound in (space.low, space.high))
    return f"{signature(space)}, {' to '.join(bounds) if alike else 'bounds that differ'}"


def export(model: PPO, path: str | Path, *, stochastic: bool = False, force: bool = False) -> float:
    """Write a policy as one file, after comparing it with the policy in a process without this package.

    Args:
        model: whose policy is exported.
        path: of the file; its suffix is the format, .onnx (onnxruntime) or .pt2 (``torch.export``).
        stochastic: draw actions, by a further input of random numbers, instead of taking the most probable ones.
        force: replace an existing file.

    Returns:
        The highest difference between actions and states of the file and those of the policy, over 256 samples.

    Raises:
        InputError: the path cannot be written, a library is missing, the network cannot be traced, or the file's actions
            differ by more than 1e-5 (drawn ones 1e-4). No file is written then.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path} has no suffix of a format: name it {path.stem}.onnx or {path.stem}.pt2")
    check_output(path, force=force)
    if FORMATS[path.suffix] == "onnx":
        _check_installed("onnx", "onnxscript", "onnxruntime")
    graph = PolicyGraph(model, stochastic=stochastic)
    inputs = sample_inputs(graph, model)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        tensors = [torch.from_numpy(inputs[port.name]) for port in graph.inputs]
        expected = graph(*tensors)  # also fills caches of constants with tensors that are not the tracer's
        program = _traced(graph, tensors)
        if graph.leave_out_unused(program):
            tensors = [torch.from_numpy(inputs[port.name]) for port in graph.inputs]
            program = _traced(graph, tensors)
        file = Path(folder) / path.name
        write = _write_onnx if FORMATS[path.suffix] == "onnx" else _write_pt2
        write(program, graph, file, json.dumps(metadata(model, graph), indent=1))
        found = run_elsewhere(file, inputs, [port.name for port in graph.inputs])
        worst = largest_difference(graph, tensors, expected, found)
        tolerance = TOLERANCE_OF_DRAWN if stochastic else TOLERANCE
        if not worst <= tolerance:
            raise InputError(
                f"the exported policy differs from predict by {worst:.2g}, more than {tolerance:g}: no file was written; the "
                f"network {type(model.policy.network).__name__} computes something else when it is traced"
            )
        os.replace(file, path)
    return worst


def _check_installed(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'{missing[0]} is not installed: pip install "ppo-lightning[export]", or export a .pt2 file')


def metadata(model: PPO, graph: PolicyGraph) -> dict[str, Any]:
    """What a file says of itself: inputs, outputs, environment, training, versions."""
    returns = [episode[0] for episode in model.rollouts.episodes.ep_info_buffer]
    packages = ("ppo-lightning", "torch", "gymnasium")
    return {
        "inputs": [asdict(port) for port in graph.inputs],
        "outputs": [asdict(port) for port in graph.outputs],
        "environment": model.env_factory.name,
        "observation_space": signature(model.observation_space),
        "action_space": signature(model.action_space),
        "stochastic": graph.is_stochastic,
        "environment_steps": model.num_env_steps,
        "seed": model.seed,
        "mean_training_return": statistics.fmean(returns) if returns else None,
        "training_episodes": len(returns),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def sample_inputs(graph: PolicyGraph, model: PPO, samples: int = SAMPLES) -> dict[str, NDArray[Any]]:
    """Inputs [samples, …] such as training has seen: observations by the normaliser's moments, or of the space."""
    rng = np.random.default_rng(0)
    policy, found = graph.policy, {}
    for (name, path), space in zip(
        graph.observations.items(), flatten_spaces(without_mask(model.observation_space)).values(), strict=True
    ):
        spec, dtype = tensor_spec(space), np.dtype(_input_dtype(space))
        if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
            values = rng.standard_normal((samples, *spec.shape))
            if policy.moments is not None and path in policy.normalized:
                part = policy.normalized[path]
                mean, variance = policy.moments.mean[part].numpy(), policy.moments.variance[part].numpy()
                values = mean.reshape(spec.shape) + variance.reshape(spec.shape) ** 0.5 * values
            found[name] = values.clip(space.low, space.high).astype(dtype)
        else:
            bounds = (
                np.broadcast_to(bound, (samples, *spec.shape)).astype(np.float64) for bound in (spec.low, spec.high)
            )
            low, high = (bound.clip(-(2**31), 2**31).astype(np.int64) for bound in bounds)  # as 64 bits have room for
            found[name] = rng.integers(low, high, endpoint=True).astype(dtype)
    if policy.state_size:
        found["state"] = rng.standard_normal((samples, policy.state_size)).astype(np.float32)
        found["state"][::2] = 0.0
    if graph.is_masked:
        masks = []
        for size in action_dims(model.action_space):
            part = rng.random((samples, size)) < 0.5
            part[np.arange(samples), rng.integers(size, size=samples)] = True
            masks.append(part)
        found[MASK] = np.concatenate(masks, 1)
    if graph.is_stochastic:
        found["random"] = rng.random((samples, 2 * policy.distribution.num_noise), dtype=np.float32)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on what is not installed or will be renamed, and the graphs that they print on errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _traced(graph: PolicyGraph, tensors: list[Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            return torch.export.export(
                graph, tuple(tensors), dynamic_shapes=(tuple({0: batch} for _ in tensors),), strict=False
            )
    except TRACING_ERRORS as error:
        raise _not_exported(
            graph,
            error,
            "write its forward without Python control flow that depends on values, and without numbers taken out of tensors",
        ) from error


def _not_exported(graph: PolicyGraph, error: BaseException, advice: str) -> InputError:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = re.sub(r"\x1b\[[\d;]*m", "", str(cause)).strip().partition("\n")[0].rstrip(".")
    if "specialized it to be a constant" in str(cause):
        reason = "the size of the batch becomes a constant, as len(tensor) makes it, where tensor.shape[0] does not"
    return InputError(
        f"the network {type(graph.policy.network).__name__} cannot be exported ({type(cause).__name__}: {reason}): {advice}"
    )


def _write_onnx(program: torch.export.ExportedProgram, graph: PolicyGraph, file: Path, text: str) -> None:
    import onnx

    names = [port.name for port in graph.inputs], [port.name for port in graph.outputs]
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, input_names=names[0], output_names=names[1], opset_version=OPSET, dynamo=True, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        raise _not_exported(graph, error, "ONNX lacks an operation; replace it, or export a .pt2 file") from error
    assert exported is not None
    contents = exported.model_proto
    del contents.metadata_props[:]
    onnx.helper.set_model_props(contents, {METADATA: text})
    onnx.save(contents, file)


def _write_pt2(program: torch.export.ExportedProgram, graph: PolicyGraph, file: Path, text: str) -> None:
    with _quiet():
        torch.export.save(program, file, extra_files={f"{METADATA}.json": text})


ELSEWHERE = """
import sys, warnings
sys.modules["ppo_lightning"] = None
warnings.simplefilter("ignore")
import numpy as np
file, given, result, *names = sys.argv[1:]
inputs = np.load(given)
if file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: inputs[name] for name in names})
else:
    import torch
    with torch.no_grad():
        outputs = [one.numpy() for one in torch.export.load(file).module()(*(torch.from_numpy(inputs[name]) for name in names))]
np.savez(result, **{str(place): one for place, one in enumerate(outputs)})
"""
"""Runs an exported file where this package cannot be imported."""


def run_elsewhere(file: Path, inputs: Mapping[str, NDArray[Any]], names: Iterable[str]) -> list[NDArray[Any]]:
    """Outputs of an exported file, in a process that cannot import this package.

    Raises:
        InputError: the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(given, **cast(Any, inputs))
        command = [sys.executable, "-I", "-c", ELSEWHERE, str(file), str(given), str(result), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"the exported file could not be run ({reason}): no file was written")
        with np.load(result) as outputs:
            return [outputs[str(place)] for place in range(len(outputs.files))]


def largest_difference(
    graph: PolicyGraph, inputs: list[Tensor], expected: tuple[Tensor, ...], found: list[NDArray[Any]]
) -> float:
    """The highest difference of outputs, relative above 1; of a discrete choice, by how much its logit misses the highest.

    Where two logits are equal to rounding, either choice is right.
    """
    worst = 0.0
    for port, own, other in zip(graph.outputs, expected, map(torch.from_numpy, found), strict=True):
        if own.shape != other.shape or own.dtype != other.dtype:
            return float("inf")
        if own.is_floating_point():
            difference = (own.double() - other.double()).abs() / own.double().abs().clamp_min(1.0)
            worst = max(worst, float(difference.max()) if difference.isfinite().all() else float("inf"))
        elif not torch.equal(own, other):
            worst = max(worst, _missed_logits(graph, inputs, port.name, other))
    return worst


def _missed_logits(graph: PolicyGraph, inputs: list[Tensor], name: str, chosen: Tensor) -> float:
    """By how much the logits of chosen actions, with their noise, are below the highest ones."""
    policy, given = graph.policy, dict(zip((port.name for port in graph.inputs), inputs, strict=True))
    noise = policy.distribution.noise_from_uniform(given["random"]) if graph.is_stochastic else None
    state = given.get("state")
    start = None if state is None else (state == 0).all(-1)
    logits = policy.act(graph.rows(given), noise, given.get(MASK), state, start).parameters
    distribution = policy.distribution
    parts = distribution.parts if isinstance(distribution, Composite) else {"": distribution}
    begin_logit = begin_noise = 0
    for path, part in parts.items():
        if _port_name("action", path) == name:
            assert isinstance(part, MultiCategorical)
            perturbed = logits[:, begin_logit : begin_logit + part.num_parameters]
            if noise is not None:
                perturbed = perturbed + noise[:, begin_noise : begin_noise + part.num_noise]
            first = 0 if part.start is None else torch.as_tensor(np.asarray(part.start))
            choices = (chosen.long() - first).reshape(len(chosen), -1).unsqueeze(-1).unbind(1)
            missed = [
                own.amax(-1) - own.gather(-1, choice).squeeze(-1)
                for own, choice in zip(perturbed.split(part.sizes, -1), choices, strict=True)
            ]
            return float(torch.stack(missed).max())
        begin_logit, begin_noise = begin_logit + part.num_parameters, begin_noise + part.num_noise
    return float("inf")


def main(words: list[str]) -> None:
    """Run ``ppo-lightning export``: write the file, print its path and how far it is from the policy."""
    parser = PlainParser(
        prog="ppo-lightning export",
        description="Write a checkpoint's policy as one file: observations in, actions out, everything between inside.",
    )
    add = parser.add_argument
    add_checkpoint(parser)
    add("--format", choices=sorted(FORMATS.values()), help="onnx (default), or pt2 of torch.export")
    add("--out", type=Path, help="file to write (default: the checkpoint's name with the format's suffix)")
    add("--stochastic", action="store_true", help="draw actions, by an input of random numbers")
    add("--force", action="store_true", help="replace an existing file")
    with exit_on_user_error():
        given = parser.parse_args(words)
        suffix = f".{given.format}" if given.format else given.out.suffix if given.out else ".onnx"
        checkpoint = checkpoint_path(given)
        path = given.out or checkpoint.with_suffix(suffix)
        if path.suffix != suffix:
            raise InputError(f"--out {path} has another suffix than --format {given.format}: leave one of them out")
        worst = export(load(given, checkpoint), path, stochastic=given.stochastic, force=given.force)
        print(f"policy  {path}  ({path.stat().st_size / 1000:.0f} kB, differs from predict by at most {worst:.1g})")
