"""Whatever is typed, a command succeeds or ends in one sentence."""

import pytest
from random_command_lines import faults


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_150_random_command_lines_succeed_or_end_in_one_sentence(seed):
    assert [fault for fault in faults(seed, 150) if fault is not None] == []
