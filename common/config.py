"""The configuration: config.toml, validated strictly by the models of common/sections.py.

config.toml is the only place with defaults: a missing key is an error, and so is an unknown one.
`--set section.key=value` overrides; the value is TOML (0.2, true, [1, 2]) or else a plain string.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError
from common.sections import Config, EmbeddingModel, Paths, Training, suggestion

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "config.toml"


def load(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration at `path` (default: the repository's) with `--set` overrides; paths made absolute.

    Raises ConfigError with every mistake of the file at once.
    """
    path = Path(path or DEFAULT_PATH)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        tree = tomli.loads(text)
    except OSError as error:
        if path == DEFAULT_PATH and not (path.parent / "pyproject.toml").exists():
            raise ConfigError(
                f"{path.parent} is not a checkout of the repository, from which the pipeline runs\n"
                "clone it, and there run `pip install -e .` instead of `pip install .` (docs/installing.md)"
            ) from None
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    mistakes = _mistakes(tree)
    if mistakes:
        file_is_wrong = _mistakes(tomli.loads(text))
        summary = f"{path} is not a valid configuration:" if file_is_wrong else "invalid --set value:"
        raise ConfigError("\n".join([summary, *mistakes]))
    return _absolute(Config.model_validate(tree), path.resolve().parent)


def values(cfg: Config, *keys: str) -> dict[str, Any]:
    """The settings named ("section.key" or "section") as plain values: what a stage records of its settings."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    chosen: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        chosen |= {f"{section}.{n}": plain[section][n] for n in ([name] if name else plain[section])}
    return chosen


def entry(table: dict[str, Any], setting: str, name: str, file: str) -> Any:
    """The entry of a table of choices that a setting names. `file`: where the table is defined.

    Raises ConfigError for a name that common/sections.py allows but the table lacks.
    """
    if name not in table:
        raise ConfigError(f"{setting} = {json.dumps(name)}: {file} has no such entry, only {', '.join(table)}")
    return table[name]


def with_training(cfg: Config, **changes) -> Config:
    """`cfg` with these keys of [training] changed and validated. Raises ConfigError."""
    try:
        training = Training.model_validate({**cfg.training.model_dump(), **changes})
    except ValidationError as error:
        mistakes = "; ".join(mistake["msg"] for mistake in error.errors())
        raise ConfigError(f"[training] is not valid with {changes}: {mistakes}") from None
    return cfg.model_copy(update={"training": training, "paths": paths_of(cfg, training.run)})


def to_toml(cfg: Config) -> str:
    """The whole configuration as a TOML file that `load` reads back, with its placeholders, for other runs."""
    sections = cfg.model_dump(mode="json", by_alias=True) | {"paths": cfg.templates.model_dump(mode="json")}
    return "\n".join(f"[{name}]\n{''.join(_lines(section))}" for name, section in sections.items())


def _lines(tree: dict, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if value and isinstance(value, dict):
            yield from _lines(value, f"{prefix}{key}.")
        else:  # strings, numbers, booleans, lists and {} look the same in JSON and TOML
            yield f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}\n"


def is_folder(name: str) -> bool:
    """Whether a model's name is a folder or file on this machine (`load` makes those absolute), not on the hub."""
    return Path(name).is_absolute()


def vector_files(name: str) -> list[Path]:
    """The Parquet files at `name`, if it is one or a folder of them: of vectors that another network has made;
    empty if it is a model's folder, or a name on the hub."""
    path = Path(name)
    if not is_folder(name) or (path / "config.json").is_file():
        return []
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def label_of(model: EmbeddingModel) -> str:
    """What {backbone} in [paths] stands for: the model's label, or if that is "auto", a name made of its settings,
    such as "dinov2-base-cls-1-0.5"; of a table of vectors, its own name."""
    if model.label != "auto":
        return model.label
    revision = re.sub(r"^([0-9a-f]{8})[0-9a-f]{32}$", r"\1", model.revision)  # of a commit, its first digits
    parts = [Path(model.name).name.removesuffix(".parquet")]
    if not vector_files(model.name):
        parts += [revision] if revision != "main" and not is_folder(model.name) else []
        parts += [model.pooling, *(f"{view:g}" for view in model.views)]
        parts += [model.dtype] if model.dtype != "auto" else []
    return re.sub(r"[^\w.-]", "-", "-".join(parts)).lstrip(".-")


