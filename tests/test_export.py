"""Exported policies act as the policy does, in a process that cannot import this package."""

import json
from functools import partial
from pathlib import Path

import gymnasium as gym
import lightning
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from probes import Probe
from test_grid import GRID, make, pairwise_sample
from torch import nn

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.__main__ import run
from ppo_lightning.policy.distributions import (
    exponential_from_uniform,
    normal_from_uniform,
)
from ppo_lightning.tools import export as tool

SMALL = {"num_envs": 2, "num_steps": 8, "total_steps": 16, "num_minibatches": 2}


def names(cell) -> str:
    return "-".join(map(str, cell))


def trained(cell) -> PPO:
    """A model of a cell of the grid with moments, and weights that prefer some actions."""
    lightning.seed_everything(1, verbose=False)
    model = make(cell)
    model.trained_with_masks = cell[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        if model.policy.moments is not None:
            model.policy.moments.mean.normal_()
            model.policy.moments.variance.uniform_(0.5, 2.0)
    return model


FEW = pairwise_sample(GRID)[::4]


@pytest.mark.parametrize("cell", FEW, ids=names)
def test_onnx_acts_as_the_policy(cell, tmp_path):
    assert trained(cell).export(tmp_path / "policy.onnx") <= 1e-5


@pytest.mark.parametrize("cell", FEW[1::2], ids=names)
def test_pt2_acts_as_the_policy(cell, tmp_path):
    assert trained(cell).export(tmp_path / "policy.pt2") <= 1e-5


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cell", GRID, ids=names)
def test_every_cell_of_the_grid_exports(cell, tmp_path):
    model = trained(cell)
    for stochastic, bound in ((False, 1e-5), (True, 1e-4)):
        worst = model.export(tmp_path / "policy.onnx", stochastic=stochastic, force=True)
        print(f"stochastic {stochastic}: difference {worst:.3g}")
        assert worst <= bound


# --- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    lightning.seed_everything(1, verbose=False)
    return PPO("Pendulum-v1", normalize_observation=True, **SMALL)


def test_the_file_says_what_goes_in_and_out(model, fit, tmp_path):
    fit(model)
    model.export(tmp_path / "policy.onnx")
    contents = onnx.load(tmp_path / "policy.onnx")
    said = json.loads({one.key: one.value for one in contents.metadata_props}["ppo_lightning"])
    assert [opset.version for opset in contents.opset_import if opset.domain == ""] == [tool.OPSET]
    (given,), (action,) = said["inputs"], said["outputs"]
    assert (given["name"], given["dtype"], given["shape"]) == ("observation", "float32", [3])
    assert (action["name"], action["shape"], said["environment"]) == ("action", [1], "Pendulum-v1")
    assert "-2 to 2" in action["meaning"]
    assert said["environment_steps"] == 16
    assert set(said["versions"]) == {"ppo-lightning", "torch", "gymnasium"}
    assert [one.name for one in contents.graph.input] == ["observation"]
    assert contents.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    model.export(tmp_path / "policy.pt2")
    extra = {"ppo_lightning.json": ""}
    torch.export.load(tmp_path / "policy.pt2", extra_files=extra)
    assert json.loads(extra["ppo_lightning.json"]) == said


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_the_file_needs_what_the_actor_sees_alone(suffix, stochastic, tmp_path):
    policy = partial(ActorCritic, actor_keys=["place"], critic_keys=["place", "wind", "kind"])

    class Parts(Probe):
        def __init__(self):
            super().__init__()
            self.observation_space = Dict(kind=Discrete(3), place=Box(-1, 1, (2,)), wind=Box(-1, 1, (3,)))

    model = PPO(Parts, policy=policy, normalize_observation=True)
    assert model.export(tmp_path / f"policy.{suffix}", stochastic=stochastic) <= 1e-5
    if suffix == "onnx":
        inputs = [one.name for one in onnx.load(tmp_path / "policy.onnx").graph.input]
        assert inputs == ["observation.place"] + ["random"] * stochastic


class Returns(gym.Env):
    """Returns samples of a space."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    "space",
    [
        Box(-1.0, 1.0, (3,), np.float64),
        Box(-1.0, 1.0, (3,), np.float16),
        Box(0, 9, (3,), np.int32),
        Discrete(3, dtype=np.int32),
        MultiDiscrete([2, 3], dtype=np.int32),
        MultiBinary(3),
        Dict({"place": Box(-1.0, 1.0, (2,), np.float64), "kind": Discrete(2)}),
    ],
    ids=str,
)
def test_inputs_are_what_the_environment_returns(space, tmp_path):
    model = PPO(partial(Returns, space), **SMALL)
    model.export(tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    space.seed(1)
    sample = space.sample()
    parts = sample if isinstance(sample, dict) else {"": sample}
    given = {f"observation.{name}" if name else "observation": np.asarray(part)[None] for name, part in parts.items()}
    (action,) = session.run(None, given)
    np.testing.assert_allclose(action[0], model.predict(sample), atol=1e-5)


@pytest.mark.parametrize(
    ("space", "bounds"),
    [
        (Box(-1.0, 1.0, (40,)), "-1 to 1"),
        (Box(np.array([-2.0, 0.0]), np.array([1.0, 3.0]), dtype=np.float64), "[-2, 0] to [1, 3]"),
        (Box(np.full(40, -1.0), np.arange(40.0), dtype=np.float64), "bounds that differ"),
    ],
)
def test_metadata_has_the_bounds_of_each_element(space, bounds):
    graph = tool.PolicyGraph(PPO(partial(Returns, space), **SMALL), stochastic=False)
    assert graph.inputs[0].meaning.endswith(f", {bounds}")


def test_noise_of_uniform_numbers_has_the_distribution_of_noise():
    uniform = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0))
    normal = normal_from_uniform(uniform)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs(float(normal.pow(power).mean()) - moment) < 0.05
    exponential = exponential_from_uniform(uniform)
    assert abs(float(exponential.mean()) - 1) < 0.01
    assert abs(float((exponential > 2).float().mean()) - np.exp(-2)) < 0.005


@pytest.mark.parametrize("family", ["normal", "tanh", "beta", "gsde"])
def test_drawn_actions_have_the_mean_and_spread_of_predict(family):
    lightning.seed_everything(1, verbose=False)
    model = PPO("Pendulum-v1", policy=partial(ActorCritic, distribution=family, hidden_sizes=(8,)), **SMALL)
    graph, rows = tool.PolicyGraph(model, stochastic=True), torch.tensor([[0.6, 0.8, 1.0]]).expand(20_000, 3)
    size = 2 * model.policy.distribution.num_noise
    with torch.no_grad():
        drawn = graph(rows, torch.rand(20_000, size, generator=torch.Generator().manual_seed(1)))[0]
    own = torch.from_numpy(model.predict(rows.numpy(), deterministic=False))
    assert abs(float(drawn.mean() - own.mean())) < 0.05
    assert abs(float(drawn.std() / own.std()) - 1) < 0.03


def test_the_command_writes_the_file_beside_the_checkpoint(model, fit, tmp_path, capsys):
    fit(model).save_checkpoint(tmp_path / "run.ckpt")
    run(["export", str(tmp_path / "run.ckpt")])
    assert str(tmp_path / "run.onnx") in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if "run" in path.name) == ["run.ckpt", "run.onnx"]
    run(["export", str(tmp_path / "run.ckpt"), "--stochastic", "--out", str(tmp_path / "drawn.pt2")])
    assert (tmp_path / "drawn.pt2").exists()


class Untraceable(nn.Module):
    """A network that takes a number out of a tensor."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.actor, self.value = nn.Linear(3, 2), nn.Linear(3, 1)

    def forward(self, features):
        scale = 2.0 if float(features.sum()) > 0 else 1.0
        return self.actor(features * scale), self.value(features).squeeze(-1)


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        run(["export", *map(str, words)])
    said = capsys.readouterr().err or str(ended.value.code)
    assert "\n" not in said.strip()
    return said


def test_bad_input_is_one_sentence_and_leaves_no_file(model, fit, tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "run.ckpt"
    fit(model).save_checkpoint(checkpoint)
    (tmp_path / "there.onnx").write_text("kept")
    before = sorted(tmp_path.iterdir())
    assert "exists: give another name, or force (--force)" in refused(
        [checkpoint, "--out", tmp_path / "there.onnx"], capsys
    )
    assert "no suffix of a format" in refused([checkpoint, "--out", tmp_path / "policy.bin"], capsys)
    assert "another suffix" in refused([checkpoint, "--out", tmp_path / "policy.pt2", "--format", "onnx"], capsys)
    for folder in (tmp_path / "no", Path("/proc")):  # root may write to any folder, but not there
        assert f"the folder {folder} does not exist or cannot be written to" in refused(
            [checkpoint, "--out", folder / "policy.onnx"], capsys
        )
    assert "--format" in refused([checkpoint, "--format", "tflite"], capsys)
    assert "nothing.ckpt" in refused([tmp_path / "nothing.ckpt"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(tool.importlib.util, "find_spec", lambda name: None)
        assert 'pip install "ppo-lightning[export]"' in refused([checkpoint], capsys)
    with pytest.raises(InputError, match=r"the network Untraceable cannot be exported \("):
        PPO("Pendulum-v1", policy=Untraceable, **SMALL).export(tmp_path / "policy.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(tool, "run_elsewhere", lambda *_: [np.ones((256, 1), np.float32)])
        with pytest.raises(InputError, match="differs from predict by"):
            model.export(tmp_path / "policy.onnx")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.onnx").read_text() == "kept"


def test_integers_of_any_width_are_sampled_within_their_bounds():
    for dtype in (np.uint8, np.int64, np.uint64):
        info = np.iinfo(dtype)

        class Wide(Probe):
            def __init__(self, dtype=dtype, info=info):
                super().__init__()
                self.observation_space = Box(info.min, info.max, (3,), dtype)

        model = PPO(Wide, **SMALL)
        found = tool.sample_inputs(tool.PolicyGraph(model, stochastic=False), model)["observation"]
        assert found.shape == (256, 3)
        assert (found.astype(np.float64) >= info.min).all()
        assert (found.astype(np.float64) <= info.max).all()


@torch.no_grad()
def test_a_choice_differs_by_how_much_its_logit_misses_the_highest():
    lightning.seed_everything(1, verbose=False)
    model = PPO("CartPole-v1", **SMALL)
    graph = tool.PolicyGraph(model, stochastic=False)
    rows = torch.randn(4, 4)
    expected, logits = graph(rows), model.policy.actor(rows)
    other = 1 - expected[0]
    found = tool.largest_difference(graph, [rows], expected, [other.numpy()])
    assert found == pytest.approx(float((logits[:, 0] - logits[:, 1]).abs().max()))
    assert tool.largest_difference(graph, [rows], expected, [expected[0].numpy()]) == 0.0
