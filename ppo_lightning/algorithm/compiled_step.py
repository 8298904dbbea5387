"""The gradient step as one compiled graph: a small minibatch spends its time on dispatch, not on arithmetic."""

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from typing_extensions import override

from ppo_lightning.algorithm.loss import LossCoefficients, Objective, normalize_advantages
from ppo_lightning.algorithm.minibatches import MinibatchPlan, Samples, index_samples
from ppo_lightning.algorithm.optimizer_step import Backend, StepRecord, UpdateSettings
from ppo_lightning.compiler import MAX_SAMPLES, CompiledFunction, CompilerError
from ppo_lightning.spaces import split_sizes

STEP_SCALARS = (
    "lr", "step_size", "bias_correction", "first_decay", "second_decay", "clip_range", "ent_coef", "loss_weight"
)  # fmt: skip
"""Scalars that change between minibatches, as one tensor: a change does not recompile."""


class NonFiniteError(Exception):
    """A gradient or divergence of a compiled update is not finite: the update is repeated eagerly."""


def unsupported_reason(objective: Objective, optimizer: torch.optim.Optimizer, precision: str) -> str | None:
    """What keeps the update from being compiled, in a few words; None where nothing does."""
    policy, group = objective.policy, optimizer.param_groups[0]
    trained = [one for one in objective.parameters() if one.requires_grad]
    if policy.state_size:
        return "the policy is recurrent"
    if precision == "16-mixed":
        return "precision 16-mixed scales gradients"
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"the optimizer is {type(optimizer).__name__}, not Adam or AdamW"
    if len(optimizer.param_groups) > 1:
        return "the optimizer has several parameter groups"
    if group["amsgrad"] or group["maximize"]:
        return "the optimizer uses amsgrad or maximize"
    if not set(trained) <= set(group["params"]):
        return "the optimizer does not have all parameters of policy and loss"
    if any(one.requires_grad for one in set(group["params"]) - set(objective.parameters())):
        return "the optimizer has parameters beside those of policy and loss"
    if len({one.dtype for one in trained}) != 1:
        return "the parameters have several dtypes, or all are frozen"
    if any(one._backward_hooks or one._post_accumulate_grad_hooks for one in trained):
        return "parameters have hooks on their gradients"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer has hooks on its steps"
    return None


class CompiledMinibatch(NamedTuple):
    """A minibatch that a graph selects from the samples."""

    samples: Mapping[str, Any]
    rows: Tensor
    """[B] its samples."""
    valid: Tensor | None
    """[B] bool, False for padding; None where there is none."""
    scalars: Tensor
    """:data:`STEP_SCALARS`."""
    weight: float
    """In the loss."""


