"""The import graph of the package."""

import ast
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ppo_lightning

ROOT = Path(ppo_lightning.__file__).parent
LAYERS = [
    {"tools"},
    {"__main__", "__init__"},
    {"cli"},
    {"ppo"},
    {"callbacks"},
    {"runs"},
    {"rollout", "evaluation"},
    {"metrics"},
    {"algorithm"},
    {"envs", "policy"},
    {"spaces"},
    {"parameters", "arguments", "module", "compiler"},
    {"shipped"},
    {"metric_names", "help"},
    {"errors"},
]
HEIGHT = {room: -depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run, which excludes the bodies of ``if TYPE_CHECKING``."""
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and is_type_checking(node.test):
        children = iter(node.orelse)
    for child in children:
        yield child
        yield from statements(child)


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports by a statement."""
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT.parent).parts[: -node.level]) if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_point_down_only():
    for path in ROOT.rglob("*.py"):
        here = room(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "ppo_lightning" and len(parts) > 1 and parts[1] in HEIGHT:
                assert parts[1] == here or HEIGHT[parts[1]] < HEIGHT[here], f"{path}: {name}"


def test_only_tools_imports_tools():
    importers = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if any(f"{name}.".startswith("ppo_lightning.tools.") for name in imported(path))
    }
    assert {Path(name).parts[0] for name in importers} == {"tools"}


def test_callbacks_names_the_tools_and_pickles_them():
    from ppo_lightning import callbacks

    for name, module in callbacks.TOOLS.items():
        found = getattr(callbacks, name)
        assert found.__module__ == f"ppo_lightning.tools.{module}"
        assert pickle.loads(pickle.dumps(found)) is found
    assert set(callbacks.TOOLS) <= set(dir(callbacks))
    assert isinstance(pickle.loads(pickle.dumps(callbacks.Dashboard())), callbacks.Dashboard)


@pytest.mark.parametrize("name", ["Dashboard", "HealthMonitor", "EvaluationVideo", "RunReport"])
@pytest.mark.parametrize("prefix", ["", "ppo_lightning.callbacks."])
def test_the_command_line_takes_tools_by_short_name_and_by_path(capsys, name, prefix):
    from ppo_lightning.cli import main

    with pytest.raises(SystemExit) as end:
        main(["fit", "--model.env", "CartPole-v1", f"--trainer.callbacks+={prefix}{name}", "--print_config"])
    assert end.value.code == 0
    assert f".{name}\n" in capsys.readouterr().out


TRAIN = """
import lightning
import ppo_lightning
from ppo_lightning import PPO, callbacks

assert ppo_lightning.__file__.startswith(FOLDER), ppo_lightning.__file__
assert not hasattr(callbacks, "HealthMonitor")
model = PPO("CartPole-v1", num_envs=4, num_steps=32, total_steps=256)
lightning.Trainer(accelerator="cpu").fit(model)
assert (model.num_env_steps, model.policy_version) == (256, 2)
"""


def test_a_bare_trainer_trains_without_the_tools(tmp_path):
    shutil.copytree(ROOT, tmp_path / "ppo_lightning", ignore=shutil.ignore_patterns("tools", "__pycache__"))
    code = TRAIN.replace("FOLDER", repr(str(tmp_path)))
    environment = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_loss_is_two_hops_from_the_command():
    assert "ppo_lightning.ppo import PPO" in (ROOT / "cli.py").read_text()
    assert "ppo_lightning.algorithm.loss import" in (ROOT / "ppo.py").read_text()


def test_the_command_line_is_imported_without_garbage_collections():
    """With those of what was imported they would be a third of the time of ``fit --help``; others run as before."""
    code = (
        "import gc, sys; full = []; gc.callbacks.append(lambda phase, info: full.append(info['generation'] == 2))\n"
        "from ppo_lightning.__main__ import import_for_good; import_for_good('ppo_lightning.cli')\n"
        "print('lightning' in sys.modules, gc.isenabled(), sum(full), len(gc.get_objects()) < 10_000)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True True 0 True\n"
