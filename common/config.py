"""The configuration: config.toml, validated strictly by the models of common/sections.py.

config.toml is the only place with defaults: missing and unknown keys are errors. `--set section.key=value`
overrides; the value is TOML (0.2, true, [1, 2]) or else a plain string.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError
from common.sections import Config, Paths, Training, suggestion

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "config.toml"


def load(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration at `path` (default: the repository's) with `--set` overrides; paths become absolute.

    Raises ConfigError with all mistakes at once.
    """
    path = Path(path or DEFAULT_PATH)
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomli.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        cfg = Config.model_validate(tree)
    except ValidationError as error:
        culprit = f"invalid configuration {path}:"
        if overrides:
            with contextlib.suppress(ValidationError):
                Config.model_validate(tomli.loads(text))
                culprit = "invalid --set value:"
        raise ConfigError("\n".join([culprit, *_explain(error)])) from None
    return _absolute(cfg, path.resolve().parent)


def values(cfg: Config, *keys: str) -> dict[str, Any]:
    """The named settings ("section.key", or "section" for all of its keys) as plain values, for a record."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    chosen: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        names = [name] if name else plain[section]
        chosen.update({f"{section}.{n}": plain[section][n] for n in names})
    return chosen


def entry(table: dict[str, Any], setting: str, name: str, file: str) -> Any:
    """The entry that a setting selects in a table of choices. `file`: where the table is defined.

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
        raise ConfigError(f"invalid [training] with {changes}: {mistakes}") from None
    return cfg.model_copy(update={"training": training})


def to_toml(cfg: Config) -> str:
    """The whole configuration as a TOML file that `config.load` reads back."""
    lines = []
    for section, settings in cfg.model_dump(mode="json", by_alias=True).items():
        lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in settings.items()), ""]
    return "\n".join(lines)


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # the same in JSON and TOML for strings, numbers and booleans


def is_folder(name: str) -> bool:
    """Whether a model's name is a local folder (`load` makes those absolute), not a name on the hub."""
    return Path(name).is_absolute()


def _absolute(cfg: Config, base: Path) -> Config:
    root = (base / cfg.paths.root.expanduser()).resolve()
    paths = {name: (root / Path(value).expanduser()).resolve() for name, value in cfg.paths if name != "root"}
    model = cfg.embedding_model
    folder = base / Path(model.name).expanduser()
    if folder.is_dir():
        model = model.model_copy(update={"name": str(folder.resolve())})
    elif model.name.startswith((".", "/", "~")):
        raise ConfigError(f"embedding_model.name: no such directory: {folder}")
    return cfg.model_copy(update={"paths": Paths(root=root, **paths), "embedding_model": model})


def _apply(tree: dict, override: str) -> None:
    """Set one value in the tree of the file. Unknown sections and keys are errors."""
    dotted, equals, text = map(str.strip, override.partition("="))
    *sections, key = dotted.split(".")
    if not equals or not sections or not key:
        raise ConfigError(f"--set {override}: expected --set section.key=value")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            raise ConfigError(f"--set {dotted}: no such section: {section}{suggestion(section, node)}")
        node = node[section]
    if key not in node and "search_space" not in sections:
        raise ConfigError(f"--set {dotted}: [{'.'.join(sections)}] has no key {key}{_where(key, sections)}")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text  # a plain string: a path, a name
    field = _fields_of(sections).get(key)
    if field is not None and field.annotation in (str, Path) and not isinstance(value, str):
        value = text  # a run may be called 2024, a time limit is 04:00:00
    node[key] = value


def _where(key: str, sections: list[str]) -> str:
    """A hint for an unknown key of a section: where it belongs, or a similar key."""
    homes = [name for name in _fields_of([]) if key in _fields_of([name])]
    return f"; it belongs to [{homes[0]}]" if homes else suggestion(key, _fields_of(sections))


def _explain(error: ValidationError) -> list[str]:
    """A line for each mistake."""
    lines = []
    for mistake in error.errors():
        *sections, key = [str(part) for part in mistake["loc"]] or ["config.toml"]
        where = f"[{'.'.join(sections)}] {key}" if sections else f"[{key}]"
        if sections[1:2] == ["search_space"]:  # reported once, not for each form of a dimension
            name = [*sections, key][2]
            form = '[low, high], [low, high, "log"] or { choices = [...] }'
            lines.append(f"[tuning.search_space] {name} must be {form}")
        elif mistake["type"] == "extra_forbidden":
            lines.append(f"{where} is not a known key{_where(key, sections)}")
        elif mistake["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            got = "" if isinstance(mistake["input"], dict) else f" (got {mistake['input']!r:.80})"
            lines.append(f"{where}: {mistake['msg'].removeprefix('Value error, ')}{got}")
    return list(dict.fromkeys(lines))


def _fields_of(sections: list[str]) -> dict[str, FieldInfo]:
    """The fields of a section, or of a section within it, by their keys in the file; empty if there is none."""
    model: Any = Config
    for section in sections:
        by_alias = {(field.alias or name): field.annotation for name, field in model.model_fields.items()}
        model = by_alias.get(section)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return {}
    return {(field.alias or name): field for name, field in model.model_fields.items()}
