"""LSTM and GRU over sequences in which episodes end."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ppo_lightning.parameters import COUNT, checked

RNNType = Literal["lstm", "gru"]


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
        # Between two starts anywhere in the batch the layer runs in one call.
        begins = [0] if len(start) == 1 else [0, *(start[1:].any(1).nonzero().flatten() + 1).tolist()]
        outputs = []
        with torch.autocast(inputs.device.type, enabled=False):
            for begin, end in pairwise([*begins, len(start)]):
                state = state.masked_fill(start[begin].unsqueeze(-1), 0.0)
                output, state = self._run(inputs[begin:end].float(), state)
                outputs.append(output)
        return torch.cat(outputs), state

    def _run(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_lstm:
            hidden, cell = (part.contiguous() for part in state.unsqueeze(0).chunk(2, -1))
            output, (hidden, cell) = self.layer(inputs, (hidden, cell))
            return output, torch.cat([hidden, cell], -1).squeeze(0)
        output, hidden = self.layer(inputs, state.unsqueeze(0).contiguous())
        return output, hidden.squeeze(0)
