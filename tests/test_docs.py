"""What the documents say is there, and what they show runs."""

import functools
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RUN_NAME

from benchmarks import learning
from ppo_lightning import PPO
from ppo_lightning.__main__ import main as console_script
from ppo_lightning.cli import PPOCLI, main
from ppo_lightning.rollout.collectors import TensorCollector
from ppo_lightning.tools import seeds, video
from ppo_lightning.tools.sweep import fit_process
from ppo_lightning.tools.sweep.space import read_space

ROOT = Path(__file__).parent.parent
README, POLICIES = (ROOT / "README.md").read_text(), (ROOT / "docs/policies.md").read_text()
SPEED = (ROOT / "docs/speed.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
METRICS = (ROOT / "docs/metrics.md").read_text()
PAGES = {
    path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))
}
DOCUMENTS = {"README": README, **{name: path.read_text() for name, path in PAGES.items()}}
FEW = shlex.split(
    "--trainer.max_epochs 1 --trainer.accelerator cpu --model.num_eval_episodes 1 "
    "--model.num_steps 64 --model.num_minibatches 2 --model.num_envs 2 --model.compile false"
)
"""Options that make a command of the documents short; the last value of an option wins."""
FEW_TRIALS = shlex.split("--trials 1 --seeds 1 --workers 1 --model.total_steps 1024 --model.num_eval_episodes 1")
MEASURED = """
import sys
(file,) = [word.partition("=")[2] for word in sys.argv if "callbacks.file" in word]
open(file, "w").write('{"steps": 1024, "seconds": 1, "value": 20}\\n')
"""
"""Stands for the run of a trial: that a trial trains is tested in test_sweep.py, which needs three processes."""
ELSEWHERE = ("from ray", "kind: TrainJob")
"""Blocks that :mod:`faults.test_ray` and :mod:`test_ddp` run."""


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language in a document, those inside lists included."""
    found = re.findall(rf"^( *)```{language}(?: [^\n]*)?\n(.*?)^\1```", DOCUMENTS[page], re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def each_block(language: str) -> list[Any]:
    """Parameters (page, block) for a test of all blocks of a language."""
    every = [(page, block) for page in DOCUMENTS for block in blocks(page, language)]
    every = [(page, block) for page, block in every if not any(mark in block for mark in ELSEWHERE)]
    names = [page for page, _ in every]
    ids = [f"{page}-{names[:index].count(page)}" for index, page in enumerate(names)]
    return [pytest.param(*one, id=name) for one, name in zip(every, ids, strict=True)]


def commands(block: str) -> list[list[str]]:
    return [words for line in block.replace("\\\n", "").splitlines() if (words := shlex.split(line, comments=True))]


def write_modules(page: str) -> None:
    """The blocks of a page that are files, which begin with a name, into this folder."""
    for module in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", module):
            Path(name[1]).write_text(module)


@pytest.fixture
def _at_home(monkeypatch):
    """Nothing leaves this folder, what a page leaves open is closed, videos are short, trials and runs on seeds empty."""
    monkeypatch.setattr(video, "MAX_FRAMES", 20)
    monkeypatch.setattr(fit_process, "FIT", [sys.executable, "-c", MEASURED])
    monkeypatch.setattr(seeds, "FIT", [sys.executable, "-c", ""])  # what they leave is tested in test_seeds.py
    Path("configs").symlink_to(ROOT / "configs")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)  # which the logger sets
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize(("page", "code"), each_block("python"))
def test_each_block_of_python_runs_by_itself(page, code, monkeypatch):
    if "NotebookDisplay" in code:
        monkeypatch.setenv("MPLBACKEND", "agg")
    write_modules(page)
    # A hundredth of the steps, in shorter iterations.
    code = re.sub(r"total_steps=(\d+)_000\b", lambda match: f"total_steps={int(match[1]) * 10}", code)
    code = code.replace("num_steps=1024", "num_steps=128").replace("num_minibatches=64", "num_minibatches=4")
    code = code.replace("num_episodes=100", "num_episodes=2").replace("trials=50", "trials=1")
    exec(compile(code, f"{page}.md", "exec"), {"__name__": page})


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the package as its console script does."""
    monkeypatch.setattr(sys, "argv", ["ppo-lightning", *words])
    console_script()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Give the folder in which two runs of a config were trained, once for all tests."""

    @functools.cache
    def trained(config: str) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("PL_GLOBAL_SEED", "0")
            patch.setattr(PPOCLI, "run_name", RUN_NAME)
            for _ in range(2):
                main(["fit", "--config", str(ROOT / config), *FEW])
        return folder

    return trained


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings(
    "ignore:The PyTorch Profiler default schedule will be overridden",
    "ignore:Checkpoint directory",
)
@pytest.mark.parametrize(("page", "block"), each_block("bash"))
def test_each_block_of_commands_runs_by_itself(page, block, monkeypatch, capsys, two_runs):
    """In a folder where one run was trained; of commands for several ranks what they are given is parsed."""
    earlier = "configs/hopper.yaml" if "hopper" in block else "configs/cartpole.yaml"
    if any(word in block for word in ("report", "validate", "last", "best")):
        shutil.copytree(two_runs(earlier), Path.cwd(), symlinks=True, dirs_exist_ok=True)
    if "--config sweeps/" in block:  # what the sweep above it on the page leaves
        Path("sweeps/cartpole").mkdir(parents=True)
        shutil.copy(ROOT / "configs/cartpole.yaml", "sweeps/cartpole/best.yaml")
    for words in commands(block):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), words
        elif words[:2] == ["pip", "install"]:
            (extra,) = re.findall(r"\[(\w+)\]", words[2])
            assert extra in EXTRAS
        elif "benchmarks.learning" in words:
            learning.parse(words[words.index("benchmarks.learning") + 1 :], learning.load_suite())
        elif words[0] == "tensorboard":
            assert find_spec("tensorboard")
        else:
            given = words[words.index("ppo_lightning") + 1 :]
            if "--help" in given or "ddp" in given:
                with pytest.raises(SystemExit) as ended:
                    run(given if "--help" in given else [*given, "--print_config"], monkeypatch)
                assert ended.value.code == 0, capsys.readouterr().err
            else:
                short = {"fit": FEW, "validate": FEW, "sweep": FEW_TRIALS}.get(given[0], [])
                run([*given, *short], monkeypatch)


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings("ignore:level 2 of the Curriculum waits for rollout")  # no episode ends in so few steps
@pytest.mark.parametrize(("page", "text"), each_block("yaml"))
def test_each_block_of_yaml_is_a_config_that_trains_or_a_space_that_can_be_searched(page, text, tmp_path):
    if page == "sweeps":
        Path("space.yaml").write_text(text)
        assert len(read_space("space.yaml")) == len(text.splitlines())
        return
    write_modules(page)
    Path("page.yaml").write_text(text.replace("sqlite:///mlflow.db", f"file:{tmp_path}/mlruns"))
    env = [] if "model:" in text and "env:" in text else ["--model.env", "CartPole-v1"]
    main(["fit", "--config", "page.yaml", *env, *FEW])
    assert len(list(Path().rglob("checkpoints/last.ckpt"))) == 1


def test_no_block_leaves_anything_out():
    for page in DOCUMENTS:
        for language in ("bash", "python", "yaml"):
            for block in blocks(page, language):
                assert "…" not in re.sub(r"#.*", "", block), (page, block)


def test_every_test_that_the_documents_name_exists():
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", "".join(DOCUMENTS.values()))
    assert len(names) > 30
    for file, name in names:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), name


def test_every_place_in_the_code_that_the_documents_name_exists():
    named = re.findall(r"`([\w/]+\.py)::(\w+)", "".join(DOCUMENTS.values()))
    assert len(named) > 5
    for file, name in named:
        if not file.startswith("test_"):
            assert re.search(rf"(class|def) {name}\b", (ROOT / "ppo_lightning" / file).read_text()), name


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    folder = PAGES.get(page, ROOT / "README.md").parent
    for link, anchor in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", DOCUMENTS[page]):
        assert (folder / link).exists(), link
        if anchor:
            headings = re.findall("^#+ (.*)$", (folder / link).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link


def test_the_example_network_is_short_and_trains(fit):
    code = next(block for block in blocks("own_network", "python") if "MyNetwork" in block)
    body = code.split("class MyNetwork")[1].split("model =")[0]
    assert len(body.strip().splitlines()) <= 15
    space: dict = {}
    exec(code.replace("policy=MyNetwork)", "policy=MyNetwork, num_envs=2, num_steps=32, total_steps=128)"), space)
    model = space["model"]
    fit(model)
    assert int(model.iterations) == 2
    action = model.predict(np.zeros(3, np.float32))
    assert model.action_space.contains(action)


def test_every_public_name_is_in_the_reference():
    """make docs fails where such a name has no docstring."""
    import ppo_lightning
    from ppo_lightning import callbacks

    public = {*ppo_lightning.MODULES, *callbacks.TOOLS}
    own = {name: getattr(value, "__module__", "") for name, value in vars(callbacks).items() if name[0].isupper()}
    public |= {name for name, module in own.items() if module.startswith("ppo_lightning.")}
    pages = "".join(text for page, text in DOCUMENTS.items() if page.startswith("api/"))
    assert public <= {name.rpartition(".")[2] for name in re.findall("^::: (.*)$", pages, re.MULTILINE)}


def test_every_option_of_the_network_is_in_the_documents():
    import inspect

    from ppo_lightning import ActorCritic

    options = list(inspect.signature(ActorCritic.__init__).parameters)[3:]
    known = POLICIES + README
    for option in options:
        assert option in known or option in ("activation", "layer_norm", "log_std_init"), option


@pytest.mark.parametrize("compile", [False, True])
def test_the_example_of_an_environment_that_is_tensors_learns(fit, compile, monkeypatch):
    monkeypatch.setattr(TensorCollector, "MAX_UNROLLED", 2)  # which compiles sooner
    space: dict = {}
    exec(re.findall(r"```python\n(.*?)```", SPEED, re.DOTALL)[0], space)
    model = PPO(space["Walk"], num_envs=32, num_steps=32, total_steps=20_000, compile=compile, num_eval_episodes=4)
    fit(model)
    assert model.evaluate(4)["eval/mean_reward"] == 1.0


def test_every_metric_is_in_the_documents(fit):
    """And none is there that nobody logs."""
    from lightning import Callback
    from probes import ActionMustMatch

    class Sees(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.update(trainer.callback_metrics)

        def on_validation_end(self, trainer, *_):
            logged.update(trainer.callback_metrics)

    logged: set = set()
    options = {"num_envs": 2, "num_steps": 16, "total_steps": 256, "target_kl": 0.1, "clip_range_vf": 0.2}
    for env in (ActionMustMatch, "MountainCarContinuous-v0"):
        model = PPO(env, **options, num_eval_episodes=1, eval_interval=4)
        fit(model, callbacks=[Sees()], limit_val_batches=1)
    table = METRICS.split("## Info metrics of environments")[0]
    named = set(re.findall(r"`((?:rollout|train|time|eval)/\w+)`", table))
    rare = {
        "eval/cut_episodes",
        "train/skipped_steps",
        "time/env_restarts",
        "rollout/fail_rate",
        "rollout/failures",
        "eval/fail_rate",
    }
    assert logged - {"step"} == named - rare


def test_the_example_of_events_runs(fit):
    (code,) = re.findall(r"```python\n(.*?)```", METRICS, re.DOTALL)
    space: dict = {}
    exec(code, space)
    fit(PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=64), callbacks=[space["watch"]])
