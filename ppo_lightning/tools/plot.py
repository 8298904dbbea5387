"""The learning curve of a run, as a picture."""

import io
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from ppo_lightning.errors import InputError
from ppo_lightning.runs.checkpoint import write_atomically
from ppo_lightning.tools.figures import can_draw
from ppo_lightning.tools.saved_runs import read_run


def draw_learning_curve(run: Path | str) -> Path | None:
    """Draw training and evaluation return over environment steps from what a run has left.

    Args:
        run: folder of the run.

    Returns:
        ``learning_curve.png`` in that folder; None where matplotlib is not installed or nothing was logged.
    """
    if not can_draw():
        return None
    try:
        found = read_run(Path(run))
    except InputError:
        return None
    from matplotlib.figure import Figure  # the plot extra

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps, returns = found.column("rollout/ep_rew_mean")
    axes.plot(steps, returns, label="training, mean of 100 episodes")
    steps, means, low, high = found.evaluations()
    if steps:
        (line,) = axes.plot(steps, means, label="evaluation, mean ± standard deviation")
        axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="environment steps", ylabel="return")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = Path(run) / "learning_curve.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    try:
        write_atomically(picture, buffer.getvalue())
    except OSError as error:  # a full disk
        rank_zero_warn(f"{picture} could not be written ({error})")
    return picture
