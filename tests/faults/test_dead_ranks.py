"""F21: one process raises, dies, hangs or is stopped; the others end soon, and say which it was."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import failing_job
import pytest
from failing_job import Fails
from processes import forked

ROOT = Path(__file__).parent.parent.parent
CASES = list(itertools.product((0, 1), ("raise", "kill", "hang", "freeze")))
SAYS = {
    "raise": "rank {}: ZeroDivisionError: the pole is at infinity",
    "kill": r"rank {}( has sent no heartbeat since iteration [12] \(\d s ago\): it died|, .* does not answer: it is gone"
    r"| ended during)",  # where the store is gone with the first process
    "hang": r"rank {} has sent no heartbeat since iteration [123] \(\d s ago\): it died or hangs",
    "freeze": r"rank {}( has sent no heartbeat since iteration [123] \(\d s ago\): it died or hangs"
    r"|, .* does not answer: it hangs)",  # where the store is within the process that is stopped
}


@pytest.mark.parametrize(("rank", "fault"), CASES)
def test_the_process_that_is_left_names_the_other(rank, fault):
    """Whoever started the processes: each of them ends by itself."""
    results = forked(
        lambda _: failing_job.run(Fails(rank, fault, timeout_s=1.0, hang_s=12.0 if fault == "freeze" else 2.5))
    )
    survivor, failed = results[1 - rank], results[rank]
    assert (failed is None) == (fault != "raise")
    last = survivor.strip().splitlines()[-1]
    if fault == "raise" and rank == 0:  # its words may have gone with it
        assert re.search("rank 0(: ZeroDivisionError|, .* does not answer| ended during)", last)
        assert "ZeroDivisionError" in failed
    else:
        assert re.search(SAYS[fault].format(rank), last), survivor


@pytest.mark.parametrize("fault", ["kill", "hang"])
def test_of_three_processes_the_two_that_are_left_name_the_third_alone(fault):
    """Though one of them may have waited for the other, and not for it."""
    results = forked(lambda _: failing_job.run(Fails(1, fault, timeout_s=1.5, hang_s=4.0), devices=3), world_size=3)
    for survivor in (results[0], results[2]):
        last = survivor.strip().splitlines()[-1]
        assert re.search(SAYS[fault].format(1), last), survivor
        assert "rank 0" not in last
        assert "rank 2" not in last


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        case if case == (1, "hang") else pytest.param(*case, marks=pytest.mark.long)
        for case in CASES
        if case != (0, "freeze")  # the command itself, which can end once it runs again
    ],
)
def test_a_job_of_which_one_process_fails_is_gone_within_its_timeout(rank, fault, tmp_path):
    """Started as users do; within ten seconds more than the others wait, no process is left, and one was named."""
    timeout_s = 2.0
    job = [sys.executable, str(ROOT / "tests/failing_job.py"), str(rank), fault, str(timeout_s)]
    places = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    with open("log", "w") as log:
        code = subprocess.run(job, env=environment, stdout=log, stderr=log, timeout=120).returncode
    begun = float(re.findall(r"fault at (\S+)", Path("log").read_text())[0])
    pids = [int(Path(f"pid_{number}").read_text()) for number in (0, 1)]
    while any(runs(pid) for pid in pids):
        assert time.time() < begun + timeout_s + 10, Path("log").read_text()
        time.sleep(0.1)
    assert time.time() < begun + timeout_s + 10
    assert code != 0
    told = Path("log").read_text()
    assert re.search("^" + SAYS[fault].format(rank), told, re.MULTILINE), told


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
