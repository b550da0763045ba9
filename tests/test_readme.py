"""README.md against the code: its generated parts, the scripts, targets and settings that it names."""

import ast
import re

import pytest
import readme_parts
from conftest import ROOT

from common import sections

TEXT = (ROOT / "README.md").read_text()
STAGES = ("preprocess", "generate", "difficulty", "train", "publish", "slurm")


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
    models = {(field.alias or name): field.annotation for name, field in sections.Config.model_fields.items()}
    unknown = [s for s in settings if s.split(".")[0] in models
               and s.split(".")[1] not in models[s.split(".")[0]].model_fields]  # fmt: skip
    assert len(settings) >= 10
    assert not unknown


def texts_of_the_code() -> set[str]:
    """Every piece of text in the pipeline's code; an f-string is one for each stretch between its values."""
    paths = [path for folder in ("common", *STAGES) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_error_that_is_explained_is_one_that_the_code_tells():
    section = TEXT.split("## When something goes wrong")[1].split("\n## ")[0]
    messages = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    fragments = [fragment for message in messages for fragment in re.findall(r"`([^`]+)`", message)]
    texts = texts_of_the_code()
    unknown = [f for f in fragments if not f.endswith(".py") and not any(f in text for text in texts)]
    assert len(fragments) > 15
    assert not unknown


def test_a_stale_part_would_be_found():
    assert readme_parts.renewed(TEXT.replace("| `seed` |", "| `sede` |")) == readme_parts.renewed(TEXT)
    assert "| `seed` | `0` |" in readme_parts.settings()
    assert "`label_empty`" in readme_parts.rejects()
