"""Policies on the Hugging Face Hub, or in a folder of the same files: ``ppo-lightning push``, :meth:`PPO.from_pretrained`.

The folder holds ``model.safetensors`` (weights, statistics, counters), ``config.yaml`` (hyperparameters, which ``fit`` takes),
``README.md`` (model card with the return that was evaluated), and where there are any the learning curve and a video.
"""

import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_warn

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import EnvironmentFault, InputError, exit_on_user_error
from ppo_lightning.ppo import PPO
from ppo_lightning.runs.checkpoint import CHECKPOINT_KEY, read_checkpoint
from ppo_lightning.runs.hyperparameters import LIGHTNING_KEYS, tuples_to_lists
from ppo_lightning.tools.trained_policy import add_checkpoint, checkpoint_path, trusted

WEIGHTS, CONFIG, CARD, CURVE, VIDEO = (
    "model.safetensors",
    "config.yaml",
    "README.md",
    "learning_curve.png",
    "replay.mp4",
)
FILES = (WEIGHTS, CONFIG, CARD, CURVE, VIDEO)
NOT_KEPT = ("processes", "episodes")
"""Of our entries in a checkpoint: what only resuming needs."""

Module = TypeVar("Module", bound=PPO)


def save_folder(
    checkpoint: str | Path,
    folder: Path,
    name: str,
    *,
    episodes: int = 100,
    video: bool = True,
    hyperparameters: Mapping[str, Any] | None = None,
) -> float:
    """Write a checkpoint's policy as the files of a model repository.

    Args:
        checkpoint: path of the file.
        folder: that is created; a file of the same name in it is replaced, and nothing is written if anything fails before.
        name: of the repository, for the card.
        episodes: deterministic ones, whose return the card states.
        video: record an episode, where the environment renders images.
        hyperparameters: that replace the checkpoint's, or that it cannot hold.

    Returns:
        Mean return of the episodes.

    Raises:
        InputError: the checkpoint cannot be loaded, the folder cannot be written to, or a library is missing.
    """
    _check_installed()
    _check_folder(folder)
    from safetensors.torch import save_file

    contents = read_checkpoint(checkpoint)
    model = PPO.load_from_checkpoint(checkpoint, **(hyperparameters or {}))
    try:
        found = model.evaluate(num_episodes=episodes, deterministic=True)
        with tempfile.TemporaryDirectory() as place:
            written = Path(place) / "files"
            written.mkdir()
            # Modules in common have several names for one tensor, which safetensors refuses.
            weights = {key: value.clone().contiguous() for key, value in contents["state_dict"].items()}
            save_file(weights, written / WEIGHTS, metadata={CHECKPOINT_KEY: json.dumps(_entries(contents))})
            (written / CONFIG).write_text(_config(contents))
            curve = Path(checkpoint).parent.parent / CURVE
            if curve.is_file():
                shutil.copy(curve, written / CURVE)
            if video:
                _try_to_record(model, written / VIDEO)
            (written / CARD).write_text(_card(model, name, found, episodes, written))
            (written / WEIGHTS).chmod(0o644)  # safetensors gives it to the user alone
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            for file in FILES:  # those of an earlier policy, too
                (folder / file).unlink(missing_ok=True)
            shutil.copytree(written, folder, dirs_exist_ok=True)
    finally:
        model.close_environments()
    return found["eval/mean_reward"]


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{folder} cannot be written: {there} is no folder that can be written to; give another one")
    blocked = [name for name in FILES if (folder / name).is_dir()]
    if blocked:
        raise InputError(f"{folder / blocked[0]} is a folder, and a file of this name is to be written: remove it")


def _check_installed(*names: str) -> None:
    for name in names or ("huggingface_hub", "safetensors"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'{name} is not installed: pip install "ppo-lightning[hub]"')


