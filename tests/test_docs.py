"""README.md, CONTRIBUTING.md and docs/*.md against the code: their generated parts, and the files, links, make
targets, settings, tests and error messages that they name."""

import ast
import re
from pathlib import Path

import documented_changes
import generated_docs
import pytest
import tomli
import yaml
from conftest import ROOT

from common import config, sections
from common.errors import PipelineError
from generate import backbone
from publish.model.modeling_spatial_embeddings import POOLINGS
from slurm import chain
from train.loss import LOSSES
from train.sampling.samplers import SAMPLERS

STAGES = ("preprocess", "generate", "difficulty", "train", "publish", "slurm")
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in generated_docs.DOCUMENTS}
ALL = "\n".join(TEXTS.values())
CONTRIBUTING = TEXTS["CONTRIBUTING.md"]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]


def without_new_files(text: str) -> str:
    """A document without the files that a reader adds, and without their names."""
    text = re.sub(r"^ *```py .*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for path in documented_changes.new_files(CONTRIBUTING):
        text = re.sub(rf"\S*{Path(path).stem.removeprefix('test_')}\S*", "", text)
    return text


# --------------------------------------------------------------------------------------------- generated parts


@pytest.mark.parametrize("document", TEXTS)
def test_the_generated_parts_are_up_to_date(document):
    assert generated_docs.renewed(TEXTS[document]) == TEXTS[document]  # else: make docs


@pytest.mark.parametrize("name", generated_docs.PARTS)
def test_every_generated_part_is_in_one_document(name):
    assert ALL.count(f"<!-- {name} -->") == ALL.count(f"<!-- end of {name} -->") == 1


def test_a_stale_part_would_be_found():
    text = TEXTS["docs/reference.md"]
    stale = text.replace("| `seed` |", "| `sede` |")
    assert stale != text
    assert generated_docs.renewed(stale) == text
    assert "| `seed` | `0` |" in generated_docs.settings()
    assert "`label_empty`" in generated_docs.rejects()


# ----------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize(
    "path",
    sorted(set(re.findall(r"(?<!/)\b(?:[a-z]+/)+\w+\.(?:py|sbatch|sh|html|md)\b", without_new_files(ALL)))),
)
def test_every_file_that_is_named_is_here(path):
    assert (ROOT / path).exists() or path.startswith(("data/", "checkpoints/", "demo/"))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*TEXTS, "CHANGELOG.md"])
def test_every_link_within_the_repository_leads_somewhere(document):
    text, broken = (ROOT / document).read_text(), []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (ROOT / document).parent / path if path else ROOT / document
        if "://" in target:
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
            broken.append(target)
    assert not broken


def test_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(([\w/]+\.md)[)#]", TEXTS["README.md"]))
    assert linked == {*TEXTS, "CHANGELOG.md"} - {"README.md"}


def test_every_make_target_that_is_named_is_in_the_makefile():
    named = set(re.findall(r"\bmake ([a-z]+)\b", ALL))
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "docs"} <= named <= there


@pytest.mark.parametrize("document", TEXTS)
def test_every_setting_that_is_named_is_one(document):
    text = without_new_files(TEXTS[document])
    settings = set(re.findall(r"`(?:--set )?([a-z_]+\.[a-z_0-9]+)(?: ?=[^`]*)?`", text))
    settings |= set(re.findall(r"--set ([a-z_]+\.[a-z_0-9]+)=", text))
    models = {(field.alias or name): field.annotation for name, field in sections.Config.model_fields.items()}
    unknown = [s for s in settings if s.split(".")[0] in models
               and s.split(".")[1] not in models[s.split(".")[0]].model_fields]  # fmt: skip
    assert document != "README.md" or len(settings) >= 10
    assert not unknown


def test_every_test_that_is_named_is_one():
    named = set(re.findall(r"`(test_\w+)`", CONTRIBUTING))
    there = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert named
    assert not named - there


# ---------------------------------------------------------------------------------------------------- messages


