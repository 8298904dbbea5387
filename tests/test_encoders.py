"""Images in every layout, one encoder for each part, trunks shared or not, critics that see more."""

from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from probes import OBSERVATIONS, Spaces
from torch import nn
from torch.testing import assert_close

from ppo_lightning import MLP, PPO, ActorCritic, ImpalaCNN, InputError, NatureCNN
from ppo_lightning.policy import Policy
from ppo_lightning.spaces import is_image

SMALL = {"num_envs": 2, "num_steps": 16, "total_steps": 64}
NO_NORMALISING = {"normalize_observation": False}


def pixels(*shape):
    return Box(0, 255, shape, np.uint8)


def image(channels=4, side=84, batch=3):
    return torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)


LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "stack of grey": lambda x: x.unsqueeze(-1),
    "stack of colour, channels last": lambda x: x.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2),
    "stack of colour, channels first": lambda x: x.unflatten(1, (2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoder", [NatureCNN, ImpalaCNN])
def test_every_layout_is_the_same_image(encoder, layout):
    x = image()
    torch.manual_seed(1)
    reference = encoder(pixels(4, 84, 84))
    shown = LAYOUTS[layout](x)
    torch.manual_seed(1)
    other = encoder(pixels(*shown.shape[1:]))
    assert_close(other(shown), reference(x), atol=1e-5, rtol=1e-4)


def test_nature_cnn_equals_its_layers_written_plainly():
    x, encoder = image(), NatureCNN(pixels(4, 84, 84))
    convolutions = [layer for layer in encoder.layers if isinstance(layer, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert encoder.output[0].weight.shape == (512, 3136)
    hidden = x.float() / 255
    for convolution, stride in zip(convolutions, (4, 2, 1), strict=True):
        hidden = nn.functional.conv2d(hidden, convolution.weight, convolution.bias, stride).relu()
    expected = nn.functional.linear(hidden.flatten(1), encoder.output[0].weight, encoder.output[0].bias).relu()
    assert_close(encoder(x), expected, atol=1e-5, rtol=1e-4)


def test_impala_cnn_has_fifteen_convolutions_and_takes_any_size():
    encoder = ImpalaCNN(pixels(3, 7, 7), depths=(16, 32, 32), features=64)
    assert sum(isinstance(layer, nn.Conv2d) for layer in encoder.modules()) == 15
    assert encoder(image(3, 7)).shape == (3, 64)
    whole = torch.zeros(1, 3, 7, 7, dtype=torch.uint8)
    assert_close(encoder(whole + 255), encoder.output(encoder.layers(torch.full((1, 3, 7, 7), 255.0))))


def test_scale_says_what_values_are_divided_by():
    torch.manual_seed(0)
    bytes_ = NatureCNN(pixels(1, 36, 36))
    torch.manual_seed(0)
    raw = NatureCNN(pixels(1, 36, 36), scale=1.0)
    torch.manual_seed(0)
    floats = NatureCNN(Box(0.0, 1.0, (1, 36, 36)))
    x = image(1, 36)
    assert_close(bytes_(x), floats(x.float() / 255), atol=1e-5, rtol=1e-4)
    assert_close(raw((x > 127).to(torch.uint8)), floats((x > 127).float()), atol=1e-5, rtol=1e-4)


def test_channels_are_given_or_inferred_from_the_shape():
    assert NatureCNN(pixels(64, 64, 3)).shape == (3, 64, 64)
    assert NatureCNN(pixels(3, 64, 64)).shape == (3, 64, 64)
    assert NatureCNN(pixels(40, 64, 3)).shape == (3, 40, 64)
    assert ImpalaCNN(pixels(7, 7, 20)).shape == (20, 7, 7)
    assert ImpalaCNN(pixels(8, 8, 8)).shape == (8, 8, 8)
    assert ImpalaCNN(pixels(6, 8, 8), channels="last").shape == (8, 6, 8)
    assert NatureCNN(pixels(84, 84)).shape == (1, 84, 84)


def test_what_is_an_image():
    assert all(map(is_image, [pixels(3, 84, 84), pixels(84, 84, 3), pixels(84, 84), pixels(4, 84, 84, 3)]))
    others = [pixels(128), Box(0, 10, (3, 8, 8), np.uint8), Box(0.0, 1.0, (3, 8, 8)), Discrete(3), pixels(2, 3)]
    assert not any(map(is_image, others))


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (Box(-1, 1, (5,)), {"image_encoder": NatureCNN}, "NatureCNN needs an image"),
        (pixels(3, 20, 20), {"image_encoder": NatureCNN}, "at least 36 × 36.*20 × 20.*ImpalaCNN"),
        (Dict({"a": Box(-1, 1, (5,))}), {"image_encoder": NatureCNN}, "no part of the observation is an image"),
        (Dict({"a": Box(-1, 1, (5,))}), {"encoders": {"a": NatureCNN}}, "NatureCNN needs an image"),
        (Dict({"a": Box(-1, 1, (5,))}), {"encoders": {"b": MLP}}, r"encoders names \['b'\]"),
        (Dict({"a": Box(-1, 1, (5,))}), {"actor_keys": ["b"]}, "actor_keys names 'b'"),
        (Box(-1, 1, (5,)), {"critic_keys": ["b"]}, "critic_keys names 'b'"),
        (Dict({"a": Discrete(2)}), {"shared": True, "actor_keys": ["a"]}, "same input"),
        (Box(-1, 1, (5,)), {"encoders": {"": lambda space: nn.Identity()}, "log_std_range": (1.0, 0.0)}, "must rise"),
        (Box(-1, 1, (5, 2)), {"encoders": {"": lambda space: nn.Identity()}}, r"returned \(2, 5, 2\)"),
        (Box(-1, 1, (5,)), {"distribution": "gsde", "sde_sample_freq": 0}, "sde_sample_freq must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(space, options, message):
    with pytest.raises(InputError, match=message):
        ActorCritic(space, Box(-1, 1, (1,)), **options)


def test_each_part_of_a_dict_has_its_encoder_and_they_are_concatenated():
    space = OBSERVATIONS["both"]
    make = {"state": partial(MLP, hidden_sizes=(5,), activation=nn.ReLU, layer_norm=True)}
    network = ActorCritic(space, Discrete(2), encoders=make, hidden_sizes=(16,))
    kinds = dict(zip(network.actor_trunk.names, map(type, network.actor_trunk.encoders), strict=True))
    assert kinds == {"camera": ImpalaCNN, "mode": nn.Flatten, "state": MLP}
    assert network.actor_trunk.layers[0].in_features == 256 + 3 + 5
    assert [type(layer) for layer in network.actor_trunk.encoders[2].layers] == [nn.Linear, nn.LayerNorm, nn.ReLU]
    # Each part matters, and only through its own encoder.
    policy = Policy(space, Discrete(2), lambda *_: network, **NO_NORMALISING)
    space.seed(0)
    sample = {key: torch.as_tensor(np.asarray(value))[None] for key, value in space.sample().items()}
    before, _ = policy(policy.features(sample))
    for key in ("camera", "state", "mode"):
        changed = {**sample, key: 1 - sample[key]}
        assert not torch.equal(policy(policy.features(changed))[0], before)


@pytest.mark.parametrize("rnn", [None, "lstm"])
def test_the_value_may_have_hidden_layers_of_its_own(rnn):
    network = ActorCritic(
        Box(-1, 1, (3,)), Discrete(2), hidden_sizes=(8,), critic_hidden_sizes=(16, 4), rnn=rnn, rnn_size=5
    )
    widths = [
        [layer.out_features for layer in trunk.layers if isinstance(layer, nn.Linear)]
        for trunk in (network.actor_trunk, network.critic_trunk)
    ]
    assert widths == [[8], [16, 4]]
    assert network.value_head.in_features == (4 if rnn is None else 5)


def test_an_image_alone_has_no_further_hidden_layers_by_default():
    assert len(ActorCritic(pixels(4, 84, 84), Discrete(2)).actor_trunk.layers) == 0
    assert len(ActorCritic(OBSERVATIONS["both"], Discrete(2)).actor_trunk.layers) == 4
    assert len(ActorCritic(Box(-1, 1, (3,)), Discrete(2), layer_norm=True).actor_trunk.layers) == 6


def test_a_shared_trunk_is_one_and_a_separate_one_two():
    shared = ActorCritic(pixels(4, 36, 36), Discrete(2), shared=True)
    separate = ActorCritic(pixels(4, 36, 36), Discrete(2))
    count = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    trunk = count(shared.actor_trunk)
    assert count(separate) == count(shared) + trunk
    x = image(4, 36)
    assert_close(shared.actor(x), shared(x)[0])
    assert_close(shared.critic(x), shared(x)[1])
    assert_close(separate.critic(x), separate(x)[1])


def test_a_privileged_critic_sees_what_the_actor_does_not():
    space = Dict({"seen": Box(-1, 1, (2,)), "hidden": Dict({"a": Box(-1, 1, (1,)), "b": Discrete(2)})})
    network = ActorCritic(space, Discrete(3), actor_keys=["seen"], critic_keys=["seen", "hidden"])
    policy = Policy(space, Discrete(3), lambda *_: network, **NO_NORMALISING)
    one = {"seen": torch.zeros(1, 2), "hidden.a": torch.zeros(1, 1), "hidden.b": torch.zeros(1, dtype=torch.int64)}
    other = {**one, "hidden.a": torch.ones(1, 1)}
    (p0, v0), (p1, v1) = (policy(policy.features(x)) for x in (one, other))
    assert torch.equal(p0, p1)
    assert not torch.equal(v0, v1)


def test_a_rollout_of_images_takes_a_byte_a_pixel():
    """In the rollout, and in what minibatches are drawn from."""
    model = PPO(partial(Spaces, "image"), **SMALL)
    batch = model.rollouts.collect()
    model.on_train_batch_start(batch, 0)
    samples = model.training_samples(batch)
    for tensor, rows in ((batch["observation"], 32), (samples["observation"], 32)):
        assert tensor.dtype == torch.uint8
        assert tensor.untyped_storage().nbytes() <= (rows + 2) * 3 * 12 * 12  # the row after the last step is kept, too
    nested = PPO(partial(Spaces, "both"), **SMALL)
    batch = nested.rollouts.collect()
    nested.on_train_batch_start(batch, 0)
    assert nested.training_samples(batch)["observation"]["camera"].dtype == torch.uint8
    assert batch["observation", "state"].dtype == torch.float32


def test_numbers_are_normalised_part_by_part_and_images_left_alone(fit):
    model = PPO(partial(Spaces, "both"), normalize_observation=True, **SMALL)
    batches = []
    update = model.update
    model.update = lambda batch: batches.append(batch.clone()) or update(batch)
    fit(model)
    assert list(model.policy.normalized) == ["state"]
    states = torch.cat([batch["observation", "state"].flatten(0, 1) for batch in batches]).double()
    assert_close(model.policy.moments.mean, states.mean(0))
    assert_close(model.policy.moments.variance, states.var(0, correction=0))
    features = model.policy.features({key: batches[0]["observation", key][0] for key in ("camera", "state", "mode")})
    assert features["camera"].dtype == torch.uint8
    expected = (batches[0]["observation", "state"][0] - states.mean(0)) / states.std(0, correction=0)
    assert_close(features["state"], expected.float(), atol=1e-5, rtol=1e-4)
    assert features["mode"].sum(-1).eq(1).all()


def test_nested_and_discrete_parts_are_encoded_as_they_should():
    space = Tuple((MultiDiscrete([2, 3], start=[1, 0]), Dict({"bits": MultiBinary(2)})))
    policy = Policy(space, Discrete(2), ActorCritic, **NO_NORMALISING)
    observation = {"0": torch.tensor([[2, 1]]), "1.bits": torch.tensor([[1, 0]], dtype=torch.int8)}
    features = policy.features(observation)
    assert_close(features["0"], torch.tensor([[0.0, 1, 0, 1, 0]]))
    assert_close(features["1.bits"], torch.tensor([[1.0, 0.0]]))


def test_predict_takes_nested_observations_one_or_many():
    model = PPO(partial(Spaces, "both", "tuple"), **SMALL)
    space = model.observation_space
    space.seed(1)
    one = space.sample()
    action = model.predict(one)
    assert model.action_space.contains(action)
    many = {key: np.stack([np.asarray(value)] * 3) for key, value in one.items()}
    batched = model.predict(many)
    assert_close(torch.as_tensor(batched[0]), torch.as_tensor(np.stack([action[0]] * 3)))
    for wrong, message in (
        ({**one, "state": np.zeros(4, np.float32)}, "for state"),
        ({key: one[key] for key in ("state", "mode")}, "needs observations of"),
        ({**many, "mode": one["mode"]}, "as many of each part"),
    ):
        with pytest.raises(InputError, match=message):
            model.predict(wrong)


def test_non_finite_parts_are_named():
    class Broken(Spaces):
        def step(self, action):
            observation, *rest = super().step(action)
            return {**observation, "state": np.full(3, np.nan, np.float32)}, *rest

    from ppo_lightning import EnvironmentFault

    with pytest.raises(EnvironmentFault, match="observation state that is not finite"):
        PPO(partial(Broken, "both"), **SMALL).rollouts.collect()
    with pytest.raises(EnvironmentFault, match="observation state that is not finite"):
        PPO(partial(Broken, "both"), **SMALL).evaluate(1)


def test_large_rollouts_of_images_pass_in_pieces_with_the_same_result():
    results, sizes = [], []
    for most in (None, 3 * 12 * 12 * 5):
        torch.manual_seed(0)
        model = PPO(partial(Spaces, "image"), **SMALL)
        model.seed = 0
        if most is not None:
            model.rollouts.MAX_NUMEL = most
            model.policy.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
        rollout = model.collect()
        results.append([rollout[key].clone() for key in ("action_log_prob", "state_value", "next_state_value")])
    assert len(sizes) == 7
    assert max(sizes) == 5
    assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)
