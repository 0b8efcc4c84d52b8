"""What the README tells users to type works, and its table of settings is true."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from svd2_jax import cli
from svd2_jax.config import StreamConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    line.split(" #")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("svd2 ")
]


def test_the_readme_shows_every_kind_of_command():
    assert {command.split()[1] for command in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_has_options_that_exist(command):
    args = cli.parser().parse_args(shlex.split(command)[1:])
    config = getattr(args, "config", None)
    assert config is None or (ROOT / config).is_file()


def test_the_readme_names_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).is_file() for link in links + re.findall(r"bash (scripts/\S+)", README))


def test_the_table_of_settings_holds_the_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", README, re.MULTILINE)
    values = {name: yaml.safe_load(value) for name, value in rows}
    assert StreamConfig.from_dict(values) == StreamConfig()
    assert set(values) == set(StreamConfig().to_dict())
