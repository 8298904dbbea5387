"""The gradient step as one compiled graph: what a small minibatch costs is dispatch, not arithmetic."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ppo_lightning.loss import KL, PPOLoss, normalized
from ppo_lightning.policy import Policy
from ppo_lightning.policy.actor_critic import ExplorationHead, GaussianHead
from ppo_lightning.ranks import Cuts
from ppo_lightning.spaces import cut, rows_of

OPTIONS = {"cpp.use_decompose_tanh": True, "cpp_wrapper": True}
"""Of torch's compiler: tanh by exp, which vectorises (five times as fast) and is as exact to 1e-7; and calls between
kernels in C++, since with small networks there are more calls than there is arithmetic."""

NARROW = 16
"""Columns below which a product with a transposed matrix is slow: MKL takes 15 µs for [64, 256] · [256, 4], and 5 µs for
the transposed product, which has the same sums."""

ONEDNN = 1 << 22
"""Multiplications from which oneDNN takes half as long as MKL on processors that are not Intel's, where MKL goes without
AVX-512: [2048, 64] · [64, 64] in 85 instead of 175 µs, while a smaller product gains nothing."""

ROWS = 2048
"""Samples of one graph on a CPU: what is in between stays in its cache, and 8,192 samples in four parts take two thirds
of the time."""

HYPER = (
    "lr", "step_size", "bias_correction", "first_decay", "second_decay", "clip_range", "ent_coef", "share"
)  # fmt: skip
"""What changes between minibatches, in one row of numbers, so that no change compiles anything anew."""


class CompilerError(Exception):
    """torch could not compile a function; nothing was computed."""


def compiled(function: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    """A function of tensors as one graph for each combination of shapes; on CUDA captured, so that one call launches it.

    Args:
        function: pure, but for tensors of its own that it writes to.
        policy: whose parameters it reads.

    Raises:
        CompilerError: from each call, where there is no compiler, or the function is not one graph.
    """
    # Constants of spaces are cached; the compiler sees through that, and says so.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    cuda = next(policy.parameters()).is_cuda
    options = {} if cuda else {**OPTIONS, **_passes()}
    # Models of one process have the same functions: each counts its own graphs.
    graph = torch.compile(  # pyright: ignore[reportCallIssue]
        function, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True, recompile_limit=64
    )
    if cuda:
        graph = Captured(graph, policy)

    def call(*args: Any) -> Any:
        try:
            return graph(*args)
        except Exception as error:  # the compiler raises whatever its parts raise; everybody else's passes through
            if not _is_compilers(error):
                raise
            raise CompilerError(f"torch could not compile it: {_gist(error)}") from error

    return call


def _is_compilers(error: BaseException) -> bool:
    """Whether the compiler raised, by its own errors or by an assertion inside it."""
    frame, place = error.__traceback__, ""
    while frame is not None:
        frame, place = frame.tb_next, frame.tb_frame.f_globals.get("__name__", "")
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in (type(error).__module__, place))


def _gist(error: BaseException) -> str:
    """The line of a compiler's error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.endswith((":", "fullgraph=True"))]
    return (telling or lines or [type(error).__name__])[0]


class Captured:
    """A function as CUDA graphs, one for each combination of shapes.

    A graph reads parameters where they were when it was captured, so it is captured anew when they have moved.

    Args:
        function: to capture.
        policy: whose parameters and buffers it reads.
    """

    def __init__(self, function: Callable[..., Any], policy: Policy) -> None:
        self.function, self.policy = function, policy
        self.places: list[int] = []
        self.graphs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function returns, copied out of the graph."""
        places = [tensor.data_ptr() for tensor in (*self.policy.parameters(), *self.policy.buffers())]
        if places != self.places:
            self.places, self.graphs = places, {}
        leaves = tree_leaves(args)
        shapes = tuple(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if shapes not in self.graphs:
            self.graphs[shapes] = CudaGraphModule(self.function)
        return self.graphs[shapes](*args)


@cache
def _passes() -> dict[str, Any]:
    """What we change in graphs; made when something is compiled, since importing the compiler takes a second."""
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

    class Products(CustomGraphPass):
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

    return {"post_grad_custom_post_pass": Products()}


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
    _kept.append(library)
    return torch.ops.ppo_lightning.product.default


_kept: list[Any] = []
"""A library's operators live as long as it does."""


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # or unknown: torch's own choice


