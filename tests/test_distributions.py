"""Every family against torch.distributions, or against numerical integration where torch has no answer."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from test_borders import SMALL, Anything
from torch import distributions as td
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.policy.distributions import MASKED_LOGIT, action_distribution
from ppo_lightning.spaces import action_dims

B = 200
BOX = Box(np.array([-2.0, 0.0, -1.0], np.float32), np.array([1.0, 0.5, 5.0], np.float32))
MATRIX = Box(-1, 1, (2, 2))


def drawn(distribution, parameters, seed=0):
    noise = distribution.noise(len(parameters), generator=torch.Generator().manual_seed(seed))
    return distribution.sample(parameters, noise)


def affine_to(space: Box, base, event):
    """``base`` over the unit interval (or -1 to 1), moved to the bounds of a Box."""
    low, high = (torch.from_numpy(bound).double() for bound in (space.low, space.high))
    moves = [event, td.AffineTransform(low, high - low)] if event else [td.AffineTransform(low, high - low)]
    return td.Independent(td.TransformedDistribution(base, moves), 1)


@pytest.mark.parametrize(
    "space", [Discrete(5, start=3), MultiDiscrete([3, 2, 4]), MultiDiscrete([3, 3]), MultiBinary(4)]
)
def test_discrete_families_equal_torch(space):
    distribution = action_distribution(space)
    parameters = torch.randn(B, distribution.num_parameters) * 3
    action = drawn(distribution, parameters)
    sizes = [5] if isinstance(space, Discrete) else ([2] * 4 if isinstance(space, MultiBinary) else list(space.nvec))
    parts = [td.Categorical(logits=logits) for logits in parameters.split(list(map(int, sizes)), -1)]
    columns = action.view(B, -1).unbind(-1)
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, action)
    expected = sum(part.log_prob(column) for part, column in zip(parts, columns, strict=True))
    assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)
    assert_close(entropy, sum(part.entropy() for part in parts), rtol=1e-5, atol=1e-5)
    modes = torch.stack([part.logits.argmax(-1) for part in parts], -1)
    assert torch.equal(distribution.mode(parameters).view(B, -1), modes)
    for one in distribution.to_numpy(action):
        assert space.contains(one if np.ndim(one) else np.int64(one)), one


def test_multi_binary_has_the_bernoulli_of_its_logits_difference():
    distribution = action_distribution(MultiBinary(3))
    parameters = torch.randn(B, 6)
    action = drawn(distribution, parameters)
    bernoulli = td.Bernoulli(logits=parameters.view(B, 3, 2).diff(dim=-1).squeeze(-1))
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, action)
    assert_close(log_prob, bernoulli.log_prob(action.float()).sum(-1), rtol=1e-5, atol=1e-5)
    assert_close(entropy, bernoulli.entropy().sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("space", [BOX, MATRIX], ids=["vector", "matrix"])
def test_normal_equals_torch(space):
    distribution = action_distribution(space)
    parameters = torch.randn(B, distribution.num_parameters)
    action = drawn(distribution, parameters)
    assert action.shape == (B, *space.shape)
    mean, log_std = parameters.chunk(2, -1)
    other = td.Independent(td.Normal(mean, log_std.exp()), 1)
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, action)
    assert_close(log_prob, other.log_prob(action.flatten(1)), rtol=1e-5, atol=1e-5)
    assert_close(entropy, other.entropy(), rtol=1e-5, atol=1e-5)


def test_tanh_log_probability_equals_torch_in_double_precision():
    distribution = action_distribution(BOX, "tanh")
    parameters = torch.cat([torch.randn(B, 3), torch.empty(B, 3).uniform_(-2, 0.5)], -1)
    u = drawn(distribution, parameters)
    mean, log_std = parameters.double().chunk(2, -1)
    # torch's own transform is exact given its input; atanh of its output would not be.
    base = td.Normal(mean, log_std.exp())
    half = torch.from_numpy((BOX.high - BOX.low) / 2).double()
    slope = td.TanhTransform().log_abs_det_jacobian(u.double(), u.double().tanh())
    expected = (base.log_prob(u.double()) - slope - half.log()).sum(-1)
    log_prob, _ = distribution.log_prob_and_entropy(parameters, u)
    assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    moderate = (u.abs() < 3).all(-1)  # where torch can invert its own output
    action = distribution.to_env_action(u.double()).double()
    squashed = td.TransformedDistribution(
        base, [td.TanhTransform(), td.AffineTransform(torch.from_numpy(BOX.low).double() + half, half)]
    )
    inverted = squashed.log_prob(action).sum(-1)
    assert_close(log_prob.double()[moderate], inverted[moderate], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("log_std", [-20.0, -5.0, -1.0, 0.0, 1.0, 2.0])
def test_tanh_entropy_equals_numerical_integration(log_std):
    distribution = action_distribution(Box(-1, 1, (1,)), "tanh")
    means = torch.tensor([0.0, 0.3, -1.0, 3.0, -20.0])
    parameters = torch.stack([means, torch.full((5,), log_std)], -1)
    std = math.exp(log_std)
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    weight = (-0.5 * z.square()).exp() * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    u = means.double()[:, None] + std * z
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    expected = 0.5 * math.log(2 * math.pi * math.e) + log_std + (slope * weight).sum(-1)
    _, entropy = distribution.log_prob_and_entropy(parameters, torch.zeros(5, 1))
    assert_close(entropy.double(), expected, atol=1e-4, rtol=1e-5)


def test_tanh_density_integrates_to_one_over_the_bounds():
    space = Box(-3.0, 1.0, (1,))
    distribution = action_distribution(space, "tanh")
    u = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    parameters = torch.tensor([[0.4, -0.3]], dtype=torch.float64).expand(len(u), 2)
    log_prob, _ = distribution.log_prob_and_entropy(parameters.float(), u.float()[:, None])
    action = -3 + 4 * (u.tanh() + 1) / 2
    assert_close(torch.trapezoid(log_prob.double().exp(), action), torch.tensor(1.0).double(), atol=1e-4, rtol=0)


def test_beta_equals_torch():
    distribution = action_distribution(BOX, "beta")
    parameters = torch.randn(B, 6) * 2
    x = drawn(distribution, parameters)
    alpha, beta = (1 + torch.nn.functional.softplus(parameters.double())).chunk(2, -1)
    low, width = torch.from_numpy(BOX.low).double(), torch.from_numpy(BOX.high - BOX.low).double()
    base = td.Beta(alpha, beta)
    other = td.TransformedDistribution(base, [td.AffineTransform(low, width)])
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, x)
    assert_close(log_prob.double(), other.log_prob(low + width * x.double()).sum(-1), rtol=1e-4, atol=1e-4)
    assert_close(entropy.double(), (base.entropy() + width.log()).sum(-1), rtol=1e-5, atol=1e-5)
    assert_close(distribution.std(parameters).double(), base.stddev * width, rtol=1e-5, atol=1e-5)
    mode = ((alpha - 1) / (alpha + beta - 2)).float()
    assert_close(distribution.mode(parameters), mode, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("concentration", [1e2, 1e4, 1e6])
def test_a_precise_beta_is_exact(concentration):
    """Terms as large as the concentrations cancel."""
    distribution = action_distribution(Box(0, 1, (1,)), "beta")
    parameters = torch.full((B, 2), concentration)
    x = drawn(distribution, parameters)
    alpha, beta = (1 + torch.nn.functional.softplus(parameters.double())).chunk(2, -1)
    other = td.Beta(alpha, beta)
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, x)
    assert_close(log_prob.double(), other.log_prob(x.double()).sum(-1), rtol=1e-5, atol=1e-5)
    assert_close(entropy.double(), other.entropy().sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("raw", [(-8.0, -8.0), (0.0, 0.0), (3.0, -2.0), (60.0, 40.0)])
def test_beta_samples_have_the_moments_of_beta(raw):
    distribution = action_distribution(Box(0, 1, (1,)), "beta")
    parameters = torch.tensor(raw).expand(300_000, 2)
    x = drawn(distribution, parameters).double()
    alpha, beta = (1 + torch.nn.functional.softplus(torch.tensor(raw).double())).tolist()
    other = td.Beta(alpha, beta)
    assert_close(x.mean(), other.mean.double(), atol=3e-3, rtol=0)
    assert_close(x.std(), other.stddev.double(), atol=3e-3, rtol=0)
    quantiles = torch.quantile(x.squeeze()[:100_000], torch.tensor([0.05, 0.5, 0.95]).double())
    reference = torch.quantile(other.sample((100_000,)).double(), torch.tensor([0.05, 0.5, 0.95]).double())
    assert_close(quantiles, reference, atol=6e-3, rtol=0)


def test_beta_accepts_nearly_every_proposal():
    """So that eight are enough: the chance that none is accepted must not matter."""
    distribution = action_distribution(Box(0, 1, (1,)), "beta")
    assert distribution.PROPOSALS == 8
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    shape = 1 - 1 / 3  # the hardest: α = 1
    cube = (1 + normal / math.sqrt(9 * shape)).pow(3)
    accepted = (cube > 0) & (uniform.log() < 0.5 * normal.square() + shape * (1 - cube + cube.clamp_min(1e-30).log()))
    assert (1 - accepted.float().mean()) ** 8 < 1e-9


def test_gsde_is_normal_with_the_variance_of_its_loadings():
    distribution = action_distribution(MATRIX, "gsde", num_latent=5)
    parameters = torch.randn(B, distribution.num_parameters)
    action = drawn(distribution, parameters)
    mean, loadings = parameters.split([4, 20], -1)
    std = (loadings.view(B, 5, 4).square().sum(1) + 1e-6).sqrt()
    other = td.Independent(td.Normal(mean, std), 1)
    log_prob, entropy = distribution.log_prob_and_entropy(parameters, action)
    assert_close(log_prob, other.log_prob(action.flatten(1)), rtol=1e-5, atol=1e-5)
    assert_close(entropy, other.entropy(), rtol=1e-5, atol=1e-5)
    many = drawn(distribution, parameters[:1].expand(200_000, -1))
    assert_close(many.flatten(1).std(0), std[0], rtol=1e-2, atol=0)


def test_gsde_keeps_its_noise_for_some_steps_and_gives_equal_states_equal_noise():
    distribution = action_distribution(BOX, "gsde", num_latent=4, sample_freq=3)
    noise = distribution.noise(8, 2, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (8, 2, 12)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[3], noise[5])
    assert not torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0, 0], noise[0, 1])
    network = ActorCritic(Box(-1, 1, (2,)), BOX, distribution="gsde", sde_sample_freq=3, hidden_sizes=(4,))
    parameters = network.actor(torch.ones(2, 2))
    actions = [network.distribution.sample(parameters, noise[step]) for step in (0, 1, 3)]
    assert torch.equal(actions[0], actions[1])
    assert not torch.equal(actions[0], actions[2])


@pytest.mark.parametrize("family", ["normal", "gsde"])
def test_an_action_is_clipped_where_one_component_lies_outside_the_bounds(family):
    space = Box(np.array([-1, -np.inf], np.float32), np.array([1, 5], np.float32))
    action = torch.tensor([[[0.0, 0.0], [1.0, 5.0], [-1.1, 0.0]], [[0.0, -99.0], [0.0, 5.1], [9.0, 9.0]]])
    expected = [[False, False, True], [False, True, True]]
    distribution = action_distribution(space, family)
    assert distribution.clipped(action).tolist() == expected
    part = Dict({"arm": space, "grip": Discrete(2)})
    distribution = action_distribution(part, family)
    assert distribution.clipped({"arm": action, "grip": torch.zeros(2, 3)}).tolist() == expected


def test_only_normal_distributions_in_bounds_clip_actions():
    action = torch.full((2, 1), 9.0)
    for family in ("tanh", "beta"):
        assert action_distribution(Box(-1, 1, (1,)), family).clipped(action) is None
    assert action_distribution(Box(-np.inf, np.inf, (1,))).clipped(action) is None
    assert action_distribution(Discrete(2)).clipped(action) is None
    assert action_distribution(Tuple([Discrete(2), Discrete(3)])).clipped({"0": action, "1": action}) is None


@pytest.mark.parametrize("family", ["normal", "tanh", "beta", "gsde"])
def test_dict_and_tuple_are_independent_parts_with_weighted_entropies(family):
    space = Dict({"a": Discrete(3), "b": Tuple((BOX, MultiBinary(2)))})
    joint = action_distribution(space, family, num_latent=4, entropy_weights={"a": 0.5, "b.1": 2.0})
    parts = {
        "a": action_distribution(Discrete(3)),
        "b.0": action_distribution(BOX, family, num_latent=4),
        "b.1": action_distribution(MultiBinary(2)),
    }
    parameters = torch.randn(B, joint.num_parameters)
    action = drawn(joint, parameters)
    split = parameters.split([part.num_parameters for part in parts.values()], -1)
    each = [part.log_prob_and_entropy(p, action[name]) for (name, part), p in zip(parts.items(), split, strict=True)]
    log_prob, entropy = joint.log_prob_and_entropy(parameters, action)
    assert_close(log_prob, sum(log_prob for log_prob, _ in each))
    assert_close(entropy, 0.5 * each[0][1] + each[1][1] + 2.0 * each[2][1])
    decoded = joint.to_numpy({name: leaf[0] for name, leaf in action.items()})
    assert space.contains(decoded), decoded


@pytest.mark.parametrize(
    "space",
    [
        Discrete(4),
        MultiDiscrete([3, 2]),
        MultiBinary(2),
        Dict({"x": BOX, "y": Discrete(3), "z": MultiDiscrete([2, 2])}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_what_a_mask_forbids_has_probability_zero_to_the_last_bit(space):
    """In samples, in probabilities, in the mode, and it has no part in the entropy or the gradient."""
    distribution = action_distribution(space)
    sizes = action_dims(space)
    parameters = (torch.randn(B, distribution.num_parameters) * 5).requires_grad_()
    mask = torch.rand(B, sum(sizes)) < 0.4
    begin = 0
    for size in sizes:
        mask[torch.arange(B), begin + torch.randint(size, (B,))] = True
        begin += size
    masked = distribution.apply_mask(parameters, mask)
    action = drawn(distribution, masked)
    log_prob, entropy = distribution.log_prob_and_entropy(masked, action)
    (log_prob.sum() + entropy.sum()).backward()
    assert parameters.grad.isfinite().all()

    logits = masked if not isinstance(space, Dict) else masked[:, 6:]
    grads = parameters.grad if not isinstance(space, Dict) else parameters.grad[:, 6:]
    assert (grads[~mask] == 0).all()
    expected_entropy = torch.zeros(B)
    begin = 0
    for size in sizes:
        part, allowed = logits[:, begin : begin + size], mask[:, begin : begin + size]
        probability = part.softmax(-1)
        assert (probability[~allowed] == 0).all()
        for row in range(B):
            expected_entropy[row] += td.Categorical(logits=part[row, allowed[row]]).entropy()
        begin += size
    if isinstance(space, Dict):
        expected_entropy = (
            expected_entropy + distribution.parts["x"].log_prob_and_entropy(masked[:, :6], action["x"])[1]
        )
    assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    for chosen in (action, distribution.mode(masked)):
        assert (chosen_mask(space, chosen, mask)).all()


def chosen_mask(space, action, mask):
    """Whether each choice of each sample was allowed."""
    columns = (
        torch.cat([action["y"][:, None], action["z"]], -1) if isinstance(space, Dict) else action.view(len(mask), -1)
    )
    begins = torch.tensor([0, *np.cumsum(action_dims(space))[:-1]])
    return mask.gather(1, columns + begins)


def test_noise_is_finite_so_that_no_mask_can_be_overruled():
    noise = action_distribution(Discrete(1000)).noise(1000, generator=torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    least = torch.tensor(torch.finfo(torch.float32).tiny).log().neg()  # of the smallest number that can be drawn
    assert least + MASKED_LOGIT < -1e38


@pytest.mark.parametrize("family", ["tanh", "beta"])
@pytest.mark.parametrize("space", [Box(-np.inf, np.inf, (2,)), Box(0, np.inf, (1,)), Box(1.0, 1.0, (1,))])
def test_refuses_bounds_that_are_none(family, space):
    with pytest.raises(InputError, match=f"{family} needs finite bounds"):
        action_distribution(space, family)


def test_refuses_unknown_families_and_parts():
    with pytest.raises(InputError, match="distribution must be one of"):
        action_distribution(BOX, "cauchy")
    with pytest.raises(InputError, match=r"entropy_weights names \['z'\]"):
        action_distribution(Dict({"a": Discrete(2)}), entropy_weights={"z": 1.0})


@pytest.mark.parametrize(
    ("family", "state_dependent"),
    [("normal", False), ("tanh", False), ("gsde", False), ("normal", True), ("tanh", True)],
)
def test_log_std_is_clamped_and_can_come_back(family, state_dependent):
    space, low, high = Box(-1, 1, (2,)), -1.0, 0.5
    for init, inside in ((3.0, high), (-4.0, low), (0.2, 0.2)):
        network = ActorCritic(
            Box(-1, 1, (3,)), space, distribution=family, log_std_init=0.2, log_std_range=(low, high),
            state_dependent_std=state_dependent, hidden_sizes=(4,),
        )  # fmt: skip
        head = network.action_head
        values = head.log_std_layer.bias if state_dependent else head.log_std
        with torch.no_grad():
            values.fill_(init)
        parameters = network.actor(torch.ones(5, 3))
        if family == "gsde":
            latent = network.actor_trunk(torch.ones(5, 3))
            expected = latent[:, :, None] * math.exp(inside)
            assert_close(parameters[:, 2:], expected.expand(5, 4, 2).flatten(1))
        else:
            assert_close(parameters[:, 2:], torch.full((5, 2), inside), atol=0.1, rtol=0)
        for sign in (1, -1):  # a descent that raises or lowers the loss's log_std
            (gradient,) = torch.autograd.grad(sign * parameters[:, 2:].sum(), values, retain_graph=True)
            blocked = (init > high and sign < 0) or (init < low and sign > 0)
            if family != "gsde":
                assert bool((gradient == 0).all()) == blocked


# --- continuous distributions over discrete actions ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tanh", "beta", "gsde"])
@pytest.mark.parametrize(
    "space",
    [
        Discrete(2),
        MultiDiscrete([2, 3]),
        MultiBinary(2),
        Dict({"a": Discrete(2)}),
        Tuple((Discrete(2), MultiBinary(2))),
    ],
)
def test_continuous_distributions_are_refused_where_no_action_is_continuous(family, space):
    for make in (
        lambda: action_distribution(space, family),
        lambda: PPO(partial(Anything, None, space), policy=partial(ActorCritic, distribution=family), **SMALL),
    ):
        with pytest.raises(InputError, match=f"distribution {family} is for continuous actions, the action space"):
            make()


def test_options_without_an_effect_are_refused():
    policy = partial(ActorCritic, distribution="gsde", state_dependent_std=True)
    with pytest.raises(InputError, match=r"state_dependent_std is for normal and tanh, .* of gsde .*: leave it out"):
        PPO("Pendulum-v1", policy=policy, **SMALL)
    space = Dict({"arm": Box(-1, 1, (2,)), "tool": Discrete(3)})
    for weight in (math.nan, math.inf):
        policy = partial(ActorCritic, entropy_weights={"arm": weight})
        with pytest.raises(InputError, match="entropy_weights must be finite"):
            PPO(partial(Anything, None, space), policy=policy, **SMALL)


@pytest.mark.parametrize(
    "options", [{"state_dependent_std": True}, {"log_std_init": -1.0}, {"log_std_range": (-3.0, 1.0)}]
)
def test_options_of_standard_deviations_are_refused_where_there_are_none(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is for .*leave it out"):
        PPO("CartPole-v1", policy=partial(ActorCritic, **options), **SMALL)
    with pytest.raises(InputError, match=f"{next(iter(options))} is for .*leave it out"):
        PPO("Pendulum-v1", policy=partial(ActorCritic, distribution="beta", **options), **SMALL)


def test_a_continuous_distribution_is_for_the_continuous_parts_of_actions(fit):
    space = Dict({"arm": Box(-1, 1, (2,)), "tool": Discrete(3)})
    fit(PPO(partial(Anything, None, space), policy=partial(ActorCritic, distribution="tanh"), **SMALL))
