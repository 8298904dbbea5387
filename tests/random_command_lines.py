"""Random command lines: each must succeed, or end in one sentence.

``python tests/random_command_lines.py --seed 0 --count 150`` prints what did neither, and exits with status 1 if there is
any.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from processes import Ended, command

SMALL = [
    "--model.env", "CartPole-v1", "--model.num_envs", "2", "--model.num_steps", "32", "--model.total_steps", "128",
    "--model.num_eval_episodes", "1", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false",
]  # fmt: skip
FILES = {
    "good.yaml": "model: {env: CartPole-v1, num_envs: 2, num_steps: 32, total_steps: 128, num_eval_episodes: 1}\n",
    "more.yaml": "model:\n  gamma: 0.9\ntrainer: {accelerator: cpu, enable_model_summary: false}\n",
    "typo.yaml": "model:\n  env: CartPole-v1\n  num_env: 3\n",
    "section.yaml": "modle:\n  env: CartPole-v1\n",
    "wrong.yaml": "model:\n  env: CartPole-v1\n  gamma: high\n",
    "policy.yaml": "model:\n  env: CartPole-v1\n  policy: {class_path: ppo_lightning.ActorCritic, init_args: {hidden: 3}}\n",
    "fit.yaml": "fit:\n  model: {env: CartPole-v1, total_steps: 128, num_envs: 2, num_steps: 32}\n",
    "list.yaml": "- 1\n- 2\n",
    "text.yaml": "hello\n",
    "empty.yaml": "",
    "null.yaml": "model:\n",
    "broken.yaml": "model: {env: [\n",
    "tag.yaml": "model: !!python/object:os.system {}\n",
    "space.yaml": "model.gamma: [0.9, 0.99]\n",
    "range.yaml": "model.gamma: {distribution: uniform, min: 0.9, max: 0.8}\n",
    "last.ckpt": "no checkpoint",
    "mine.py": "import gymnasium\nclass NoSpaces(gymnasium.Env):\n    pass\ndef nothing():\n    return None\nvalue = 1\n",
}
VALUES = {
    "model.env": ["CartPole-v1", "Pendulum-v1", "CartPol-v1", "cartpole-v1", "ALE/Pong-v5", "no_module:Id-v0", "a.b.c", "", "3",
                  "mine.NoSpaces", "mine.nothing", "mine.value", "null", "[1]"],
    "model.num_envs": ["1", "3", "0", "-1", "abc", "1.5", "null", "[2]", "1e3", "nan"],
    "model.num_steps": ["16", "0", "many", "-4", "true"],
    "model.total_steps": ["64", "0", "-1", "inf", "abc"],
    "model.num_minibatches": ["2", "0", "1000", "x"],
    "model.gamma": ["0.9", "1.1", "-1", "nan", "high", "null"],
    "model.clip_range": ["0.1", "abc", "-1", "[1]", "{start: 0.3}", "{strat: 0.3}"],
    "model.clip_range.start": ["0.3", "abc"],
    "model.normalize_observation": ["true", "maybe", "3"],
    "model.normalize_reward": ["true", "false", "'false'"],
    "model.normalize_advantage": ["all_ranks", "some_ranks"],
    "model.vectorization": ["sync", "asyncc", "vector_entry_point", "null"],
    "model.env_kwargs": ["{max_episode_steps: 20}", "{foo: 1}", "abc", "[1]", "{max_episode_steps: abc}", "good.yaml"],
    "model.wrappers": ["[]", "[gymnasium.wrappers.TimeAwareObservation]", "gymnasium.wrappers.TimeLimit",
                       "[gymnasium.wrappers.TimeLimit]", "[no.such.Wrapper]", "[3]"],
    "model.policy": ["ppo_lightning.ActorCritic", "Foo", "no.such.Net", "torch.nn.Linear", "mine.nothing", "typo.yaml"],
    "model.policy.hidden_sizes": ["[8]", "[]", "[a]", "abc", "[-3]"],
    "model.policy.activation": ["torch.nn.ReLU", "relu", "torch.nn.Foo", "torch.nn.Linear"],
    "model.policy.hidden": ["[8]"],
    "model.policy.distribution": ["normal", "foo", "beta"],
    "model.policy.recurrent": ["lstm", "rnn", "null"],
    "model.optimizer": ["Adam", "SGD", "Adamm", "torch.nn.Linear", "3"],
    "model.optimizer.lr": ["0.001", "abc", "-1", "null"],
    "model.optimizer.lrr": ["0.001"],
    "model.lr_scheduler": ["null", "StepLR", "Foo", "ConstantLR"],
    "model.popart": ["null", "{beta: 0.001}", "{beta: 3}", "{gamma: 3}", "abc"],
    "model.target_kl": ["0.01", "0", "-1", "x"],
    "model.info_keys": ["[]", "[a]", "[1]", "a"],
    "model.metric_names": ["cleanrl", "sb4"],
    "model.sequence_length": ["8", "null", "x"],
    "model.num_env": ["3"],
    "modl.num_envs": ["3"],
    "n_envs": ["3"],
    "total_timesteps": ["3"],
    "seed_everything": ["3", "true", "-1", "abc", "99999999999"],
    "trainer.max_epochs": ["2", "abc", "-5", "0"],
    "trainer.max_epoch": ["3"],
    "trainer.max_steps": ["3", "-1"],
    "trainer.max_time": ["00:00:01:00", "abc", "3"],
    "trainer.strategy": ["auto", "ddp_typo", "fsdp", "deepspeed", "dp", "single_device", "3"],
    "trainer.accelerator": ["cpu", "auto", "tpu", "mps", "abc", "null"],
    "trainer.devices": ["1", "0", "-2", "abc", "1000", "auto", "[0]"],
    "trainer.num_nodes": ["1", "0", "2", "x"],
    "trainer.precision": ["32-true", "bf16-mixed", "16-true", "64", "half", "null"],
    "trainer.logger": ["false", "true", "CSVLogger", "Foo", "[CSVLogger]", "CometLogger", "MLFlowLogger", "3"],
    "trainer.callbacks": ["[]", "EarlyStopping", "Foo", "ModelCheckpoint", "no.such.Callback", "os.getcwd", "3"],
    "trainer.callbacks+": ["LearningRateMonitor", "ppo_lightning.callbacks.Dashbord", "torch.nn.Linear"],
    "trainer.default_root_dir": ["folder", "file.txt", "/proc/runs", "new/folder", "good.yaml"],
    "trainer.limit_val_batches": ["0", "1", "-1", "abc"],
    "trainer.limit_train_batches": ["1", "0", "abc"],
    "trainer.check_val_every_n_epoch": ["1", "0", "-1", "abc"],
    "trainer.val_check_interval": ["1.0", "3", "0.5", "abc"],
    "trainer.log_every_n_steps": ["1", "-1", "x"],
    "trainer.gradient_clip_val": ["0.5"],
    "trainer.accumulate_grad_batches": ["1", "2"],
    "trainer.fast_dev_run": ["true", "2", "-3", "abc"],
    "trainer.enable_progress_bar": ["false", "maybe"],
    "trainer.profiler": ["null", "foo"],
    "trainer.plugins": ["null", "Foo", "3"],
    "trainer.barebones": ["false", "true"],
    "trainer.detect_anomaly": ["true", "3"],
    "ckpt_path": ["null", "last", "best", "{run}/checkpoints/last.ckpt", "last.ckpt", "missing.ckpt", "folder", ""],
    "config": [*(name for name in FILES if name.endswith(".yaml")), "bytes.yaml", "folder", "missing.yaml", "{", "{model: 3}"],
    "model": ["3", "typo.yaml", "null", "missing.yaml"],
    "trainer": ["3", "null", "missing.yaml"],
    "print_config": [""],
    "foo": ["3"],
}  # fmt: skip
WORDS = ["foo", "--", "-x", "--model.", "--=3", "--trainer", "--config", "--ckpt_path", "--help"]
REPORT = [
    ["{run}"],
    ["missing"],
    ["folder"],
    ["good.yaml"],
    ["--out"],
    ["--out", "folder"],
    ["--group", "run"],
    ["--grup", "x"],
]
SWEEP = [
    ["--config", "good.yaml"], ["--config", "typo.yaml"], ["--config", "missing.yaml"], ["--config", "bytes.yaml"],
    ["--space", "space.yaml"], ["--space", "range.yaml"], ["--space", "typo.yaml"], ["--space", "missing.yaml"],
    ["--space", "list.yaml"], ["--trials", "abc"], ["--trials", "0"], ["--trails", "3"], ["--sampler", "foo"],
    ["--objective", "steps_to"], ["--objective", "foo"], ["--folder", "file.txt"], ["--model.gama", "3"], ["--seeds", "-1"],
]  # fmt: skip


class Fault(NamedTuple):
    """A command line that neither succeeded nor ended in one sentence."""

    line: str
    why: str
    ended: Ended


def random_line(draw: random.Random) -> list[str]:
    """Words of a command line, most of them with a mistake or two."""
    kind = draw.choices(["fit", "validate", "test", "report", "sweep", "other"], [60, 10, 6, 8, 10, 6])[0]
    if kind == "report":
        return ["report", *(word for part in draw.sample(REPORT, draw.randint(0, 3)) for word in part)]
    if kind == "sweep":  # seldom one that can be run: each of its trials takes seconds
        parts = draw.sample(SWEEP, draw.randint(0, 4))
        return ["sweep", *(word for part in parts for word in part), "--trials", draw.choice(["0", "x", "-1"])]
    given = ["--model.total_steps", "128"] if draw.random() < 0.1 else list(SMALL)
    for key in draw.sample(list(VALUES), draw.randint(0, 3)):
        value = draw.choice(VALUES[key])
        given += [f"--{key}={value}"] if draw.random() < 0.3 or not value else [f"--{key}", value]
    if draw.random() < 0.1:
        given.insert(draw.randint(0, len(given)), draw.choice(WORDS))
    if kind == "other":
        return draw.choice([given, ["predict", *given], ["fitt", *given], [*given, "fit"], []])
    return [kind, *given]


def prepare(folder: Path) -> None:
    """Put good and bad files into a folder."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "bytes.yaml").write_bytes(b"model:\n  env: \xff\xfe\n")
    (folder / "file.txt").write_text("a file")
    (folder / "folder").mkdir()


