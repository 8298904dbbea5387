"""Functions of tensors as compiled graphs."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

OPTIONS = {"cpp.use_decompose_tanh": True, "cpp_wrapper": True}
"""Of torch's compiler: tanh by exp, which vectorises (five times as fast) and is as exact to 1e-7; and calls between
kernels in C++, since with small networks there are more calls than there is arithmetic."""

NARROW = 16
"""Columns below which a product with a transposed matrix is slow: MKL takes 15 µs for [64, 256] · [256, 4], and 5 µs for
the transposed product, which has the same sums."""

ONEDNN = 1 << 22
"""Multiplications from which oneDNN takes half as long as MKL on processors that are not Intel's, where MKL goes without
AVX-512: [2048, 64] · [64, 64] in 85 instead of 175 µs, while a smaller product gains nothing."""

MAX_SAMPLES = 2048
"""Samples of one graph on a CPU: what is in between stays in its cache, and 8,192 samples in four parts take two thirds
of the time."""


class CompilerError(Exception):
    """torch could not compile a function; nothing was computed."""


def compile_function(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """A function of tensors as one graph for each combination of shapes; on CUDA captured, so that one call launches it.

    Args:
        function: pure, but for tensors of its own that it writes to.
        module: whose parameters it reads.

    Raises:
        CompilerError: from each call, where there is no compiler, or the function is not one graph.
    """
    # Constants of spaces are cached; the compiler sees through that, and says so.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    cuda = next(module.parameters()).is_cuda
    options = {} if cuda else {**OPTIONS, **_matmul_pass()}
    # Models of one process have the same functions: each counts its own graphs.
    graph = torch.compile(  # pyright: ignore[reportCallIssue]
        function, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True, recompile_limit=64
    )
    if cuda:
        graph = CudaGraphCache(graph, module)

    def call(*args: Any) -> Any:
        try:
            return graph(*args)
        except Exception as error:  # the compiler raises whatever its parts raise; errors of user code pass through
            if not _is_compilers(error):
                raise
            raise CompilerError(f"torch could not compile it: {first_line_of_compiler_error(error)}") from error

    return call


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
        return self.graphs[shapes](*args)


@cache
def _matmul_pass() -> dict[str, Any]:
    """The rewrite of matrix products; made when something is compiled, since importing the compiler takes a second."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    aten = torch.ops.aten
    by_onednn = _product() if not _is_intel() and torch.backends.mkldnn.is_available() else None

    def value(node: Any) -> Tensor:
        return node.meta["val"]

    def call(graph: torch.fx.Graph, function: Any, *args: Any) -> torch.fx.Node:
        node = graph.call_function(function, args)
        with value(args[0]).fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
            node.meta["val"] = function(*(value(arg) if isinstance(arg, torch.fx.Node) else arg for arg in args))
        return node

    class MatmulRewrite(CustomGraphPass):
        """Other ways to the same matrix products; which, depends on shapes and processor alone, so that runs repeat."""

        @override
        def __call__(self, graph: torch.fx.Graph) -> None:
            for function in (aten.mm.default, aten.addmm.default):
                for node in list(graph.find_nodes(op="call_function", target=function)):
                    *bias, left, right = node.args
                    with graph.inserting_before(node):
                        product = self._product(graph, left, right)
                        if product is None:
                            continue
                        if bias:
                            product = call(graph, aten.add.Tensor, product, bias[0])
                    node.replace_all_uses_with(product)
                    graph.erase_node(node)

        def _product(self, graph: torch.fx.Graph, left: Any, right: Any) -> torch.fx.Node | None:
            (rows, inner), columns = value(left).shape, value(right).shape[1]
            if value(left).dtype != torch.float32:
                return None
            if columns < NARROW <= rows and not value(left).is_contiguous():
                turned = [call(graph, aten.permute.default, one, [1, 0]) for one in (right, left)]
                return call(graph, aten.permute.default, call(graph, aten.mm.default, *turned), [1, 0])
            large = rows * inner * columns >= ONEDNN and min(inner, columns) >= NARROW
            if by_onednn is not None and large and value(left).is_contiguous():
                return call(graph, by_onednn, left, right)
            return None

        @override
        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,), str(by_onednn))

    return {"post_grad_custom_post_pass": MatmulRewrite()}


@cache
def _product() -> Any:
    """The product of two matrices by oneDNN, which torch itself asks for constant matrices alone."""
    library = torch.library.Library("ppo_lightning", "DEF")
    library.define("product(Tensor left, Tensor right) -> Tensor")

    def product(left: Tensor, right: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")

    library.impl("product", product, "CPU")
    torch.library.register_fake(
        "ppo_lightning::product", lambda left, right: left.new_empty(left.shape[0], right.shape[1]), lib=library
    )
    _libraries.append(library)
    return torch.ops.ppo_lightning.product.default


_libraries: list[Any] = []
"""A library's operators live as long as it does."""


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # or unknown: torch's own choice
