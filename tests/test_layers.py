"""Imports point down only."""

import ast
from pathlib import Path

import ppo_lightning

ROOT = Path(ppo_lightning.__file__).parent
LAYERS = [
    {"__main__", "__init__"},
    {"sweep"},
    {"cli", "report"},
    {"ppo", "plot"},
    {"trainer", "loggers"},
    {"callbacks"},
    {"evaluator", "pictures"},
    {"rollout", "evaluation", "prediction", "checkpoint", "metrics", "runs"},
    {"stepping", "streams"},
    {"compiled"},
    {"envs", "policy", "advantage", "loss"},
    {"diagnostics", "clock", "snapshot", "gradients", "resume", "shared_sums", "ranks", "history", "health"},
    {"spaces"},
    {"parameters", "arguments"},
    {"metric_names"},
    {"errors"},
]
HEIGHT = {room: -depth for depth, rooms in enumerate(LAYERS) for room in rooms}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_down_only():
    for path in ROOT.rglob("*.py"):
        here = room(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppo_lightning."):
                there = node.module.split(".")[1]
                assert there == here or HEIGHT[there] < HEIGHT[here], f"{path}: {node.module}"


def test_the_loss_is_two_hops_from_the_command():
    assert "ppo_lightning.ppo import PPO" in (ROOT / "cli.py").read_text()
    assert "ppo_lightning.loss import" in (ROOT / "ppo.py").read_text()