def complaint(ended: Ended) -> str | None:
    """What is wrong with the way in which a command ended; None where nothing is."""
    if ended.status is None:
        return "it did not end"
    if "Traceback" in ended.output + ended.error:
        return "a traceback"
    if ended.status == 0:
        return None
    said = [line for line in ended.error.splitlines() if line.startswith("error: ")]
    if ended.status not in (1, 2) or len(said) != 1:
        return f"status {ended.status} and {len(said)} sentences"
    if ended.error.rstrip().splitlines()[-1] != said[0]:
        return "more follows the sentence"
    return "usage" if "usage:" in ended.error else None


def faults(seed: int, count: int, timeout_s: float = 120) -> Iterator[Fault | None]:
    """Run random command lines, each in a folder of its own; None for each that ended as it should.

    Args:
        seed: of the lines.
        count: how many.
        timeout_s: after which a line counts as hanging (seconds).
    """
    draw, home = random.Random(seed), Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        try:
            for number in range(count + 1):
                folder = root / str(number)
                folder.mkdir()
                prepare(folder)
                os.chdir(folder)
                run = root / "0/lightning_logs/version_0"
                words = ["fit", *SMALL] if number == 0 else random_line(draw)
                words = [word.replace("{run}", str(run)) for word in words]
                ended = command(words, timeout_s=timeout_s)
                why = complaint(ended)
                if number:
                    yield None if why is None else Fault(" ".join(words), why, ended)
                elif why is not None or ended.status:
                    raise RuntimeError(f"the run that the others need failed: {ended.error}")
        finally:
            os.chdir(home)


def main() -> None:
    """Run lines and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--timeout_s", type=float, default=120)
    given = parser.parse_args()
    found = 0
    for number, fault in enumerate(faults(given.seed, given.count, given.timeout_s), 1):
        if fault is not None:
            found += 1
            print(f"{number}: {fault.why}\n  ppo-lightning {fault.line}\n{fault.ended.error[-1500:]}", flush=True)
    print(f"{given.count} command lines, {found} faults")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
