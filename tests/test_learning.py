"""Learning curves over three seeds, by the configs as they stand: minutes to an hour (``make test-long``)."""

import statistics

import pytest

from benchmarks.learning import train

SEEDS = (1, 2, 3)


@pytest.fixture
def root(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    return tmp_path


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("config", "bound"), [("cartpole", 490), ("acrobot", -85), ("pendulum", -210)])
def test_every_seed_reaches(config, bound, root):
    assert min(train(config, seed, root, []) for seed in SEEDS) >= bound


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("config", "bound"),
    [
        ("lunar_lander", 230),
        ("half_cheetah", 1500),
        ("mountain_car_continuous", 90),
        ("hopper", 2000),
        ("walker2d", 2000),
    ],
)
def test_the_mean_of_the_seeds_reaches(config, bound, root):
    assert statistics.mean(train(config, seed, root, []) for seed in SEEDS) >= bound


NO_MEMORY = ["--model.policy.init_args.rnn", "null", "--model.sequence_length", "null"]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", None])
def test_what_only_memory_can_know_is_known_with_memory_alone(kind, masked, root):
    flags = NO_MEMORY if kind is None else ["--model.policy.init_args.rnn", kind]
    returns = [train("memory", seed, root, [*flags, "--model.env_kwargs.masked", str(masked)]) for seed in SEEDS]
    assert max(returns) <= 0.6 if kind is None else min(returns) >= 0.95


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_masks_reach_in_a_quarter_of_the_steps_what_is_not_reached_without(root):
    masked = [train("masked", seed, root / "with", []) for seed in SEEDS]
    flags = ["--model.env_kwargs.masked", "false", "--model.total_steps", "200000"]
    unmasked = [train("masked", seed, root / "without", flags) for seed in SEEDS]
    assert min(masked) > 9 > 8 > max(unmasked)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("config", "bound"), [("pendulum_gsde", -200), ("pendulum_tanh", -250), ("pendulum_beta", -250)]
)
def test_every_seed_of_every_family_reaches(config, bound, root):
    assert min(train(config, seed, root, []) for seed in SEEDS) >= bound


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_pong_is_learnt(root):
    assert train("atari", 1, root, ["--model.total_steps", "1000000"]) >= -19
