"""Speed over a plain torch loop, as a guard against changes that make training slower: a few minutes on an idle core.

    python benchmarks/quick.py [--record]

Four workloads, each several times in turn with the loop of peers/cleanrl.py, in this process; what counts is the median of the
ratios. It fails where one is below 90 % of what results/quick.json has, which --record writes.
"""

import argparse
import contextlib
import io
import json
import runpy
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD = HERE / "results" / "quick.json"
SIZES = {
    "w1": (40_000, "w1", 20_000),
    "w1t": (100_000, "w1", 20_000),
    "w2": (200_000, "w2", 100_000),
    "w4": (20_480, "w4", 8_192),
}
"""Timed environment steps of ours, and workload and steps of the plain loop, which has no environments that are tensors."""
LEAST = 0.9
"""Of the recorded ratio."""


def rate(script: str, workload: str, steps: int) -> float:
    """Environment steps per second of a script beside this file."""
    before, path = sys.argv, list(sys.path)
    sys.argv = [script, "--workload", workload, "--steps", str(steps)]
    sys.path.insert(0, str(HERE / "peers"))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(HERE / script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before, path
    result = json.loads(printed.getvalue().strip().splitlines()[-1])
    return result["steps"] / result["seconds"]


def measure(repeats: int, scale: float = 1.0) -> dict[str, float]:
    """Ratio of ours to the plain loop, by workload."""
    ratios: dict[str, list[float]] = {name: [] for name in SIZES}
    for repeat in range(repeats):
        for name, (steps, beside, plain_steps) in SIZES.items():
            ours = rate("ours.py", name, int(steps * scale))
            plain = rate("peers/cleanrl.py", beside, int(plain_steps * scale))
            ratios[name].append(ours / plain)
            print(
                f"{name} {repeat + 1}/{repeats}: {ours:,.0f} and {plain:,.0f} steps per second, {ours / plain:.2f}",
                flush=True,
            )
    return {name: round(statistics.median(own), 3) for name, own in ratios.items()}


def slower(ratios: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A sentence for each workload that is too slow."""
    return [
        f"{name}: {ratio:.2f} times the plain loop, {ratio / recorded[name]:.0%} of the recorded {recorded[name]:.2f}"
        for name, ratio in ratios.items()
        if ratio < LEAST * recorded[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the ratios instead of comparing them")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    ratios = measure(options.repeats)
    print(json.dumps(ratios))
    if options.record:
        sys.path.insert(0, str(HERE.parent))
        from benchmarks.run import processor

        machine = {name: version(name) for name in ("torch", "lightning", "gymnasium")} | {"machine": processor()}
        RECORD.write_text(json.dumps({"ratios": ratios, **machine}, indent=1) + "\n")
        return
    too_slow = slower(ratios, json.loads(RECORD.read_text())["ratios"])
    if too_slow:
        sys.exit("slower than recorded:\n" + "\n".join(too_slow))


if __name__ == "__main__":
    main()
