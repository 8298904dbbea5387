"""Functions of tensors as compiled graphs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import override

OPTIONS = {"cpp.use_decompose_tanh": True, "cpp_wrapper": True}
"""Of torch's compiler: tanh by exp, which vectorises (five times as fast) and is as exact to 1e-7; and calls between
kernels in C++, since with small networks there are more calls than there is arithmetic."""

NARROW = 16
"""Columns below which a product with a transposed matrix is slow: MKL takes 15 µs for [64, 256] · [256, 4], and 5 µs for
the transposed product, which has the same sums. Without this rewrite benchmarks/w3.yaml trains at 0.90 of the speed
(median of 43 pairs of iterations, torch 2.13.0, AMD EPYC)."""

MAX_SAMPLES = 2048
"""Samples of one graph on a CPU: what is in between stays in its cache, and 8,192 samples in four parts take two thirds
of the time."""


PAYS_OFF_FROM = 50_000
"""Gradient steps of a run from which compiling pays off: it saves 0.3 to 0.9 ms in each, of small networks, and takes 10 to 40
seconds on a machine that has not compiled the same before (docs/speed.md)."""


MAX_GRAPHS = 16
"""Graphs of one function, before the run continues in eager mode: a loss that reads a Python number which changes in each
iteration would be compiled again each time."""


@dataclass(frozen=True)
class Compilation:
    """Whether a run compiles, and why."""

    enabled: bool
    decision: str = ""
    """What was decided, and why; empty where the user decided."""

    @classmethod
    def of(cls, choice: bool | Literal["auto"], gradient_steps: int, network: nn.Module) -> Self:
        """The decision for a run. It depends on the command alone, so that the same one repeats bit for bit.

        Args:
            choice: the user's.
            gradient_steps: of the run, were it on one rank: several ranks take as many together.
            network: that is trained; convolutions gain nothing, since their time is arithmetic.
        """
        if choice != "auto":
            return cls(choice)
        if any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in network.modules()):
            return cls(False, "trains in eager mode: convolutions are not faster compiled")
        number = f"{gradient_steps:,} gradient steps"
        if gradient_steps < PAYS_OFF_FROM:
            return cls(False, f"trains in eager mode: compiling {number} takes longer than it saves")
        return cls(True, f"compiles {number}")

    def is_on(self, device: torch.device) -> bool:
        """Whether what runs on a device is compiled: on a CPU alone, unless the user asks for it; CUDA graphs need memory."""
        return self.enabled and (not self.decision or device.type == "cpu")

    def report(self, device: torch.device) -> None:
        """Report what was decided, unless by the user."""
        if self.enabled and not self.is_on(device):
            rank_zero_info(f"compile: auto trains in eager mode on {device.type}: compile: true compiles there, too")
        elif self.decision:
            rank_zero_info(f"compile: auto {self.decision}")

    def report_eager(self, part: str, reason: Any) -> None:
        """Report what cannot be compiled: a warning where the user asked for it."""
        if self.decision:
            rank_zero_info(f"compile: auto has no effect on {part}, since {reason}")
        else:
            rank_zero_warn(f"compile: true has no effect on {part}, since {reason}")


class CompilerError(Exception):
    """torch could not compile a function; nothing was computed."""


class CompiledFunction:
    """A function of tensors as one graph for each combination of shapes.

    A call goes through torch, which checks what the graph depends on: a fifth of the time of a small network's gradient step.
    :meth:`repeat` calls the graph itself, on CUDA captured, so that one call launches all of its kernels.

    Args:
        function: pure, but for tensors of its own that it writes to.
        module: whose parameters it reads.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        # Constants of spaces are cached; the compiler sees through that, and says so.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        self.graphs = 0
        """That were compiled so far (count)."""
        cuda = next(module.parameters()).is_cuda
        self._backend = RecordingBackend({} if cuda else {**OPTIONS, **_matmul_pass()})
        self._calls: dict[Any, GraphCall] = {}
        """The first call with each combination of shapes since :meth:`check_again`."""
        self._calls_before: dict[Any, GraphCall] = {}
        """The same before that."""
        self._has_repeated = self._varies = False
        """Whether since then calls with the same shapes were alike, and whether any were not."""
        self._is_steady = False
        """Whether before that all calls with the same shapes were alike, so that the graph alone does the same."""

        def counted(*args: Any) -> Any:
            self._count()
            return function(*args)

        # torch limits the graphs of one code object, and models of one process would share it: each has its own.
        counted.__code__ = counted.__code__.replace()
        self._graph: Callable[..., Any] = torch.compile(  # pyright: ignore[reportCallIssue]
            counted, fullgraph=True, dynamic=False, backend=self._backend, recompile_limit=MAX_GRAPHS
        )
        self.captures = cuda
        """Whether repeated calls are CUDA graphs."""

    @torch.compiler.assume_constant_result
    def _count(self) -> None:
        """Runs when the compiler traces the function, not when its graph runs."""
        self.graphs += 1

    def __call__(self, *args: Any) -> Any:
        """What the function returns.

        Raises:
            CompilerError: there is no compiler, or the function is not one graph.
        """
        return self._recorded_call(*args)[0]

    def _recorded_call(self, *args: Any) -> tuple[Any, "GraphCall | None"]:
        """What the function returns, and the call of its graph; None where torch was told to run everything in eager mode."""
        try:
            return self._graph(*args), self._backend.last
        except Exception as error:  # the compiler raises whatever its parts raise; errors of user code pass through
            if not _is_compilers(error):
                raise
            reason = f"torch could not compile it: {first_line_of_compiler_error(error)}"
            if self.graphs >= MAX_GRAPHS:
                reason = f"after {self.graphs} graphs it would be compiled again: a value that it reads keeps changing"
            raise CompilerError(reason) from error
        finally:
            self._backend.last = None

    def check_again(self) -> None:
        """Let the next call of :meth:`repeat` with each combination of shapes be checked.

        What the function depends on may have changed.
        """
        self._is_steady = (self._is_steady or self._has_repeated) and not self._varies
        self._has_repeated = self._varies = False
        self._calls_before, self._calls = self._calls, {}

    def repeat(self, *args: Any) -> Any:
        """What the function returns, by the graph alone where that is the same.

        The first call with each combination of shapes after :meth:`check_again` is checked. Later ones are not, if all calls
        between the two :meth:`check_again` before were alike: they called the same graph with the same tensors beside the
        arguments, and it gave what the function returns and no more. Else the function depends on something that it changes
        itself, such as a count of its calls. It must not keep what it returns.

        Raises:
            CompilerError: as of a call.
        """
        leaves = list(_leaves(args))
        shapes = tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        first = self._calls.get(shapes)
        if first is not None and self._is_steady:
            return first.repeat(leaves)
        results, call = self._recorded_call(*args)
        if call is None or not call.bind(leaves, results):
            self._is_steady, self._varies = False, True
        elif first is None:
            self._calls[shapes], before = call, self._calls_before.get(shapes)
            if before is None or not call.is_like(before):
                self._is_steady = False
            elif self.captures:
                call.continue_captured(before)
        elif call.is_like(first):
            self._has_repeated = True
        else:
            self._varies = True
        return results