def why_not(policy: Policy, optimizer: torch.optim.Optimizer, precision: str) -> str | None:
    """What keeps the update from being compiled, in a few words; None where nothing does."""
    if policy.state_size:
        return "the policy has memory"
    if precision == "16-mixed":
        return "precision 16-mixed scales gradients"
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"the optimizer is {type(optimizer).__name__}, not Adam or AdamW"
    if len(optimizer.param_groups) > 1:
        return "the optimizer has several parameter groups"
    group, learnt = optimizer.param_groups[0], [one for one in policy.parameters() if one.requires_grad]
    if group["amsgrad"] or group["maximize"]:
        return "the optimizer uses amsgrad or maximize"
    if not set(learnt) <= set(group["params"]):
        return "the optimizer has not all of the policy's parameters"
    if any(one.requires_grad for one in set(group["params"]) - set(policy.parameters())):
        return "the optimizer has parameters beside the policy's"
    if len({one.dtype for one in learnt}) != 1:
        return "the policy's parameters have several dtypes, or all are frozen"
    if any(one._backward_hooks or one._post_accumulate_grad_hooks for one in learnt):
        return "parameters have hooks on their gradients"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks on its steps"
    if any(isinstance(module, GaussianHead) and module.log_std is None for module in policy.modules()):
        return "the standard deviation is an output of the network"
    return None


