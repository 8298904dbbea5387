"""Learning curves over three seeds, by the configs as they stand: minutes to an hour (``make test-long``)."""

import statistics

import pytest
from learning import train

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