class RecordingBackend:
    """torch's own compiler, with a record of what a graph was called with.

    torch keeps every backend for good, so this one knows neither the function nor its module.

    Args:
        options: of the compiler.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.last: GraphCall | None = None

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        """Compile a graph."""
        from torch._dynamo import lookup_backend  # as its documentation composes backends; importing it takes a second

        inductor: Callable[..., Any] = lookup_backend("inductor")
        compiled = inductor(graph, examples, config_patches=self.options)

        def recorded(*inputs: Any) -> Any:
            outputs = compiled(*inputs)
            self.last = GraphCall(compiled, inputs, outputs)
            return outputs

        return recorded


class GraphCall:
    """A call of a compiled graph, as the compiled function made it.

    Args:
        graph: that was called.
        inputs: it was called with.
        outputs: it returned.
    """

    def __init__(self, graph: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.graph, self.inputs, self.outputs = graph, list(inputs), outputs
        self.places: list[int] = []
        """Of the tensors beside the arguments, when they were captured."""
        self.captured: Callable[..., Any] | None = None
        """:meth:`run` as a CUDA graph, which copies its arguments, and reads all other tensors where they were."""

    def bind(self, leaves: list[Any], results: Any) -> bool:
        """Find the function's arguments among the inputs, and its results among the outputs.

        Args:
            leaves: of the arguments.
            results: of the function.

        Returns:
            Whether the graph's outputs are the results, and each argument is a tensor of its own.
        """
        places = {id(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.arguments = [(at, places[id(one)]) for at, one in enumerate(self.inputs) if id(one) in places]
        """Pairs of the position among the inputs, and among the leaves of the arguments."""
        found, self.structure = tree_flatten(results)
        outputs = {id(output): place for place, output in enumerate(self.outputs)}
        self.results = [outputs.get(id(one), -1) for one in found]
        """Position of each result among the outputs."""
        for at, _ in self.arguments:
            self.inputs[at] = None
        self.outputs = ()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return sorted(self.results) == [*range(len(outputs))] and len(places) == len(tensors)

    def is_like(self, other: "GraphCall") -> bool:
        """Whether both called the same graph with the same tensors, but for the function's arguments."""
        same = [one is two for one, two in zip(self.inputs, other.inputs, strict=False)]
        return self.graph is other.graph and self.arguments == other.arguments and all(same)

    def repeat(self, leaves: list[Any]) -> Any:
        """What the function returns for other arguments."""
        outputs = self.run(*leaves) if self.captured is None else self.captured(*leaves)
        return tree_unflatten([outputs[place] for place in self.results], self.structure)

    def continue_captured(self, before: "GraphCall") -> None:
        """Capture the graph, or take over the capture of a call that was like this one, unless its tensors have moved."""
        places = [tensor.data_ptr() for tensor in self.inputs if isinstance(tensor, Tensor)]
        moved = before.captured is None or places != before.places
        self.captured, self.places = CudaGraphModule(self.run) if moved else before.captured, places

    def run(self, *leaves: Any) -> Any:
        """The graph's outputs, for the leaves of other arguments."""
        inputs = self.inputs.copy()
        for at, place in self.arguments:
            inputs[at] = leaves[place]
        return self.graph(*inputs)


