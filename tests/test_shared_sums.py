"""Sums over processes in shared memory are those that messages give."""

import os
import time
import warnings

import pytest
import torch
from processes import fit, forked
from torch import distributed

from ppo_lightning import PPO, InputError
from ppo_lightning.runs import shared_memory
from ppo_lightning.runs.shared_memory import SharedMemoryAllReduce

SMALL = {"env": "CartPole-v1", "num_envs": 2, "num_steps": 16, "total_steps": 6 * 64}

pytestmark = pytest.mark.skipif(
    not shared_memory.can_share(1, torch.device("cpu")), reason="this machine's processes share no memory"
)


def in_group(rank, world_size, function):
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    result = function(rank)
    distributed.destroy_process_group()
    return result


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_process_gets_the_same_sum_however_late_the_others_are(world_size):
    def adds(rank):
        sums, results = SharedMemoryAllReduce(rank, world_size, 100), []
        for turn in range(300):
            if turn % 50 == rank:
                time.sleep(0.01)
            tensor = torch.full((1 + turn % 100,), float(turn * 10**rank))
            sums.all_reduce(tensor)
            results.append(tensor)
        return results

    every = forked(lambda rank: in_group(rank, world_size, adds), world_size)
    weights = sum(10**rank for rank in range(world_size))
    for results in every:
        for turn, tensor in enumerate(results):
            assert torch.equal(tensor, torch.full((1 + turn % 100,), float(turn * weights)))


def test_every_process_gets_the_rows_of_all_to_the_last_bit():
    def gathers(rank):
        sums, rows = SharedMemoryAllReduce(rank, 2, 100), []
        for turn in range(50):
            row = torch.full((1 + turn % 50,), (turn + rank) / 3, dtype=torch.float64)
            assert sums.fits(row)
            rows.append(sums.gather(row))
        assert not sums.fits(torch.zeros(51, dtype=torch.float64))
        return rows

    for rows in forked(lambda rank: in_group(rank, 2, gathers)):
        for turn, both in enumerate(rows):
            assert both.shape == (2, 1 + turn % 50)
            assert (both == torch.tensor([[turn / 3], [(turn + 1) / 3]], dtype=torch.float64)).all()


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}, {"target_kl": 1e-3}])
def test_training_is_the_same_by_memory_and_by_messages(more):
    def trains(shares):
        def run(rank):
            torch.set_num_threads(1)
            shared_memory.can_share = lambda *_: shares
            torch.manual_seed(0)
            model = PPO(**SMALL, **more)
            fit(model, strategy="ddp", devices=2)
            return model.state_dict(), isinstance(model.ranks.shared, SharedMemoryAllReduce)

        return run

    (shared, by_memory), _ = forked(trains(True))
    (sent, by_messages), _ = forked(trains(False))
    assert (by_memory, by_messages) == (True, False)
    torch.testing.assert_close(shared, sent, rtol=0, atol=0)


def test_a_process_that_ended_is_missed_at_once_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)  # where no other test has files

    def dies(rank):
        sums = SharedMemoryAllReduce(rank, 2, 10)
        if rank == 1:
            os._exit(0)
        started = time.monotonic()
        with pytest.raises(distributed.DistError, match=r"rank 1 ended during an exchange"):
            sums.all_reduce(torch.ones(3))
        return time.monotonic() - started

    seconds, _ = forked(lambda rank: in_group(rank, 2, dies))
    assert seconds < 2
    assert not list(tmp_path.glob("ppo_lightning_*"))


def test_ranks_whose_gradients_are_of_different_parameters_are_named():
    def averages(rank):
        sums = SharedMemoryAllReduce(rank, 2, 10)
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        for one in parameters:
            one.grad = torch.full((2,), 1.0 + rank)
        sums.average_gradients(parameters)
        means = torch.cat([one.grad for one in parameters])
        parameters[1 + rank].grad = None
        with pytest.raises(InputError, match="other parameters on one rank than on another: let it use each of"):
            sums.average_gradients(parameters)
        return means

    for means in forked(lambda rank: in_group(rank, 2, averages)):
        assert torch.equal(means, torch.full((6,), 1.5))


def test_where_there_is_no_room_messages_are_sent_and_a_warning_says_so():
    def trains(rank):
        torch.set_num_threads(1)
        shared_memory.allocate = lambda size: None
        model = PPO(**SMALL)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(model, strategy="ddp", devices=2)
        return model.num_env_steps, [str(one.message) for one in said if "by messages" in str(one.message)]

    (steps, said), _ = forked(trains)
    assert steps == SMALL["total_steps"]
    assert len(said) == 1
    assert "no room for" in said[0]