class _Evaluate(nn.Module):
    """The policy's evaluation under the name by which torch calls modules with other parameters."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return self.policy.evaluate(batch)


class CompiledUpdate:
    """Forward, backward, clipping and Adam on parameters that lie behind one another in memory.

    The parameters of the policy, and Adam's moments in the optimiser's own state, become views of flat tensors, so that
    checkpoints, acting and evaluation see what they always saw. In one process without ``target_kl`` all is one graph;
    else a step and the next minibatch's gradient are one, and between two of these the flat gradient is reduced and the
    divergence looked at.

    Args:
        policy: whose parameters are learnt.
        optimizer: Adam or AdamW with one parameter group; its numbers are read at each update.
        max_grad_norm: as in :class:`PPO`.
    """

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.evaluate = _Evaluate(policy)
        self.max_grad_norm = max_grad_norm
        self.decoupled = isinstance(optimizer, torch.optim.AdamW)
        self.shapes: dict[str, torch.Size] = {}
        self.flat = self.moments = torch.zeros(0)
        self.steps: list[Tensor] = []
        self.bounds = {
            f"{name}.log_std": (module.low, module.high)
            for name, module in self.evaluate.named_modules()
            if isinstance(module, GaussianHead | ExplorationHead)
        }
        """Of log standard deviations: beyond them gradients pull back alone."""
        own = [parameter for module in policy.modules() for parameter in module._parameters.values()]
        # One parameter in two modules; of one module under two names torch would refuse to tie the weights.
        self.tied = len([one for one in own if one is not None]) > len(list(policy.parameters()))
        self.halves = torch.zeros(0)
        self._lay_out(self._learnt())
        self._make_graphs()

    def _learnt(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.evaluate.named_parameters() if parameter.requires_grad}

    def _make_graphs(self) -> None:
        # What graphs write to is no argument of theirs: a captured one copies its arguments.
        flat, moments, policy = self.flat, self.moments, self.policy
        self._gradient_of = compiled(lambda *batch: self._gradient(flat, *batch), policy)
        self._step_by = compiled(lambda gradient, hyper: self._step(flat, moments, gradient, hyper), policy)
        self._whole_of = compiled(lambda *batch: self._whole(flat, moments, *batch), policy)
        self._next_of = compiled(lambda *both: self._next(flat, moments, *both), policy)

    # --- the graphs ---------------------------------------------------------------------------------------------------

    def _gradient(
        self, flat: Tensor, samples: Mapping[str, Any], rows: Tensor, valid: Tensor | None, hyper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flat gradient [P] and loss terms [7] of the samples that ``rows`` [B] names, times their share."""
        at = dict(zip(HYPER, hyper.unbind(), strict=True))
        batch = {**_rows(samples, rows), "valid": valid}
        loss = replace(self.loss, clip_range=at["clip_range"], ent_coef=at["ent_coef"])  # numbers of this graph

        def score(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            call = partial(functional_call, self.evaluate, parameters, tie_weights=self.tied)
            terms = loss(batch, lambda given: call((given,)))
            return terms.loss * at["share"], torch.stack([term.detach() for term in terms]) * at["share"]

        parameters = self._parameters(flat)
        gradients, (_, terms) = grad_and_value(score, has_aux=True)(parameters)
        for name in self.bounds.keys() & gradients.keys():
            value, gradient, (low, high) = parameters[name], gradients[name], self.bounds[name]
            outward = ((value > high) & (gradient < 0)) | ((value < low) & (gradient > 0))
            gradients[name] = gradient.masked_fill(outward, 0.0)
        return torch.cat([gradients[name].flatten() for name in self.shapes]), terms

    def _parameters(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _step(self, flat: Tensor, moments: Tensor, gradient: Tensor, hyper: Tensor) -> Tensor:
        """Clip, and step by Adam (Kingma & Ba 2015), in place; not where the norm is not finite.

        Returns:
            [3] norms before clipping: of the gradient, and of its halves for the action and the value.
        """
        eps, decay = self.adam
        at = dict(zip(HYPER, hyper.unbind(), strict=True))
        first_decay, second_decay = at["first_decay"], at["second_decay"]
        norm = gradient.norm()
        norms = torch.cat([norm[None], (self.halves * gradient.square()).sum(1).sqrt()])
        if self.max_grad_norm is not None:
            gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        parameter, finite = flat, norm.isfinite()
        if decay and self.decoupled:
            parameter = parameter * (1 - at["lr"] * decay)
        elif decay:
            gradient = gradient + decay * parameter
        first = moments[0].lerp(gradient, 1 - first_decay)
        second = moments[1] * second_decay + gradient.square() * (1 - second_decay)
        parameter = parameter - at["step_size"] * first / (second.sqrt() / at["bias_correction"] + eps)
        flat.copy_(torch.where(finite, parameter, flat))
        moments.copy_(torch.where(finite, torch.stack([first, second]), moments))
        return norms

    def _whole(
        self,
        flat: Tensor,
        moments: Tensor,
        samples: Mapping[str, Any],
        rows: Tensor,
        valid: Tensor | None,
        hyper: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gradient, terms = self._gradient(flat, samples, rows, valid, hyper)
        return self._step(flat, moments, gradient, hyper), terms

    def _next(self, flat: Tensor, moments: Tensor, gradient: Tensor, hyper: Tensor, *batch: Any) -> tuple[Tensor, ...]:
        norms = self._step(flat, moments, gradient, hyper)
        return norms, *self._gradient(flat, *batch)

    # --- around them --------------------------------------------------------------------------------------------------

    def run(
        self,
        samples: Mapping[str, Any],
        valid: Tensor,
        loss: PPOLoss,
        cuts: Cuts,
        *,
        chunks: int,
        target_kl: float | None,
        world_size: int,
        add_up: Callable[[Tensor], Any],
    ) -> "Passes":
        """Epochs of shuffled minibatches, the same as :meth:`PPO.update` makes.

        Shapes are fixed: where a NEXT_STEP vector leaves a varying number of valid rows, minibatches are filled up with
        rows that do not count.

        Args:
            samples: [S, …] all rows of a rollout by name.
            valid: [S] bool, those that are environment steps.
            loss: of this iteration.
            cuts: of the valid rows into minibatches.
            chunks: parts of each minibatch, at least.
            target_kl: end where the divergence exceeds 1.5 times this.
            world_size: processes whose gradients are averaged.
            add_up: replaces a tensor by its sum over them.

        Raises:
            CompilerError: torch cannot compile it; :meth:`restore` takes back steps that were taken.
        """
        device = valid.device
        names = None if bool(valid.all()) else valid.nonzero().flatten()
        num_minibatches = len(cuts.sizes)
        most = cut(len(valid), num_minibatches)[0]
        if device.type == "cpu":
            chunks = max(chunks, -(-most // ROWS))
        whole = chunks == world_size == 1 and target_kl is None
        self.normalizes = loss.normalize_advantage
        if chunks > 1:
            loss = replace(loss, normalize_advantage=False)
        hypers = self._begin(loss, [weight for weights in cuts.weights for weight in weights]).unbind()
        advantage = samples["advantage"]
        self._before = self.flat.clone(), self.moments.clone(), *(step.clone() for step in self.steps)
        tables: list[Tensor] = []
        norms: list[Tensor] = []
        stopped, first_kl = False, torch.zeros(1)
        agreed: tuple[Tensor, Tensor] | None = None  # gradient and numbers of a step that is to be taken
        for epoch, order in enumerate(cuts.orders.to(device)):
            if cuts.moments is not None:
                own = slice(None) if names is None else names
                normal = advantage.clone()
                normal[own] = cuts.advantage(advantage[own], epoch)
                samples = {**samples, "advantage": normal}
            order = order if names is None else names[order]
            for rows, weight in zip(order.split(cuts.sizes), cuts.weights[epoch], strict=True):
                hyper, counts = hypers[len(tables)], None
                if names is not None:
                    counts = torch.arange(most, device=device) < len(rows)
                    rows = torch.cat([rows, rows[:1].expand(most - len(rows))])
                if whole:
                    of_step, table = self._whole_of(samples, rows, counts, hyper)
                    norms.append(of_step)
                    tables.append(table)
                else:
                    if agreed is None:
                        gradient, table = self._gradient_in(chunks, samples, rows, counts, hyper, weight)
                    elif chunks > 1:
                        norms.append(self._step_by(*agreed))
                        gradient, table = self._gradient_in(chunks, samples, rows, counts, hyper, weight)
                    else:
                        of_step, gradient, table = self._next_of(*agreed, samples, rows, counts, hyper)
                        norms.append(of_step)
                    tables.append(table)
                    kl = table[KL : KL + 1]
                    if world_size > 1:
                        # The divergence rides on the gradient's reduction, so that all processes decide alike.
                        packed = gradient if target_kl is None else torch.cat([gradient, kl])
                        add_up(packed)
                        packed.div_(world_size)
                        gradient, kl = packed[: len(gradient)], kl if target_kl is None else packed[-1:]
                    if target_kl is not None and len(tables) == 1:
                        first_kl = kl
                    stopped = target_kl is not None and not kl.item() <= 1.5 * target_kl
                    agreed = None if stopped else (gradient, hyper)
                    if stopped:
                        break
            if stopped:
                break
        if agreed is not None:
            norms.append(self._step_by(*agreed))
        taken = torch.stack(norms) if norms else torch.zeros(0, 3)
        count = int(taken[:, 0].isfinite().sum())
        torch._foreach_add_(self.steps, count)  # pyright: ignore[reportPrivateImportUsage]
        begun = -(-len(tables) // num_minibatches)
        finite = bool(taken[:, 0].isfinite().all() & first_kl.isfinite().all())
        return Passes(torch.stack(tables), taken, begun, len(tables) - (begun - 1) * num_minibatches, finite)

    def restore(self) -> None:
        """Put parameters, moments and counts back to where the last update began."""
        for now, before in zip((self.flat, self.moments, *self.steps), self._before, strict=True):
            now.copy_(before)

    def _gradient_in(
        self, chunks: int, samples: Mapping[str, Any], rows: Tensor, valid: Tensor | None, hyper: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Flat gradient [P] and loss terms [7] of a minibatch, added up over its parts."""
        if chunks == 1:
            return self._gradient_of(samples, rows, valid, hyper)
        if self.normalizes:  # by the moments of the whole minibatch
            advantage = samples["advantage"].clone()
            advantage[rows] = normalized(advantage[rows], valid)
            samples = {**samples, "advantage": advantage}
        total = len(rows) if valid is None else int(valid.sum())
        sizes = cut(len(rows), min(chunks, len(rows)))
        sums: list[Tensor] = []
        for part, own in zip(
            rows.split(sizes), [None] * len(sizes) if valid is None else valid.split(sizes), strict=True
        ):
            hyper[-1] = weight * (len(part) if own is None else int(own.sum())) / total
            both = self._gradient_of(samples, part, own, hyper)
            sums = [have.add_(more) for have, more in zip(sums, both, strict=True)] if sums else list(both)
        return sums[0], sums[1]

    def _begin(self, loss: PPOLoss, shares: list[float]) -> Tensor:
        """Prepare an update: a row of :data:`HYPER` for each of its minibatches, whose ``shares`` are given.

        Parameters and moments are laid out flat, unless they are so already: a checkpoint or a move may have come between.
        """
        self.loss = loss
        group = self.optimizer.param_groups[0]
        self.adam = float(group["eps"]), float(group["weight_decay"])
        learnt = self._learnt()
        if not self._is_flat(learnt):
            self._lay_out(learnt)
            self._make_graphs()
        lr, taken = float(group["lr"]), int(self.steps[0])
        first_decay, second_decay = map(float, group["betas"])
        constants = first_decay, second_decay, loss.clip_range, loss.ent_coef
        rows = [
            (lr, lr / (1 - first_decay**step), (1 - second_decay**step) ** 0.5, *constants, share)
            for step, share in enumerate(shares, start=taken + 1)
        ]
        return torch.tensor(rows, device=self.flat.device)

    def _is_flat(self, learnt: dict[str, nn.Parameter]) -> bool:
        if list(learnt) != list(self.shapes):
            return False
        place = 0
        for parameter in learnt.values():
            moments = self.optimizer.state[parameter]
            here = self.flat.data_ptr() + place, self.moments.data_ptr() + place
            if "exp_avg" not in moments or here != (parameter.data_ptr(), moments["exp_avg"].data_ptr()):
                return False
            place += parameter.numel() * parameter.element_size()
        return True

    def _lay_out(self, learnt: dict[str, nn.Parameter]) -> None:
        taken = {float(self.optimizer.state[parameter].get("step", 0.0)) for parameter in learnt.values()}
        if len(taken) > 1:
            raise CompilerError("some parameters have taken more steps than others")
        self.shapes = {name: parameter.shape for name, parameter in learnt.items()}
        self.flat = torch.cat([parameter.detach().flatten() for parameter in learnt.values()])
        self.moments = self.flat.new_zeros(2, len(self.flat))
        places = [index for index, one in enumerate(self.policy.parameters()) if one.requires_grad]
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()])
        self.halves = self.policy.halves[:, places].repeat_interleave(sizes, 1).to(self.flat)
        """[2, P] 1 where a number belongs to the action's half, to the value's half."""
        fused, self.steps, begin = self.optimizer.param_groups[0]["fused"], [], 0
        for parameter in learnt.values():
            part, own = slice(begin, begin + parameter.numel()), self.optimizer.state[parameter]
            parameter.data = self.flat[part].view(parameter.shape)
            for row, key in zip(self.moments, ("exp_avg", "exp_avg_sq"), strict=True):
                if key in own:
                    row[part] = own[key].flatten()
                own[key] = row[part].view(parameter.shape)
            device = parameter.device if fused else "cpu"  # where torch itself keeps it
            own["step"] = torch.as_tensor(own.get("step", 0.0), dtype=torch.float32).to(device, copy=True)
            self.steps.append(own["step"])
            begin = part.stop


class Passes(NamedTuple):
    """What the passes of an update did."""

    terms: Tensor
    """[M, 7] :class:`LossTerms` of every minibatch, in order."""
    norms: Tensor
    """[K, 3] as of :class:`Update`; a step whose norm is not finite was not taken."""
    epochs: int
    """Passes that were begun."""
    minibatches: int
    """Minibatches of the last pass."""
    finite: bool
    """All steps were, and so was the first divergence; of all processes alike."""


def _rows(tree: Any, rows: Tensor) -> Any:
    if isinstance(tree, Mapping):
        return {name: _rows(part, rows) for name, part in tree.items()}
    return rows_of(tree, rows)