def paths_of(cfg: Config, run: str, backbone: str | None = None) -> Paths:
    """The directories of another run, of the same backbone or of another one with this label."""
    return cfg.templates.filled(backbone=backbone or label_of(cfg.embedding_model), run=run)


def _absolute(cfg: Config, base: Path) -> Config:
    root = (base / cfg.paths.root.expanduser()).resolve()
    templates = {name: (root / path.expanduser()).resolve() for name, path in cfg.paths if name != "root"}
    model = cfg.embedding_model
    folder = base / Path(model.name).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".parquet"):
        model = model.model_copy(update={"name": str(folder.resolve())})
    elif model.name.startswith((".", "/", "~")) or folder.suffix == ".parquet":
        raise ConfigError(f"embedding_model.name: no such folder or Parquet file: {folder}")
    cfg = cfg.model_copy(update={"embedding_model": model})
    cfg._templates = Paths.model_construct(root=root, **templates)
    return cfg.model_copy(update={"paths": paths_of(cfg, cfg.training.run)})


def _apply(tree: dict, override: str) -> None:
    """Set one value in the tree of the file; its type and range are validated later."""
    dotted, equals, text = (part.strip() for part in override.partition("="))
    *sections, key = dotted.split(".")
    if not equals or not sections or not key:
        raise ConfigError(f"--set {override}: write it as --set section.key=value")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            raise ConfigError(f"--set {dotted}: no such section: {section}{suggestion(section, node)}")
        node = node[section]
    if key not in node and "search_space" not in sections:
        raise ConfigError(f"--set {dotted}: [{'.'.join(sections)}] has no key {key}{_hint(key, sections)}")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text  # a plain string: a path, a name
    field = _fields_of(sections).get(key)
    is_text = field is not None and field.annotation in (str, Path)
    # a run may be called 2024, and a time limit is 04:00:00
    node[key] = text if is_text and not isinstance(value, str) else value


def _hint(key: str, sections: list[str]) -> str:
    """Which key, or which section, an unknown key of a section may have been meant for."""
    homes = [name for name in _fields_of([]) if key in _fields_of([name]) and [name] != sections]
    return f"; it belongs to [{homes[0]}]" if homes else suggestion(key, _fields_of(sections))


def _mistakes(tree: dict) -> list[str]:
    """A line for each mistake in the tree of a file; empty if it is a valid configuration."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return list(dict.fromkeys(_explain(mistake) for mistake in error.errors()))
    return []


def _explain(mistake) -> str:
    *sections, key = [str(part) for part in mistake["loc"]] or ["config.toml"]
    where = f"[{'.'.join(sections)}] {key}" if sections else f"[{key}]"
    if sections[1:2] == ["search_space"]:  # the same line for each form that a dimension may have
        name = [*sections, key][2]
        return f'[tuning.search_space] {name} must be [low, high], [low, high, "log"] or {{ choices = [...] }}'
    if mistake["type"] == "extra_forbidden":
        return f"{where} is not a known key{_hint(key, sections)}"
    if mistake["type"] == "missing":
        return f"{where} is missing"
    value, field = mistake["input"], _fields_of(sections).get(key)
    shown = "" if isinstance(value, dict) or (field and not field.repr) else f" (got {value!r:.80})"
    choices = re.findall("'([^']+)'", mistake["ctx"]["expected"]) if mistake["type"] == "literal_error" else []
    hint = suggestion(value, choices) if isinstance(value, str) else ""
    return f"{where}: {mistake['msg'].removeprefix('Value error, ')}{shown}{hint}"


def _fields_of(sections: list[str]) -> dict[str, FieldInfo]:
    """The fields of the model at a place in the tree, by their keys in the file."""
    model: Any = Config
    if sections:
        parent = _fields_of(sections[:-1])
        model = parent[sections[-1]].annotation if sections[-1] in parent else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return {}
    return {(field.alias or name): field for name, field in model.model_fields.items()}
