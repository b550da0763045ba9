"""The shape of the code: which way imports point, how large its pieces are, and that no two share a name."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

# From the bottom to the top: a module imports from its own line and from those above it. The published model's
# files are at the bottom although they lie in publish/: Hugging Face copies them beside the weights.
LAYERS = [
    ("common", "common.archives", "common.imagery", "common.places"),
    ("publish.model",),
    ("preprocess.tars", "preprocess.duplicates", "preprocess.photographs"),
    ("preprocess.split",),
    ("preprocess.summary",),
    ("preprocess",),
    ("generate",),
    ("difficulty.bands",),
    ("difficulty.report",),
    ("difficulty.search",),
    ("difficulty",),
    ("train.run_record", "train.loss"),
    ("train.evaluation",),
    ("train.linear",),
    ("train.datasets",),
    ("train.sampling",),
    ("train.fitting",),
    ("train.report",),
    ("train.pairs",),
    ("train.tuning",),
    ("train",),
    ("publish.inference",),
    ("publish.retrieval",),
    ("publish.buildings",),
    ("publish.explorer",),
    ("publish.hub",),
    ("publish",),
    ("slurm",),
]
PACKAGES = ("common", "preprocess", "generate", "difficulty", "train", "publish", "slurm")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


def layer_of(module: str) -> int:
    """The number of the layer with the longest name that `module` is or lies in."""
    names = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    parts = module.split(".")
    return next(names[name] for length in range(len(parts), 0, -1) if (name := ".".join(parts[:length])) in names)


def imported_by(source: str, package: str) -> set[str]:
    """The pipeline's modules that a module of `package` imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            origin = f"{package}.{node.module}" if node.level else node.module or ""
            found |= {name for alias in node.names if (name := f"{origin}.{alias.name}") in MODULES}
            found |= {origin} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    imported = imported_by(MODULES[module].read_text(), module.rpartition(".")[0])
    upwards = [name for name in imported if layer_of(name) > layer_of(module)]
    assert not upwards


def test_no_two_modules_import_each_other_even_through_others():
    imports = {name: imported_by(path.read_text(), name.rpartition(".")[0]) for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(imports):
        ready = {name for name in imports if name not in done and imports[name] - {name} <= done}
        assert ready, f"a circle among {sorted(imports.keys() - done)}"
        done |= ready


def test_an_arrow_that_points_upwards_would_be_found():
    assert imported_by("def f():\n    from train.fitting import fit", "common") == {"train.fitting.fit"}
    assert layer_of("train.fitting.fit") > layer_of("common.cli")
    assert imported_by("from .projection_head import ProjectionHead", "publish.model") == {
        "publish.model.projection_head"
    }


def test_modules_and_classes_have_names_of_their_own():
    names = [path.stem for path in MODULES.values()]
    names += [
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name, count in Counter(names).items() if count > 1]


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_can_be_read_at_once(module):
    source = MODULES[module].read_text()
    assert source.count("\n") <= 400
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60]


def test_no_folder_holds_more_than_twelve_files():
    folders = {path.parent for path in MODULES.values()}
    counts = {folder: sum(map(Path.is_file, folder.iterdir())) for folder in folders}
    assert max(counts.values()) <= 12, counts
