"""In every precision rollout and update agree, gradients are clipped in their own units, and counters are exact."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from ppo_lightning import PPO

SMALL = {"env": "CartPole-v1", "num_envs": 4, "num_steps": 32, "total_steps": 384}


class Watching(PPO):
    """Keeps what the first gradient step of each iteration sees."""

    def update(self, rollout):
        update = super().update(rollout)
        self.first_kl = [*getattr(self, "first_kl", []), update.column("approx_kl")[0].item()]
        self.norms = [*getattr(self, "norms", []), update.grad_norms[:, 0]]
        return update


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


PRECISIONS = {
    "32-true": {"precision": "32-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "16-mixed with a scaler": {"plugins": [scaled()]},
}


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("name", PRECISIONS)
def test_ratios_begin_at_one_and_counters_are_exact(name, fit):
    model = Watching(**SMALL, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    model.env_steps += 2**24 - 128  # where float32 ends
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.total_steps += 2**24 - 128
    fit(model, **PRECISIONS[name])
    assert model.num_env_steps == 2**24 + 256
    assert int(model.iterations) == 3
    assert max(map(abs, model.first_kl)) < (1e-6 if name == "32-true" else 1e-3)
    changed = [not torch.equal(value, before[name]) for name, value in model.policy.named_parameters()]
    assert all(changed)
    assert all(value.isfinite().all() for value in model.policy.parameters())


@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_a_scaler_hides_no_number_that_is_none(non_finite, fit):
    """It may leave out what it has scaled too far; with a scale below 1, it has not."""
    model = Watching(**{**SMALL, "total_steps": 4000}, non_finite=non_finite)
    with torch.no_grad():
        model.policy.network.value_head.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
        fit(model, plugins=[scaled()])


@pytest.mark.parametrize("fused", [False, True])
def test_norms_are_those_of_unscaled_gradients(fused, fit):
    """A fused optimiser unscales within its step: too late for clipping."""
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=3e-4, eps=1e-5, fused=fused)  # noqa: E731
    torch.manual_seed(0)
    exact = Watching(**SMALL, optimizer=optimizer)
    fit(exact)
    torch.manual_seed(0)
    model = Watching(**SMALL, optimizer=optimizer)
    fit(model, plugins=[scaled()])
    torch.testing.assert_close(model.norms[0][:4], exact.norms[0][:4], rtol=0.05, atol=0.01)