def texts_of_the_code() -> set[str]:
    """Every piece of text in the pipeline's code; an f-string is one for each stretch between its values."""
    paths = [path for folder in ("common", *STAGES) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_error_that_is_explained_is_one_that_the_code_tells():
    section = TEXTS["docs/troubleshooting.md"].split("## When something goes wrong")[1].split("\n## ")[0]
    messages = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    fragments = [fragment for message in messages for fragment in re.findall(r"`([^`]+)`", message)]
    texts = texts_of_the_code()
    unknown = [f for f in fragments if not f.endswith(".py") and not any(f in text for text in texts)]
    assert len(fragments) > 15
    assert not unknown


POOLED = config.load().embedding_model
FORGOTTEN = {  # what CONTRIBUTING.md says one sees -> a way to see it
    "pooling without step 1": lambda: config.entry(
        POOLINGS, "embedding_model.pooling", "gem", "publish/model/modeling_spatial_embeddings.py"
    ),
    "pooling without step 2": lambda: config.load(None, ["embedding_model.pooling=gem"]),
    "loss without step 1": lambda: config.entry(LOSSES, "training.loss", "circle", "train/loss.py"),
    "loss without step 2": lambda: config.load(None, ["training.loss=circle"]),
    "sampler without step 1": lambda: config.entry(
        SAMPLERS, "training.sampler", "bands", "train/sampling/samplers.py"
    ),
    "sampler without step 2": lambda: config.load(None, ["training.sampler=bands"]),
    "family without step 1": lambda: backbone.check(POOLED, "vit"),
    "stage without step 5": lambda: chain.select(chain.steps_of(config.load()), "count_views", None),
}


def quoted_by_contributing() -> list[str]:
    """The messages in its tables of what one sees if one forgets something."""
    tables = re.findall(r"^\| if you forget .*\n((?:\|.*\n)+)", CONTRIBUTING, re.MULTILINE)
    cells = [line.split("|")[2] for table in tables for line in table.splitlines()[1:]]
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if " " in text]


@pytest.mark.parametrize("step", FORGOTTEN)
def test_a_forgotten_step_gives_an_error_that_contributing_quotes(step):
    with pytest.raises(PipelineError) as caught:
        FORGOTTEN[step]()
    assert sum(text in str(caught.value) for text in quoted_by_contributing()) == 1


def test_every_message_that_contributing_quotes_has_its_words_in_the_code():
    words = [line.strip() for text in texts_of_the_code() for line in text.splitlines() if len(line.strip()) >= 8]
    messages = [text for text in quoted_by_contributing() if not text.startswith("AttributeError")]  # Python's own
    assert len(messages) > len(FORGOTTEN)
    assert not [message for message in messages if not any(text in message for text in words)]


# ------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("change", documented_changes.changes(CONTRIBUTING), ids=str)
def test_a_change_that_is_shown_applies_to_the_code(change):
    parse = tomli.loads if change.path.endswith(".toml") else ast.parse
    parse(documented_changes.apply(change, (ROOT / change.path).read_text()))


def test_a_change_that_does_not_apply_is_found():
    (change, *_) = documented_changes.changes("```diff\n--- a.py\n def f():\n-    return 1\n+    return 2\n```\n")
    assert documented_changes.apply(change, "x = 1\ndef f():\n    return 1\n") == "x = 1\ndef f():\n    return 2\n"
    for text in ("def f():\n    return 3\n", 2 * "def f():\n    return 1\n"):
        with pytest.raises(ValueError, match="not once"):
            documented_changes.apply(change, text)


# ------------------------------------------------------------------------------------- the project's own files


def test_the_first_screen_of_readme_says_what_has_not_been_run():
    first_screen = TEXTS["README.md"].split("<!-- end of demo -->")[0]
    assert len(first_screen.splitlines()) <= 60
    for words in ("no results with DINOv2 on real photographs yet", "nothing has been run on a GPU yet"):
        assert words in " ".join(first_screen.split())


def test_the_repositorys_address_is_the_same_everywhere():
    home = PROJECT["urls"]["Homepage"]
    assert f"git clone {home} " in TEXTS["README.md"]
    others = [*PROJECT["urls"].values(), *re.findall(r"https://github.com/embedding[\w/-]*", ALL)]
    assert all(address.startswith(home) for address in others)


def test_the_version_is_the_same_everywhere():
    released = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert released[0] == PROJECT["version"] == cited


def test_ci_runs_the_supported_pythons_and_pre_commit_the_pinned_ruff():
    workflow = yaml.safe_load(Path(ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    oldest, newest = matrix["python"][0], matrix["python"][-1]
    assert f">={oldest}" == PROJECT["requires-python"]
    others = [{"python": oldest, "versions": "lowest"}, {"python": newest, "versions": "newest"}]
    assert (matrix["versions"], matrix["include"]) == (["pinned"], others)
    assert f"Python {oldest} to {newest}" in " ".join(TEXTS["docs/installing.md"].split())
    assert f"Python {oldest} or newer" in TEXTS["README.md"]
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{pinned}"
