"""LSTM and GRU over sequences in which episodes end.

torch's layers take a sequence in one call, but cannot reset a state within it: they need a call from each start to the next.
Where starts are many, as in a minibatch of sequences, the functions below are two to three times as fast on a CPU: they do
what torch's layers do, reset single states, and compute in their gradients what they can for all steps at once.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from ppo_lightning.parameters import COUNT, checked

RNNType = Literal["lstm", "gru"]

FEW = 5
"""Steps from one start to the next, on average, from which a call of torch's layer for each is as fast."""


class RecurrentLayer(nn.Module):
    """One recurrent layer whose state is a flat vector, and is reset where an episode starts.

    Weights are orthogonal, biases 0 (Huang et al. 2022, detail 32). It computes in float32 under autocast too, so that
    a state does not depend on how often it was rounded on its way.

    Args:
        kind: lstm or gru.
        inputs: F, size of an input.
        size: H, size of an output. The state's size S is 2 H for an LSTM (hidden, then cell), H for a GRU.
    """

    @checked("{} of RecurrentLayer", inputs=COUNT, size=COUNT)
    def __init__(self, kind: RNNType, inputs: int, size: int) -> None:
        super().__init__()
        self.is_lstm = kind == "lstm"
        self.layer = (nn.LSTM if self.is_lstm else nn.GRU)(inputs, size)
        self.state_size = 2 * size if self.is_lstm else size
        for name, parameter in self.layer.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter, 1.0)
            else:
                nn.init.zeros_(parameter)

    @override
    def forward(self, inputs: Tensor, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of a sequence, and the state after it.

        Args:
            inputs: [L, B, F].
            state: [B, S] before the first step; zeros at the start of episodes.
            start: [L, B] bool, the row is the first of an episode: the state is reset before it.

        Returns:
            Outputs [L, B, H] and state [B, S].
        """
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.float()
            begins = [0] if len(start) == 1 else [0, *(start[1:].any(1).nonzero().flatten() + 1).tolist()]
            if 1 < len(start) < FEW * len(begins) and inputs.device.type == "cpu":
                return self._all_steps(inputs, state, start)
            # Between two starts anywhere in the batch the layer runs in one call.
            outputs = []
            for begin, end in pairwise([*begins, len(start)]):
                state = state.masked_fill(start[begin].unsqueeze(-1), 0.0)
                output, state = self._run(inputs[begin:end], state)
                outputs.append(output)
            return torch.cat(outputs), state

    def _run(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_lstm:
            hidden, cell = (part.contiguous() for part in state.unsqueeze(0).chunk(2, -1))
            output, (hidden, cell) = self.layer(inputs, (hidden, cell))
            return output, torch.cat([hidden, cell], -1).squeeze(0)
        output, hidden = self.layer(inputs, state.unsqueeze(0).contiguous())
        return output, hidden.squeeze(0)

    def _all_steps(self, inputs: Tensor, state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self.layer
        of_inputs, weight, bias_ih, bias = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
        kept, resets = (~start).unsqueeze(-1).float(), start.any(1).tolist()
        if self.is_lstm:
            of_inputs, weight, bias = (_sigmoids_first(rows) for rows in (of_inputs, weight, bias_ih + bias))
            hidden, last = LSTM.apply(linear(inputs, of_inputs, bias), weight, state, kept, resets)
            return hidden, last
        hidden: Any = GRU.apply(linear(inputs, of_inputs, bias_ih), weight, bias, state, kept, resets)
        return hidden, hidden[-1]


def _sigmoids_first(rows: Tensor) -> Tensor:
    """Rows of the gates i, f, g, o of torch in the order i, f, o, g, of which the last has a tanh."""
    enter, keep, new, out = rows.chunk(4)
    return torch.cat([enter, keep, out, new])


class LSTM(torch.autograd.Function):
    """Hidden states [L, B, H] of sequences, and the state [B, 2 H] after them (Hochreiter & Schmidhuber 1997).

    Arguments of ``apply``: what inputs and biases add to the gates i, f, o, g [L, B, 4 H]; the hidden state's weight [4 H, H];
    the state [B, 2 H] before the first step; 0 where the state is reset before a step, else 1, [L, B, 1]; and whether any is.
    """

    @staticmethod
    @override
    def forward(ctx: Any, *inputs: Any) -> Any:
        projected, weight, state, kept, resets = inputs
        gates, size = projected.clone(), weight.shape[1]
        hidden, cells = (projected.new_empty(*projected.shape[:2], size) for _ in range(2))
        before, cell = (part.contiguous() for part in state.chunk(2, -1))
        tanh, transposed = torch.empty_like(before), weight.t().contiguous()
        sigmoids, new = gates.split([3 * size, size], -1)
        steps = _steps(gates, sigmoids, new, *sigmoids.chunk(3, -1), hidden, cells, kept)
        for is_reset, (gate, sigmoid, add, enter, keep, out, after, next_cell, own) in zip(resets, steps, strict=True):
            if is_reset:
                before, cell = before * own, cell * own
            gate.addmm_(before, transposed)
            sigmoid.sigmoid_()
            add.tanh_()
            torch.mul(keep, cell, out=next_cell).addcmul_(enter, add)
            torch.mul(out, torch.tanh(next_cell, out=tanh), out=after)
            before, cell = after, next_cell
        ctx.save_for_backward(weight, state, kept, hidden, cells, gates)
        ctx.resets = resets
        return hidden, torch.cat([before, cell], -1)

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        weight, state, kept, hidden, cells, gates = ctx.saved_tensors
        of_hidden, of_last = grad_outputs
        first_hidden, first_cell = state.chunk(2, -1)
        enter, keep, out, new = gates.chunk(4, -1)
        tanh, size = cells.tanh(), weight.shape[1]
        # The gradient of a step's gates is that of its cell or hidden state, times what is known of all steps already.
        of_enter, of_new = new * enter * (1 - enter), enter * (1 - new.square())
        of_keep = _before(first_cell, cells, kept) * keep * (1 - keep)
        of_gates = gates.new_empty(*gates.shape[:2], 4, size)
        steps = _steps(
            *(
                of_hidden,
                out * (1 - tanh.square()),
                torch.stack([of_enter, of_keep, of_new], 2),
                tanh * out * (1 - out),
            ),
            *(keep, of_gates[:, :, :3], of_gates[:, :, 3], of_gates.flatten(2), kept),
        )
        later, of_cell_later = (part.contiguous() for part in of_last.chunk(2, -1))
        total, of_cell = torch.empty_like(later), torch.empty_like(later)
        rows = weight.view(4, size, size)[[0, 1, 3, 2]].flatten(0, 1)  # i, f, g, o
        for is_reset, step in zip(reversed(ctx.resets), reversed(steps), strict=True):
            own, through, by_cell, by_hidden, forget, three, fourth, all_four, remains = step
            torch.add(own, later, out=total)
            torch.addcmul(of_cell_later, total, through, out=of_cell)
            torch.mul(of_cell.unsqueeze(1), by_cell, out=three)
            torch.mul(total, by_hidden, out=fourth)
            torch.mul(of_cell, forget, out=of_cell_later)
            torch.mm(all_four, rows, out=later)
            if is_reset:
                of_cell_later.mul_(remains)
                later.mul_(remains)
        of_projected = of_gates[:, :, [0, 1, 3, 2]].flatten(2)
        of_weight = of_projected.flatten(0, 1).t() @ _before(first_hidden, hidden, kept).flatten(0, 1)
        return of_projected, of_weight, torch.cat([later, of_cell_later], -1), None, None


class GRU(torch.autograd.Function):
    """Hidden states [L, B, H] of sequences (Cho et al. 2014, with the reset gate as torch has it).

    Arguments of ``apply``: what inputs add to the gates r, z, n [L, B, 3 H]; the hidden state's weight [3 H, H] and bias [3 H];
    the state [B, H] before the first step; 0 where the state is reset before a step, else 1, [L, B, 1]; and whether any is.
    """

    @staticmethod
    @override
    def forward(ctx: Any, *inputs: Any) -> Any:
        projected, weight, bias, state, kept, resets = inputs
        gates, added, size = torch.empty_like(projected), torch.empty_like(projected), weight.shape[1]
        hidden = projected.new_empty(*projected.shape[:2], size)
        halves = [part for whole in (projected, gates, added) for part in whole.split([2 * size, size], -1)]
        steps = _steps(*halves, *gates.chunk(3, -1)[:2], added, hidden, kept)
        before, transposed = state, weight.t().contiguous()
        for is_reset, step in zip(resets, steps, strict=True):
            of_both, of_new, both, new, add_both, add_new, reset, update, add, after, own = step
            if is_reset:
                before = before * own
            torch.addmm(bias, before, transposed, out=add)
            torch.add(of_both, add_both, out=both).sigmoid_()
            torch.addcmul(of_new, reset, add_new, out=new).tanh_()
            torch.lerp(new, before, update, out=after)
            before = after
        ctx.save_for_backward(weight, state, kept, hidden, gates, added)
        ctx.resets = resets
        return hidden

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        weight, state, kept, hidden, gates, added = ctx.saved_tensors
        reset, update, new = gates.chunk(3, -1)
        before = _before(state, hidden, kept)
        # The gradient of a step's gates is that of its hidden state, times what is known of all steps already.
        of_new, of_update = (1 - update) * (1 - new.square()), (before - new) * update * (1 - update)
        of_reset = of_new * added.chunk(3, -1)[2] * reset * (1 - reset)
        totals, of_added = torch.empty_like(hidden), gates.new_empty(*gates.shape[:2], 3, weight.shape[1])
        known = torch.stack([of_reset, of_update, of_new * reset], 2)
        steps = _steps(grad_outputs[0], known, update, totals, of_added, of_added.flatten(2), kept)
        later = torch.zeros_like(state)
        for is_reset, step in zip(reversed(ctx.resets), reversed(steps), strict=True):
            own, by_hidden, remaining, total, three, all_three, remains = step
            torch.add(own, later, out=total)
            torch.mul(total.unsqueeze(1), by_hidden, out=three)
            later = torch.addmm(total * remaining, all_three, weight)
            if is_reset:
                later.mul_(remains)
        of_projected = torch.cat([totals * of_reset, totals * of_update, totals * of_new], -1)
        rows = of_added.flatten(2).flatten(0, 1)
        return of_projected, rows.t() @ before.flatten(0, 1), rows.sum(0), later, None, None


def _before(first: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """States [L, B, H] before each step, of those after each step."""
    return torch.cat([first.unsqueeze(0), after[:-1]]) * kept


def _steps(*tensors: Tensor) -> Sequence[tuple[Tensor, ...]]:
    """The tensors of each step, of tensors [L, …]."""
    return list(zip(*(tensor.unbind() for tensor in tensors), strict=True))
