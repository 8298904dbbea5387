"""``ppo-lightning configs``: the configs that come with the package, with what they reach."""

from itertools import zip_longest

from ppo_lightning.arguments import PlainParser
from ppo_lightning.errors import InputError, exit_on_user_error
from ppo_lightning.shipped import description, near_name, shipped_configs


def main(words: list[str]) -> None:
    """Run ``ppo-lightning configs``: list the configs, or print one."""
    parser = PlainParser(
        prog="ppo-lightning configs",
        description="List the configs that --config finds by name, or print one, to change a copy of it.",
    )
    parser.add_argument("name", nargs="?", help="of the config to print")
    with exit_on_user_error():
        given, known = parser.parse_args(words), shipped_configs()
        if given.name is None:
            for name, path in known.items():
                first, *reached = description(path)
                for title, line in zip_longest([name], [first, *(reached or ["Its return has not been measured."])]):
                    print(f"{title or '':<26}{line}")
        elif given.name in known:
            print(known[given.name].read_text(encoding="utf-8"), end="")
        else:
            near = near_name(given.name)
            hint = f"did you mean {near}?" if near else "`ppo-lightning configs` lists them"
            raise InputError(f"there is no config {given.name}: {hint}")
