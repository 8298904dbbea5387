"""Acting by a trained policy, on NumPy arrays and on tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ppo_lightning.envs import EnvFactory
from ppo_lightning.errors import InputError
from ppo_lightning.policy import Policy, in_eval_mode
from ppo_lightning.policy.prediction import act_on_tensors, predict
from ppo_lightning.spaces import without_mask


class ActingModule(LightningModule):
    """A LightningModule that maps raw observations to the environment's actions: normalisation to clipping are inside.

    A subclass sets the attributes below.
    """

    policy: Policy
    env_factory: EnvFactory
    observation_space: Space[Any]
    action_space: Space[Any]
    trained_with_masks = False
    _warned_of_masks = False

    @override
    def forward(
        self, observation: Any, state: Tensor | None = None, action_mask: Any = None, noise: Tensor | None = None
    ) -> Any:
        """Deterministic actions for raw observations, all as tensors: what exports trace, and ``Trainer.predict`` returns.

        Args:
            observation: [B, *shape] of the observation space, unnormalised; of a Dict or Tuple its entries.
            state: [B, S] of a recurrent policy, from the previous call; None, or rows of zeros, at the start of episodes.
            action_mask: [B, M] of bools or integers, not 0 where an action is allowed, or the parts of a Dict or Tuple; one
                that is part of the observation is read from there. None allows all.
            noise: [B, Z] of ``policy.distribution.noise``, which draws actions; None takes the most probable ones.

        Returns:
            Actions [B, *shape] of the action space, in its units and bounds; of a Dict or Tuple its entries. A recurrent
            policy returns the pair (actions, state [B, S]).

        Raises:
            InputError: the tensors do not have the spaces' structure or shapes.
        """
        return act_on_tensors(
            self.policy, self.observation_space, self.action_space, observation, state, action_mask, noise
        )

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        """Actions for a batch of observations of any loader (``Trainer.predict``)."""
        alone = isinstance(batch, list) and len(batch) == 1  # what a TensorDataset of one tensor yields
        return self(batch[0] if alone else batch)

    @override
    def predict_dataloader(self) -> Any:
        """Of ``Trainer.predict``, which must be given one.

        Raises:
            InputError: always.
        """
        raise InputError(
            "Trainer.predict needs observations: give it a loader of them, Trainer.predict(model, loader); or use "
            "model.predict(observation), or model.evaluate() for whole episodes"
        )

    def predict(self, observation: Any, deterministic: bool = True, state: Any = None, action_mask: Any = None) -> Any:
        """Action for one observation, or actions for a batch, in float32; numpy in, numpy out, in the environment's units.

        A recurrent policy returns the pair (action, state): pass the state with the next observation of the episode, and
        None with the first.

        Args:
            observation: [*shape], or [B, *shape] of the observation space, unnormalised; for a Dict or Tuple its entries.
            deterministic: the most probable action; else one is sampled with torch's global generator.
            state: of the recurrent policy, from the previous call; None at the start of an episode.
            action_mask: [M], or [B, M], 1 or True where an action is allowed, else 0 or False; one that is part of the
                observation is read from there. Without one all actions are allowed, with one warning where the policy
                was trained with masks.

        Raises:
            InputError: the observation, state or mask is not of its space, or fits neither; ``deterministic`` is no flag.
        """
        if not isinstance(deterministic, bool | np.bool_):
            given = type(deterministic).__name__
            raise InputError(f"deterministic must be True or False, got {given}: give a state by its name, state=…")
        is_masked = action_mask is not None or without_mask(self.observation_space) is not self.observation_space
        if self.trained_with_masks and not is_masked and not self._warned_of_masks:
            self._warned_of_masks = True
            rank_zero_warn(
                f"predict got no action_mask, though the policy was trained with masks of {self.env_factory.name}: all actions "
                "are allowed, also those that are impossible; pass action_mask as the environment gives it"
            )
        # In float32, as exported files and models of a checkpoint act.
        with in_eval_mode(self.policy), torch.autocast(self.device.type, enabled=False):
            return predict(
                self.policy,
                self.observation_space,
                self.action_space,
                observation,
                deterministic=deterministic,
                state=state,
                action_mask=action_mask,
            )

    def export(self, path: str | Path, *, stochastic: bool = False, force: bool = False) -> float:
        """Write the policy as one file for other processes, once it acts as :meth:`predict` does (docs/deploy.md).

        Args:
            path: of the file; its suffix is the format, .onnx (onnxruntime) or .pt2 (``torch.export``).
            stochastic: draw actions, by a further input of random numbers, instead of taking the most probable ones.
            force: replace an existing file.

        Returns:
            The highest difference from :meth:`predict`, over 256 samples.

        Raises:
            InputError: the path cannot be written, a library is missing, the network cannot be traced, or the file's
                actions differ by more than 1e-5 (drawn ones 1e-4). No file is written then.
        """
        tool = import_module("ppo_lightning.tools.export")
        return tool.export(self, path, stochastic=stochastic, force=force)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of updates, for computations outside of training_step that do not change weights."""
        if self._trainer is None:
            yield
            return
        with self.trainer.precision_plugin.forward_context():
            # Lightning casts weights in every call; here they do not change between calls, but before the first they may have.
            torch.clear_autocast_cache()
            torch.set_autocast_cache_enabled(True)
            yield
