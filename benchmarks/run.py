"""Environment steps per second, with training, beside every peer that pip can install.

    python benchmarks/run.py [--workloads w1 w2 …] [--contestants ppo_lightning stable_baselines3 …] [--repeats 3]
                             [--scale 1.0] [--out benchmarks/results]

Workloads are the configs w*.yaml beside this file. Contestants take turns, each in a process of its own, peers in virtual
environments of their own (made at the first run from peers/*.txt). Warm-up and compilation are not timed, but reported.
Written are results.json, to which later runs add workloads, and speed.png; without --out, whose results are a trial's, the
table goes into README.md beside this file.
What could not be run is named, with the reason.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = "ppo_lightning"
PEERS = sorted(path.stem for path in (HERE / "peers").glob("*.txt"))
MARK = "<!-- what follows is written by run.py -->"
GENERAL = ("stable_baselines3", "rsl_rl", "torchrl", "skrl")  # those of which the best is the measure


@dataclass(frozen=True)
class Workload:
    """How long to run, and what else of ours to run."""

    steps: int
    """Timed environment steps of each run."""
    threads: int = 1
    variants: tuple[str, ...] = ("", "--eager")
    """Flags of ours.py, a contestant for each."""
    peers: bool = True
    """Whether others run it, too."""


WORKLOADS = {
    "w1": Workload(60_000, variants=("", "--eager", "--plain", "--eager --plain", "--bare", "--eager --bare")),
    "w1v": Workload(60_000, peers=False),
    "w1t": Workload(200_000),
    "w2": Workload(400_000),
    "w3": Workload(1_000_000, threads=2),
    "w3c": Workload(1_000_000, threads=2),
    "w4": Workload(30_000),
    "w5": Workload(8_192, threads=2, variants=("",)),
    "w7r": Workload(60_000, variants=("",)),
}


def interpreter(peer: str) -> tuple[str | None, str]:
    """Python of a peer's own environment, made if it is not there; or None and why not."""
    folder = HERE / ".venvs" / peer
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing {peer} …", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "peers" / f"{peer}.txt")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None, f"pip could not install it: {done.stderr.strip().splitlines()[-1]}"
        (folder / ".installed").touch()
    return str(python), ""


