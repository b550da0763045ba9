"""config.toml and the code that reads it: no dead setting, and none read that is not there. Oracle: the modules'
syntax trees.
"""

import ast

import pytest
import tomli
from conftest import ROOT

from common import config, sections
from slurm import chain

FOLDERS = ("common", "preprocess", "generate", "difficulty", "train", "publish", "slurm")
TREE = tomli.loads(config.DEFAULT_PATH.read_text())
SECTIONS = [name for name in TREE if name != "slurm"]


def sources():
    """Every module of the pipeline but the models of the configuration themselves."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path: ast.parse(path.read_text()) for path in paths if path.name != "sections.py"}


def names_read(tree: ast.AST) -> set[str]:
    """Attributes that are read, and keys of records ("training.margin"): the two ways to use a setting."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.fixture(scope="module")
def read() -> set[str]:
    return set().union(*map(names_read, sources().values()))


@pytest.mark.parametrize("section", [*SECTIONS, "slurm"])
def test_every_setting_is_read_by_some_stage(section, read):
    # whole sections are recorded in provenance by name: that alone is not a use, so look for each key's own name
    aliases = {"workers": "threads", "root": "logs_dir"}  # properties of the models, and what is under the root
    keys = [key for key, value in TREE[section].items() if not isinstance(value, dict) or key == "search_space"]
    unread = [key for key in keys if not {key, aliases.get(key)} & read]
    assert not unread


def test_every_setting_of_a_stages_jobs_is_read():
    read = names_read(ast.parse((ROOT / "slurm" / "jobs.py").read_text()))
    assert set(sections.SlurmArray.model_fields) <= read
    arrays = {name for name, value in config.load().slurm if isinstance(value, sections.SlurmArray)}
    many = config.load(None, ["slurm.difficulty_shards=2"])
    assert arrays == {step.resources for step in chain.steps_of(many, tune=2) if step.tasks > 1}


def test_every_setting_that_is_read_is_in_config_toml():
    unknown = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)):
                continue
            owner, section = node.value.value, node.value.attr.rstrip("_")
            if isinstance(owner, ast.Name) and owner.id == "cfg" and section in TREE:
                model = sections.Config.model_fields[node.value.attr].annotation
                if not hasattr(model, node.attr) and node.attr not in TREE[section]:
                    unknown.append(f"{path.relative_to(ROOT)}:{node.lineno} cfg.{section}.{node.attr}")
    assert not unknown


def test_a_dead_setting_would_be_found():
    assert "max_reject_share" in names_read(ast.parse("if share > cfg.data.max_reject_share: fail()"))
    assert "max_reject_share" not in names_read(ast.parse("max_reject_share = 0.2"))
