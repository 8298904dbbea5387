"""The configs, and spaces of sweeps, that come with the package, by their names: ``--config cartpole --space cartpole``."""

import difflib
import re
from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped_configs(part: str = "") -> dict[str, Path]:
    """Paths by name, of configs or of spaces (``sweeps``): a wheel has them within the package, a checkout beside it."""
    folder = next((one for one in (PACKAGE / "configs", PACKAGE.parent / "configs") if one.is_dir()), PACKAGE)
    return {path.stem: path for path in sorted((folder / part).glob("*.yaml"))}


def located(given: str, part: str = "") -> str:
    """The path of the file with this name, where there is none of that name here; else what was given."""
    if not re.fullmatch(r"[\w-]+", given) or Path(given).is_file():
        return given
    return str(shipped_configs(part).get(given, given))


def near_name(given: str, part: str = "") -> str | None:
    """The name that is most like a name, or like the last part of a path, that was given; None where none is."""
    return next(iter(difflib.get_close_matches(Path(given).stem, shipped_configs(part), 1, cutoff=0.7)), None)


def description(path: Path) -> list[str]:
    """Sentences of a config's first comment, without what it needs or derives from, and the lines of what it reaches."""
    comment = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))
    lines = [line.removeprefix("# ") for line in (comment[0] if comment else "").splitlines()]
    reached = [line for line in lines if line.startswith("Reaches ")]
    text = " ".join(line for line in lines if line not in reached)
    return [re.split(r"(?<=[\w)])\. (?=[A-Z])", text, maxsplit=1)[0].rstrip("."), *reached]
