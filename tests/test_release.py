"""What is released: a wheel that works in an environment of its own, one version, workflows that name actions by commit."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest
import yaml

import ppo_lightning

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Folder with the wheel and the sdist, as ``make dist`` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """Folder of the programs of an environment that has the wheel, and the packages here except this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    (python,) = folder.glob("bin/python")
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    (packages / "dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its own .pth files, one of which is ours, are not read
    (wheel,) = dist.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / "bin"


def test_the_wheel_trains_exports_and_reports_from_any_folder(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [installed / program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = partial(run, "ppo-lightning")
    found = run("python", "-c", "import ppo_lightning; print(ppo_lightning.__file__)").strip()
    assert Path(found).is_relative_to(installed.parent)
    assert (Path(found).parent / "py.typed").exists()
    assert "half_cheetah " in command("configs")
    small = [
        "--model.total_steps=512",
        "--model.num_steps=16",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    assert "trained 512 environment steps" in command("fit", "--config", "cartpole", *small)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    command("export", str(checkpoint))
    assert checkpoint.with_suffix(".onnx").exists()
    assert "report of 1 run" in command("report", "lightning_logs")


def test_the_wheel_has_every_module_template_and_config_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(ROOT)) for path in ROOT.glob("ppo_lightning/**/*") if path.is_file()}
    configs = {f"ppo_lightning/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.yaml")}
    assert names == {name for name in package if "__pycache__" not in name} | configs


def test_a_wheel_from_the_sdist_is_the_same(dist, tmp_path):
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    assert (tmp_path / "dist" / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == ppo_lightning.__version__ == citation["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_error_names_only_extras_that_there_are():
    named = {
        extra
        for path in ROOT.glob("ppo_lightning/**/*.py")
        for extra in re.findall(r"ppo-lightning\[([\w,]+)\]", path.read_text())
    }
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_actions_by_commit_and_targets_that_there_are(path):
    makefile = (ROOT / "Makefile").read_text()
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a@{'0' * 40}"))
            for target in re.findall(r"^make (.*)$", step.get("run", ""), re.MULTILINE):
                assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in target.split())


def test_only_the_job_that_publishes_may_write_and_it_has_no_token():
    (release,) = [yaml.safe_load(path.read_text()) for path in WORKFLOWS if path.stem == "release"]
    allowed = {name: job.get("permissions") for name, job in release["jobs"].items()}
    assert allowed == {"build": None, "publish": {"id-token": "write"}}
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