class RecordedKeys(UserDict[str, Any]):
    """Samples that record which of their keys are read: each tensor that a graph does not take saves two microseconds."""

    def __init__(self, samples: Mapping[str, Any]) -> None:
        super().__init__(samples)
        self.keys_read: set[str] = set()

    @override
    def __getitem__(self, name: str) -> Any:
        self.keys_read.add(name)
        return super().__getitem__(name)

    @override
    def __contains__(self, name: object) -> bool:
        self.keys_read.add(str(name))
        return super().__contains__(name)

    @override
    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict; an absent key may come later, and is recorded too."""
        return self[name] if name in self else default  # noqa: SIM401 - this is what `get` does


class CompiledStep:
    """Forward, backward, clipping and Adam on parameters that are contiguous in memory.

    Parameters, and Adam's moments in the optimizer's own state, become views of flat tensors, so that checkpoints, acting
    and evaluation are unaffected. Where nothing happens between a gradient and its step (one rank, no
    ``target_kl``, no accumulation) both are one graph.

    Args:
        objective: that is minimised.
        optimizer: Adam or AdamW with one parameter group; its hyperparameters are read at each update.
        backend: averages over ranks.
        world_size: ranks.
        max_grad_norm: as in :class:`PPO`.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        backend: Backend,
        world_size: int,
        max_grad_norm: float | None,
    ) -> None:
        self.objective, self.optimizer, self.backend, self.world_size = objective, optimizer, backend, world_size
        self.max_grad_norm = max_grad_norm
        self.decoupled = bool(optimizer.param_groups[0]["decoupled_weight_decay"])
        self.names: tuple[str, ...] | None = None
        """Of the scalars that the loss returns; None before its first call."""
        self._given: LossCoefficients | None = None
        self.coefficients = LossCoefficients()
        """Of this update, but for those that are scheduled, which are 0."""
        self.scheduled: tuple[str, ...] = ()
        """Names of the coefficients that have changed, or will."""
        self.keys: set[str] = set()
        """Keys of the samples that the loss reads."""
        self._before: tuple[Tensor, ...] | None = None
        """Parameters, moments and step counts before this update; None until it has begun."""
        self.shapes: dict[str, torch.Size] = {}
        self.flat = self.moments = self.masks = torch.zeros(0)
        self.steps: list[Tensor] = []
        own = [parameter for module in objective.modules() for parameter in module._parameters.values()]
        # One parameter in two modules; of one module under two names torch would refuse to tie the weights.
        self.tied = len([one for one in own if one is not None]) > len(list(objective.parameters()))
        self._flatten_parameters(self._trained())
        self._make_graphs()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.objective.named_parameters() if parameter.requires_grad}

    def _make_graphs(self) -> None:
        # What graphs write to is not an argument: a captured graph copies its arguments.
        flat, moments, module = self.flat, self.moments, self.objective
        self.gradient_graph = CompiledFunction(lambda *batch: self._gradient(flat, *batch), module)
        self.step_graph = CompiledFunction(lambda gradient, row: self._step(flat, moments, gradient, row), module)
        self.fused_graph = CompiledFunction(lambda *batch: self._fused_step(flat, moments, *batch), module)
        self.functions = self.gradient_graph, self.step_graph, self.fused_graph

    # --- the graphs ---------------------------------------------------------------------------------------------------

    def _gradient(
        self, flat: Tensor, samples: Mapping[str, Any], index: Tensor, valid: Tensor | None, scalars: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flat gradient [P] and scalars [K] of the samples that ``index`` [B] selects, times their weight."""
        at = dict(zip(STEP_SCALARS, scalars.unbind(), strict=True))
        batch = index_samples(samples, index)
        if valid is not None:
            batch["valid"] = valid
        if self.normalizes:
            batch["advantage"] = normalize_advantages(batch["advantage"], valid)
        scheduled: dict[str, Any] = {name: value for name, value in at.items() if name in self.scheduled}
        coefficients = replace(self.coefficients, **scheduled)

        def score(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses = functional_call(self.objective, parameters, (batch, coefficients), tie_weights=self.tied)
            weight = at["loss_weight"]
            return losses["loss"] * weight, torch.stack([value.detach() for value in losses.values()]) * weight

        parameters = self._parameters(flat)
        gradients, (_, losses) = grad_and_value(score, has_aux=True)(parameters)
        return torch.cat([gradients[name].flatten() for name in self.shapes]), losses

    def _parameters(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _step(self, flat: Tensor, moments: Tensor, gradient: Tensor, scalars: Tensor) -> Tensor:
        """Clip, and step by Adam (Kingma & Ba 2015), in place; not where the norm is not finite.

        Returns:
            [3] norms before clipping: of the gradient, and of the parameters for the action and for the value.
        """
        eps, decay = self.adam
        at = dict(zip(STEP_SCALARS, scalars.unbind(), strict=True))
        first_decay, second_decay = at["first_decay"], at["second_decay"]
        norm = gradient.norm()
        norms = torch.cat([norm[None], (self.masks * gradient.square()).sum(1).sqrt()])
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

    def _fused_step(self, flat: Tensor, moments: Tensor, *batch: Any) -> tuple[Tensor, Tensor]:
        gradient, losses = self._gradient(flat, *batch)
        return self._step(flat, moments, gradient, batch[-1]), losses

    # --- the interface of a gradient step -----------------------------------------------------------------------------

    def begin(self, samples: Samples, plan: MinibatchPlan, settings: UpdateSettings) -> None:
        """Prepare an update.

        Shapes are fixed: where a NEXT_STEP vector leaves a varying number of valid samples, minibatches are padded with
        samples that do not count.
        """
        self.settings, self._before = settings, None
        # A coefficient that changes is a tensor, so that a change does not recompile; others are Python numbers.
        before, self.coefficients = self._given, settings.coefficients
        self._given = settings.coefficients
        for name in ("clip_range", "ent_coef"):
            changed = before is not None and getattr(before, name) != getattr(self.coefficients, name)
            if (changed or name in settings.scheduled) and name not in self.scheduled:
                self.scheduled = (*self.scheduled, name)
        self.coefficients = replace(self.coefficients, **dict.fromkeys(self.scheduled, 0.0))
        valid = samples.get("valid")
        self.valid = None if valid is None else valid.nonzero().flatten()
        self._set_samples(samples, plan)
        self.device = samples["advantage"].device
        self.size = split_sizes(len(samples["advantage"]), len(plan.sizes))[0]
        self.num_microbatches = settings.gradient_accumulation_steps
        if self.device.type == "cpu":
            self.num_microbatches = max(self.num_microbatches, -(-self.size // MAX_SAMPLES))
        self.is_fused = self.num_microbatches == self.world_size == 1 and settings.target_kl is None
        self.normalizes = settings.normalize_advantage and self.num_microbatches == 1
        group = self.optimizer.param_groups[0]
        self.adam = float(group["eps"]), float(group["weight_decay"])
        trained = self._trained()
        if not self._is_flat(trained):  # since a checkpoint was loaded, or the module moved
            self._flatten_parameters(trained)
            self._make_graphs()
        for function in self.functions:
            function.check_again()
        self.scalars = iter(self._scalars([weight for weights in plan.loss_weights for weight in weights]).unbind())
        self._before = self.flat.clone(), self.moments.clone(), *(step.clone() for step in self.steps)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.computed: tuple[Tensor, Tensor] | None = None
        """Gradient and scalars of a minibatch whose step is not taken yet."""
        if self.names is None:
            self._find_names()
            self._set_samples(samples, plan)

    def _set_samples(self, samples: Samples, plan: MinibatchPlan) -> None:
        keys = (self.keys or set(samples)) - {"valid"}
        self.samples, self.plan = {name: leaf for name, leaf in samples.items() if name in keys}, plan

    def recompute(self, samples: Callable[[], tuple[Samples, MinibatchPlan]]) -> None:
        """Continue, between two epochs, with samples and a plan that the present policy computes."""
        self._set_samples(*samples())
        for function in self.functions:
            function.check_again()

    def _find_names(self) -> None:
        """Call the loss once, eagerly, for the names of its scalars and the keys that it reads; buffers keep their values."""
        index = (
            torch.arange(len(self.samples["advantage"]), device=self.device) if self.valid is None else self.valid
        )[: -(-self.size // self.num_microbatches)]
        recorded = RecordedKeys(index_samples(self.samples, index))
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        with torch.no_grad(), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.names = tuple(self.objective(recorded, self.settings.coefficients))
            for buffer, before in buffers:
                buffer.copy_(before)
        self.keys = recorded.keys_read | {"advantage"}
        if self.settings.target_kl is not None and "approx_kl" not in self.names:
            raise CompilerError("the loss does not evaluate the minibatch")

    def try_gradient(self) -> None:
        """Compile the gradient of the first minibatch, and compute it; nothing is changed.

        Raises:
            CompilerError: torch cannot compile it.
        """
        self._accumulate_gradient(next(self.minibatches(0)))

    def minibatches(self, epoch: int) -> Iterator[CompiledMinibatch]:
        """The minibatches of an epoch."""
        samples, plan, valid = self.samples, self.plan, self.valid
        if plan.moments is not None:
            advantage = samples["advantage"].clone()
            own = slice(None) if valid is None else valid
            advantage[own] = plan.normalized_advantage(advantage[own], epoch)
            samples = {**samples, "advantage": advantage}
        permutation = plan.permutations[epoch].to(self.device)
        permutation = permutation if valid is None else valid[permutation]
        for index, weight in zip(permutation.split(plan.sizes), plan.loss_weights[epoch], strict=True):
            counts = None
            if valid is not None:
                counts = torch.arange(self.size, device=self.device) < len(index)
                index = torch.cat([index, index[:1].expand(self.size - len(index))])
            yield CompiledMinibatch(samples, index, counts, next(self.scalars), weight)

    def gradient(self, minibatch: CompiledMinibatch) -> Tensor | None:
        """Compute the gradient of a minibatch, and take its step where both are one graph; its divergence for ``target_kl``.

        Raises:
            CompilerError: torch cannot compile it; :meth:`restore` takes back steps that were taken.
        """
        if self.is_fused:
            norms, losses = self.fused_graph.repeat(*minibatch[:4])
            self.norms.append(norms)
            self.losses.append(losses)
            return None
        gradient, losses = self._accumulate_gradient(minibatch)
        self.losses.append(losses)
        kl = None
        if self.settings.target_kl is not None:
            assert self.names is not None
            position = self.names.index("approx_kl")
            kl = losses[position : position + 1]
        if self.world_size > 1:
            # The divergence is reduced together with the gradient.
            packed = gradient if kl is None else torch.cat([gradient, kl])
            self.backend.all_reduce(packed)
            gradient, kl = packed[: len(gradient)], kl if kl is None else packed[-1:]
        self.computed = gradient, minibatch.scalars
        return kl

    def apply(self) -> None:
        """Take the step of the last gradient."""
        if self.computed is not None:
            self.norms.append(self.step_graph.repeat(*self.computed))
            self.computed = None

    def non_finite(self, value: float) -> None:
        """The first divergence is not finite.

        Raises:
            NonFiniteError: always.
        """
        raise NonFiniteError

    def end(self) -> StepRecord:
        """Count the steps.

        Raises:
            NonFiniteError: a gradient was not finite.
        """
        assert self.names is not None
        norms = torch.stack(self.norms) if self.norms else torch.zeros(0, 3)
        if not norms[:, 0].isfinite().all():
            raise NonFiniteError
        torch._foreach_add_(self.steps, len(norms))  # pyright: ignore[reportPrivateImportUsage]
        return self.names, torch.stack(self.losses), norms

    def restore(self) -> None:
        """Undo the steps of this update, if it has begun."""
        if self._before is None:
            return
        for now, before in zip((self.flat, self.moments, *self.steps), self._before, strict=True):
            now.copy_(before)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _accumulate_gradient(self, minibatch: CompiledMinibatch) -> tuple[Tensor, Tensor]:
        """Flat gradient [P] and scalars [K] of a minibatch, accumulated over its parts."""
        samples, index, valid, scalars, weight = minibatch
        if self.num_microbatches == 1:
            return self.gradient_graph.repeat(samples, index, valid, scalars)
        if self.settings.normalize_advantage:  # by the moments of the whole minibatch
            advantage = samples["advantage"].clone()
            advantage[index] = normalize_advantages(advantage[index], valid)
            samples = {**samples, "advantage": advantage}
        total = len(index) if valid is None else int(valid.sum())
        sizes = split_sizes(len(index), min(self.num_microbatches, len(index)))
        counts = [None] * len(sizes) if valid is None else valid.split(sizes)
        sums: list[Tensor] = []
        for part, own in zip(index.split(sizes), counts, strict=True):
            scalars[-1] = weight * (len(part) if own is None else int(own.sum())) / total
            both = self.gradient_graph.repeat(samples, part, own, scalars)
            sums = [have.add_(more) for have, more in zip(sums, both, strict=True)] if sums else list(both)
        return sums[0], sums[1]

    def _scalars(self, weights: list[float]) -> Tensor:
        """A row of :data:`STEP_SCALARS` for each minibatch of an update, whose ``weights`` in the loss are given."""
        group, coefficients = self.optimizer.param_groups[0], self.settings.coefficients
        lr, taken = float(group["lr"]), int(self.steps[0])
        first_decay, second_decay = map(float, group["betas"])
        constants = first_decay, second_decay, coefficients.clip_range, coefficients.ent_coef
        rows = [
            (lr, lr / (1 - first_decay**step), (1 - second_decay**step) ** 0.5, *constants, weight)
            for step, weight in enumerate(weights, start=taken + 1)
        ]
        return torch.tensor(rows, device=self.flat.device)

    def _is_flat(self, trained: dict[str, nn.Parameter]) -> bool:
        if list(trained) != list(self.shapes):
            return False
        offset = 0
        for parameter in trained.values():
            moments = self.optimizer.state[parameter]
            here = self.flat.data_ptr() + offset, self.moments.data_ptr() + offset
            if "exp_avg" not in moments or here != (parameter.data_ptr(), moments["exp_avg"].data_ptr()):
                return False
            offset += parameter.numel() * parameter.element_size()
        return True

    def _flatten_parameters(self, trained: dict[str, nn.Parameter]) -> None:
        taken = {float(self.optimizer.state[parameter].get("step", 0.0)) for parameter in trained.values()}
        if len(taken) > 1:
            raise CompilerError("some parameters have taken more steps than others")
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        self.flat = torch.cat([parameter.detach().flatten() for parameter in trained.values()])
        self.moments = self.flat.new_zeros(2, len(self.flat))
        sizes = torch.tensor([shape.numel() for shape in self.shapes.values()])
        masks = self.objective.policy.masks_of(list(trained.values()))
        self.masks = masks.repeat_interleave(sizes, 1).to(self.flat)
        """[2, P] 1 for the elements of parameters that the action depends on, and that the value depends on."""
        fused, self.steps, start = self.optimizer.param_groups[0]["fused"], [], 0
        for parameter in trained.values():
            part, own = slice(start, start + parameter.numel()), self.optimizer.state[parameter]
            parameter.data = self.flat[part].view(parameter.shape)
            for row, key in zip(self.moments, ("exp_avg", "exp_avg_sq"), strict=True):
                if key in own:
                    row[part] = own[key].flatten()
                own[key] = row[part].view(parameter.shape)
            device = parameter.device if fused else "cpu"  # where torch itself keeps it
            own["step"] = torch.as_tensor(own.get("step", 0.0), dtype=torch.float32).to(device, copy=True)
            self.steps.append(own["step"])
            start = part.stop
