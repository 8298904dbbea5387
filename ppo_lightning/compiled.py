"""The gradient step as one compiled graph: what a small minibatch costs is dispatch, not arithmetic."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from ppo_lightning.loss import PPOLoss
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import rows_of

OPTIONS = {"cpp.use_decompose_tanh": True}
"""Of torch's compiler: tanh by exp, which vectorises (five times as fast), and is as exact to 1e-7."""

HYPER = ("lr", "step_size", "bias_correction", "clip_range", "ent_coef", "share")
"""What changes between minibatches, in one row of numbers, so that no change compiles anything anew."""


class CompilerError(Exception):
    """torch could not compile a function; nothing was computed."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one graph for each combination of shapes.

    Raises:
        CompilerError: from each call, where there is no compiler, or the function is not one graph.
    """
    # Constants of spaces are cached; the compiler sees through that, and says so.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    graph = torch.compile(function, fullgraph=True, dynamic=False, options=dict(OPTIONS))

    def call(*args: Any) -> Any:
        try:
            return graph(*args)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CompilerError(f"torch could not compile it: {lines[0] if lines else type(error).__name__}") from error

    return call


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
    group = optimizer.param_groups[0]
    if group["amsgrad"] or group["maximize"]:
        return "the optimizer uses amsgrad or maximize"
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
    else gradients and step are two, and between them the flat gradient is reduced and the divergence looked at.

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
        self._gradient_of = compiled(self._gradient)
        self._step_by = compiled(self._step)
        self._whole_of = compiled(self._whole)

    # --- the graphs ---------------------------------------------------------------------------------------------------

    def _gradient(
        self, flat: Tensor, samples: Mapping[str, Any], rows: Tensor, valid: Tensor | None, hyper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flat gradient [P] and loss terms [6] of the samples that ``rows`` [B] names, times their share."""
        at = dict(zip(HYPER, hyper.unbind(), strict=True))
        batch = {**_rows(samples, rows), "valid": valid}
        loss = PPOLoss(
            clip_range=at["clip_range"],  # pyright: ignore[reportArgumentType]: a number of this graph
            ent_coef=at["ent_coef"],  # pyright: ignore[reportArgumentType]
            clip_range_vf=self.loss.clip_range_vf,
            normalize_advantage=self.loss.normalize_advantage,
            vf_coef=self.loss.vf_coef,
        )

        def score(parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            terms = loss(batch, lambda given: functional_call(self.evaluate, parameters, (given,)))
            return terms.loss * at["share"], torch.stack([term.detach() for term in terms]) * at["share"]

        gradients, (_, terms) = grad_and_value(score, has_aux=True)(self._parameters(flat))
        return torch.cat([gradients[name].flatten() for name in self.shapes]), terms

    def _parameters(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def _step(self, flat: Tensor, moments: Tensor, gradient: Tensor, hyper: Tensor) -> Tensor:
        """Clip, and step by Adam (Kingma & Ba 2015), in place; not where the norm, which is returned, is not finite."""
        first_decay, second_decay, eps, decay = self.adam
        at = dict(zip(HYPER, hyper.unbind(), strict=True))
        norm = gradient.norm()
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
        return norm

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

    # --- around them --------------------------------------------------------------------------------------------------

    def begin(self, loss: PPOLoss, count: int) -> Tensor:
        """Prepare an update: rows of :data:`HYPER` [count, H] for its minibatches.

        Parameters and moments are laid out flat, unless they are so already: a checkpoint or a move may have come between.
        """
        self.loss = loss
        group = self.optimizer.param_groups[0]
        self.adam = (*map(float, group["betas"]), float(group["eps"]), float(group["weight_decay"]))
        learnt = {name: parameter for name, parameter in self.evaluate.named_parameters() if parameter.requires_grad}
        if not self._is_flat(learnt):
            self._lay_out(learnt)
        lr, taken = float(group["lr"]), int(self.steps[0])
        first_decay, second_decay = group["betas"]
        rows = [
            (lr, lr / (1 - first_decay**step), (1 - second_decay**step) ** 0.5, loss.clip_range, loss.ent_coef, 1.0)
            for step in range(taken + 1, taken + count + 1)
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
        self.shapes = {name: parameter.shape for name, parameter in learnt.items()}
        self.flat = torch.cat([parameter.detach().flatten() for parameter in learnt.values()])
        self.moments = self.flat.new_zeros(2, len(self.flat))
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

    def whole(
        self, samples: Mapping[str, Any], rows: Tensor, valid: Tensor | None, hyper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step on a minibatch: the gradient's norm before clipping, and loss terms [6].

        Args:
            samples: [S, …] by name.
            rows: [B] which of them the minibatch is made of.
            valid: [B] bool, those that count; None is all of them.
            hyper: its row.
        """
        return self._whole_of(self.flat, self.moments, samples, rows, valid, hyper)

    def gradient(
        self, samples: Mapping[str, Any], rows: Tensor, valid: Tensor | None, hyper: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first half: flat gradient [P] and loss terms [6]."""
        return self._gradient_of(self.flat, samples, rows, valid, hyper)

    def step(self, gradient: Tensor, hyper: Tensor) -> Tensor:
        """The second half: one step by a gradient [P], whose norm before clipping is returned."""
        return self._step_by(self.flat, self.moments, gradient, hyper)

    def end(self, steps: int) -> None:
        """Tell the optimiser's own state how many steps the update took."""
        torch._foreach_add_(self.steps, steps)  # pyright: ignore[reportPrivateImportUsage]


def _rows(tree: Any, rows: Tensor) -> Any:
    if isinstance(tree, Mapping):
        return {name: _rows(part, rows) for name, part in tree.items()}
    return rows_of(tree, rows)
