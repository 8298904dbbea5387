"""The learning curve of a run, as a picture."""

import csv
from pathlib import Path


def draw_learning_curve(run: Path | str) -> Path | None:
    """Draw training and evaluation return over environment steps from a run's ``metrics.csv``.

    Args:
        run: folder of the run.

    Returns:
        ``learning_curve.png`` in that folder; None where matplotlib is not installed or nothing was logged.
    """
    try:
        from matplotlib.figure import Figure  # the plot extra
    except ImportError:
        return None
    file = Path(run) / "metrics.csv"
    if not file.exists():
        return None
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))

    def column(key: str) -> tuple[list[float], list[float]]:
        points = [(float(row["step"]), float(row[key])) for row in rows if row.get(key)]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, returns = column("rollout/ep_rew_mean")
    axes.plot(steps, returns, label="training, mean of 100 episodes")
    steps, means = column("eval/mean_reward")
    _, spreads = column("eval/std_reward")
    if steps:
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        (line,) = axes.plot(steps, means, label="evaluation, mean ± standard deviation")
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = file.with_name("learning_curve.png")
    figure.savefig(picture, dpi=150)
    return picture