def run(script: str, python: str, workload: str, steps: int, flags: str = "") -> dict[str, Any]:
    """What one process measured; ``unsupported`` where it could not."""
    threads = str(WORKLOADS[workload].threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(HERE.parent)}
    if script != "ours.py":
        del environment["PYTHONPATH"]
    command = [python, str(HERE / script), "--workload", workload, "--steps", str(steps), "--threads", threads]
    try:
        done = subprocess.run([*command, *flags.split()], capture_output=True, text=True, env=environment, timeout=900)
    except subprocess.TimeoutExpired:
        return {"unsupported": "it took more than 15 minutes"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (json.JSONDecodeError, IndexError):
        lines = done.stderr.strip().splitlines()
        return {"unsupported": f"it failed: {lines[-1] if lines else done.returncode}"}


def measure(workload: str, contestants: list[str], repeats: int, scale: float) -> dict[str, Any]:
    """All contestants of a workload, in turn, ``repeats`` times."""
    size = WORKLOADS[workload]
    calls: dict[str, tuple[str, str, str]] = {}
    missing: dict[str, str] = {}
    for name in contestants:
        if name == OURS:
            for flags in size.variants:
                calls[f"{OURS} {flags.replace('--', '')}".strip()] = ("ours.py", sys.executable, flags)
            continue
        if not size.peers:
            continue
        python, reason = interpreter(name)
        if python is None:
            missing[name] = reason
        else:
            calls[name] = (f"peers/{name}.py", python, "")
    runs: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(repeats):
        for name, (script, python, flags) in list(calls.items()):
            result = run(script, python, workload, int(size.steps * scale), flags)
            if "unsupported" in result:
                missing[name] = result["unsupported"]
                runs.pop(name, None)
                del calls[name]
                continue
            runs.setdefault(name, []).append(result)
            print(f"{workload} {repeat + 1}/{repeats} {name}: {result['steps'] / result['seconds']:,.0f}", flush=True)
    parts = run("ours.py", sys.executable, workload, int(size.steps * scale), "--parts") if OURS in contestants else {}
    return {"runs": runs, "missing": missing, "parts_s": parts.get("parts_s", {}), "threads": size.threads}


def rate(runs: list[dict[str, Any]]) -> float:
    return statistics.median(one["steps"] / one["seconds"] for one in runs)


def table(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    lines = []
    versions: dict[str, str] = {}
    for workload, result in results.items():
        title = (HERE / f"{workload}.yaml").read_text().splitlines()[0].removeprefix("# ")
        threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
        lines += [f"\n### {workload.upper()}: {title}, {threads}\n"]
        lines += ["| | steps per second | slowest – fastest | ours over it | warm-up, s | peak memory, MB |"]
        lines += ["|---|---|---|---|---|---|"]
        ours = max(
            (rate(runs) for name, runs in result["runs"].items() if name in (OURS, f"{OURS} eager")),
            default=None,
        )
        for name, runs in sorted(result["runs"].items(), key=lambda item: -rate(item[1])):
            rates = [one["steps"] / one["seconds"] for one in runs]
            ratio = f"{ours / rate(runs):.2f}" if ours and name.split()[0] != OURS else ""
            first = statistics.median(one["first_s"] for one in runs)
            memory = max(one["peak_rss_mb"] for one in runs)
            spread = f"{min(rates):,.0f} – {max(rates):,.0f}"
            lines += [f"| {name} | {rate(runs):,.0f} | {spread} | {ratio} | {first:.1f} | {memory:,.0f} |"]
            versions |= runs[0]["versions"]
        peers = {name: rate(runs) for name, runs in result["runs"].items() if name in GENERAL}
        if peers and ours:
            best = max(peers, key=lambda name: peers[name])
            lines += [f"\nOver the best of {', '.join(peers)} ({best}): **{ours / peers[best]:.2f}**."]
        if "rejax" in result["runs"] and ours:
            lines += [f"\nOver rejax: **{ours / rate(result['runs']['rejax']):.2f}**."]
        beside = {"plain": "Lightning", "bare": "HealthMonitor and RunSummary"}
        for kind, without in itertools.product(("", " eager"), beside):
            through, rest = result["runs"].get(f"{OURS}{kind}"), result["runs"].get(f"{OURS}{kind} {without}")
            if through and rest:
                over = rate(rest) / rate(through) - 1
                lines += [f"\nOverhead of {beside[without]},{kind or ' compiled'}: {over:.1%} over the time without."]
        if result["parts_s"]:
            total = sum(result["parts_s"].values())
            shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in result["parts_s"].items())
            lines += [f"\nWhere our time goes: {shares}."]
        for name, reason in result["missing"].items():
            lines += [f"\n- {name}: {reason}"]
    named = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return f"{processor()}, {os.cpu_count()} cores; {named}\n" + "\n".join(lines) + "\n"


def processor() -> str:
    """What the machine calls itself."""
    try:
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of all contestants, relative to Stable-Baselines3 or the slowest."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(2.6 * len(results) + 1, 3.4), squeeze=False)
    for axis, (workload, result) in zip(axes[0], results.items(), strict=True):
        runs = {name: own for name, own in result["runs"].items() if name.split()[-1] not in ("plain", "bare")}
        names = sorted(runs, key=lambda name: rate(runs[name]))
        colours = ["#d9632b" if name.split()[0] == OURS else "#8aa3b8" for name in names]
        axis.barh([name.replace("_", " ") for name in names], [rate(runs[name]) for name in names], color=colours)
        axis.set_title(workload.upper())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_xlabel("environment steps per second")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--contestants", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file, readme = options.out / "results.json", HERE / "README.md"
    results = json.loads(file.read_text()) if file.exists() else {}
    for workload in options.workloads:
        results[workload] = measure(workload, options.contestants, options.repeats, options.scale)
        results = {name: results[name] for name in WORKLOADS if name in results}
        file.write_text(json.dumps(results, indent=1))
    draw(results, options.out / "speed.png")
    if options.out == HERE / "results":
        readme.write_text(readme.read_text().partition(MARK)[0] + MARK + "\n\n" + table(results))
    print(table(results))


if __name__ == "__main__":
    main()