def _entries(contents: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds beside weights and hyperparameters, as plain data."""
    own = {key: value for key, value in contents[CHECKPOINT_KEY].items() if key not in NOT_KEPT}
    hyperparameters = contents["hyper_parameters"]
    kept = {key: contents[key] for key in ("pytorch-lightning_version", "hparams_name") if key in contents}
    return {**kept, "instantiator": hyperparameters.get("_instantiator"), CHECKPOINT_KEY: own}


def _config(contents: dict[str, Any]) -> str:
    """Hyperparameters as a config of the command line."""
    values = {key: value for key, value in contents["hyper_parameters"].items() if key not in LIGHTNING_KEYS}
    plain = json.loads(json.dumps(tuples_to_lists(values), default=list))
    return yaml.safe_dump({"model": plain}, sort_keys=False)


def _try_to_record(model: PPO, file: Path) -> None:
    """Record an episode where that is possible; a card without a video is one, too."""
    from ppo_lightning.tools.video import record

    try:
        record(model, file.parent).replace(file)
    except (InputError, EnvironmentFault) as error:
        rank_zero_warn(f"no video: {error}")


def _card(model: PPO, name: str, found: dict[str, float], episodes: int, files: Path) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    environment = model.env_factory.name
    mean, spread = found["eval/mean_reward"], found["eval/std_reward"]
    data = ModelCardData(
        library_name="ppo_lightning",
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "deep-reinforcement-learning", "ppo", "pytorch-lightning", environment],
        model_name=f"PPO on {environment}",
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=environment,
                dataset_name=environment,
                metric_type="mean_reward",
                metric_name="mean_reward",
                metric_value=f"{mean:.2f} +/- {spread:.2f}",
                verified=False,
            )
        ],
    )
    packages = ("ppo-lightning", "torch", "lightning", "gymnasium")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    pictures = f"![learning curve]({CURVE})\n\n" * (files / CURVE).exists()
    pictures += f"An episode: [{VIDEO}]({VIDEO})\n\n" * (files / VIDEO).exists()
    return f"""---
{data}
---

# PPO on {environment}

Mean return **{mean:.2f} ± {spread:.2f}** (standard deviation) over {episodes} episodes with the most probable actions, after
{model.num_env_steps:,} environment steps with seed {model.seed}.

```python
from ppo_lightning import PPO

model = PPO.from_pretrained("{name}")
action = model.predict(observation)
```

Train it again: `ppo-lightning fit --config {CONFIG} --seed_everything {model.seed}`.

{pictures}Versions: {versions}.
"""


# --- loading -----------------------------------------------------------------------------------------------------------


class _NamedBytes(io.BytesIO):
    """Bytes that messages call by a name."""

    name = ""

    def __str__(self) -> str:
        return self.name


def load_pretrained(kind: type[Module], source: str | Path, revision: str | None, given: dict[str, Any]) -> Module:
    """A model of a repository, or of a folder with its files (see :meth:`PPO.from_pretrained`)."""
    _check_installed("safetensors")
    from safetensors import SafetensorError, safe_open

    folder = Path(source) if Path(source).is_dir() else _downloaded(str(source), revision)
    try:
        config = dict(yaml.safe_load((folder / CONFIG).read_text())["model"])
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            entries = json.loads(file.metadata()[CHECKPOINT_KEY])
        instantiator = entries.pop("instantiator")
        entries[CHECKPOINT_KEY] = {**entries[CHECKPOINT_KEY], **{name: [] for name in NOT_KEPT}}
    except (OSError, SafetensorError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source} holds no policy of ppo_lightning ({type(error).__name__}: {error}): it needs {CONFIG} and {WEIGHTS} as "
            "`ppo-lightning push` writes them"
        ) from error
    noted = {} if instantiator is None else {"_instantiator": instantiator}
    data = _NamedBytes()
    data.name = str(source)
    torch.save({**entries, "state_dict": weights, "hyper_parameters": {**config, **noted}}, data)
    data.seek(0)
    return kind.load_from_checkpoint(data, **given)


def _downloaded(repository: str, revision: str | None) -> Path:
    """The folder in the Hub's cache."""
    _check_installed("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except HFValidationError:
        raise InputError(f"{repository!r} is neither a folder here nor a repository's name: give user/name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"{repository} could not be downloaded ({_first_line(error)}): check its name, the network, and for a private one "
            "HF_TOKEN"
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". :")


# --- pushing -----------------------------------------------------------------------------------------------------------


def push(
    repository: str,
    checkpoint: str | Path,
    *,
    local_folder: str | Path | None = None,
    private: bool = False,
    episodes: int = 100,
    video: bool = True,
    force: bool = False,
    **hyperparameters: Any,
) -> tuple[str, float]:
    """Evaluate a checkpoint's policy, and upload it with a model card, or write the same files to a folder.

    Args:
        repository: user/name on the Hub.
        checkpoint: path of the file.
        local_folder: write there, and upload nothing.
        private: make a repository that is created a private one.
        episodes: deterministic ones, whose return the card states.
        video: record an episode, where the environment renders images.
        force: write into a folder that holds something.
        hyperparameters: that replace the checkpoint's, or that it cannot hold, such as ``env=MyEnv``.

    Returns:
        Where it is, and the mean return of the episodes.

    Raises:
        InputError: the name is none, the checkpoint cannot be loaded, the folder holds something, a library is missing, or
            the Hub refuses.
    """
    _check_installed()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise InputError(f"{repository!r} is no name of a repository: give user/name")
    options: dict[str, Any] = {"episodes": episodes, "video": video, "hyperparameters": hyperparameters}
    if local_folder is not None:
        local_folder = Path(local_folder)
        if local_folder.exists() and (not local_folder.is_dir() or any(local_folder.iterdir())) and not force:
            raise InputError(f"{local_folder} holds something: give another folder, or --force to write into it")
        return str(local_folder), save_folder(checkpoint, local_folder, repository, **options)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        api = HfApi()
        try:
            if api.token is None and not os.environ.get("HF_TOKEN"):
                api.whoami()  # reads the stored token, and raises where there is none
        except LocalTokenNotFoundError:
            raise InputError("the Hub needs to know who you are: `hf auth login`, or set HF_TOKEN") from None
        except (HfHubHTTPError, OSError) as error:
            raise InputError(
                f"the Hub does not say who you are ({_first_line(error)}): check HF_TOKEN or `hf auth login`, and the network"
            ) from None
        mean = save_folder(checkpoint, folder, repository, **options)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="PPO by ppo_lightning")
        except (HfHubHTTPError, OSError) as error:
            raise InputError(
                f"{repository} could not be uploaded ({_first_line(error)}): check the name, that HF_TOKEN may write there, "
                "and the network"
            ) from None
        return f"{api.endpoint}/{repository}", mean


def main(words: list[str]) -> None:
    """Run ``ppo-lightning push``: evaluate, write, upload, print where it is."""
    parser = PlainParser(
        prog="ppo-lightning push",
        description="Upload a checkpoint's policy to the Hugging Face Hub: weights, config, and a card with its return.",
    )
    add = parser.add_argument
    add("repository", metavar="USER/REPO", help="created if it is missing")
    add_checkpoint(parser)
    add("--local-folder", type=Path, metavar="FOLDER", help="write the files there, and upload nothing")
    add("--private", action="store_true", help="create a private repository")
    add("--episodes", type=int, default=100, help="episodes of the evaluation on the card (default: 100)")
    add("--no-video", action="store_true", help="record no episode")
    add("--force", action="store_true", help="write into a local folder that holds something")
    with exit_on_user_error():
        given = parser.parse_args(words)
        checkpoint = checkpoint_path(given)
        place, mean = push(
            given.repository,
            checkpoint,
            local_folder=given.local_folder,
            private=given.private,
            episodes=given.episodes,
            video=not given.no_video,
            force=given.force,
            **trusted(given, checkpoint),
        )
        print(f"policy  {place}  (mean return {mean:.2f} over {given.episodes} episodes)")
