"""README.md against the code: its generated parts, the scripts, targets and settings that it names."""

import re

import pytest
import readme_parts
from conftest import ROOT

from common import config

TEXT = (ROOT / "README.md").read_text()


def test_the_parts_that_are_made_from_the_code_are_up_to_date():
    assert readme_parts.renewed(TEXT) == TEXT  # else: make readme


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:[a-z]+/)+\w+\.(?:py|sbatch|sh|html|md)\b", TEXT))))
def test_every_file_that_is_named_is_here(path):
    assert (ROOT / path).exists() or path.startswith(("data/", "checkpoints/", "demo/"))


def test_every_make_target_that_is_named_is_in_the_makefile():
    named = set(re.findall(r"\bmake ([a-z]+)\b", TEXT))
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= there


def test_every_setting_that_is_named_is_one():
    settings = set(re.findall(r"`(?:--set )?([a-z_]+\.[a-z_0-9]+)(?:=[^`]*)?`", TEXT))
    settings |= set(re.findall(r"--set ([a-z_]+\.[a-z_0-9]+)=", TEXT))
    sections = {(field.alias or name): field.annotation for name, field in config.Config.model_fields.items()}
    unknown = [s for s in settings if s.split(".")[0] in sections
               and s.split(".")[1] not in sections[s.split(".")[0]].model_fields]  # fmt: skip
    assert len(settings) >= 10
    assert not unknown


def test_a_stale_part_would_be_found():
    assert readme_parts.renewed(TEXT.replace("| `seed` |", "| `sede` |")) == readme_parts.renewed(TEXT)
    assert "| `seed` | `0` |" in readme_parts.settings()
    assert "`label_empty`" in readme_parts.rejects()