def _leaves(args: Iterable[Any]) -> Iterator[Any]:
    """Tensors and others of nested mappings: torch's own functions for trees take five times as long."""
    for arg in args:
        if isinstance(arg, Mapping):
            yield from _leaves(arg.values())
        else:
            yield arg


def _is_compilers(error: BaseException) -> bool:
    """Whether the compiler raised, by its own errors or by an assertion inside it."""
    frame, place = error.__traceback__, ""
    while frame is not None:
        frame, place = frame.tb_next, frame.tb_frame.f_globals.get("__name__", "")
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in (type(error).__module__, place))


def first_line_of_compiler_error(error: BaseException) -> str:
    """The line of a compiler's error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith((":", "fullgraph=True"))]
    return (telling or lines or [type(error).__name__])[0]


class CudaGraphCache:
    """A function as CUDA graphs, one for each combination of shapes.

    A graph reads parameters where they were when it was captured, so it is captured again when they have moved.

    Args:
        function: to capture.
        module: whose parameters and buffers it reads.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module
        self.places: list[int] = []
        self.graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function returns, copied out of the graph."""
        places = [tensor.data_ptr() for tensor in (*self.module.parameters(), *self.module.buffers())]
        if places != self.places:
            self.places, self.graphs = places, {}
        leaves = tree_leaves(args)
        shapes = tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if shapes not in self.graphs:
            self.graphs[shapes] = CudaGraphModule(self.function)
        # A graph that was captured with cached casts would read the weights as they were converted then.
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return self.graphs[shapes](*args)
        finally:
            torch.set_autocast_cache_enabled(caches)


@cache
def _matmul_pass() -> dict[str, Any]:
    """The rewrite of narrow matrix products; importing the compiler takes a second, so this is made at its first use."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    aten = torch.ops.aten

    def value(node: Any) -> Tensor:
        return node.meta["val"]

    def call(graph: torch.fx.Graph, function: Any, *args: Any) -> torch.fx.Node:
        node = graph.call_function(function, args)
        with value(args[0]).fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
            node.meta["val"] = function(*(value(arg) if isinstance(arg, torch.fx.Node) else arg for arg in args))
        return node

    class TransposeNarrowProducts(CustomGraphPass):
        """Computes ``left @ right`` as ``(right.T @ left.T).T`` where that is faster; this depends on shapes alone."""

        @override
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
                left, right = node.args
                rows, columns = value(node).shape
                if columns >= NARROW or rows < NARROW or value(left).is_contiguous():
                    continue
                with graph.inserting_before(node):
                    transposed = [call(graph, aten.permute.default, one, [1, 0]) for one in (right, left)]
                    product = call(graph, aten.mm.default, *transposed)
                    node.replace_all_uses_with(call(graph, aten.permute.default, product, [1, 0]))
                graph.erase_node(node)

        @override
        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,), str(NARROW))

    return {"post_grad_custom_post_pass": TransposeNarrowProducts()}
