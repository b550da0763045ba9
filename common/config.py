"""The configuration: config.toml read strictly into the models of common/sections.py.

config.toml is the only place with defaults: a key that it lacks is an error, and so is one that is not known
here. `--set section.key=value` overrides; the value is TOML (0.2, true, [1, 2]) or else a plain string.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError
from common.sections import Config, Paths, Training, suggestion

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "config.toml"


def load(path: Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration at `path` (default: the repository's) with `--set` overrides; paths made absolute.

    Raises ConfigError with every mistake of the file at once.
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
        wrong = "what --set says" if overrides and _is_usable(tomli.loads(text)) else path
        raise ConfigError("\n".join([f"{wrong} cannot be used:", *_explain(error)])) from None
    return _absolute(cfg, path.resolve().parent)


def values(cfg: Config, *keys: str) -> dict[str, Any]:
    """The settings named ("section.key" or "section") as plain values: what a stage records of what it reads."""
    plain = cfg.model_dump(mode="json", by_alias=True)
    chosen: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        names = [name] if name else plain[section]
        chosen.update({f"{section}.{n}": plain[section][n] for n in names})
    return chosen


def entry(table: dict[str, Any], setting: str, name: str, file: str) -> Any:
    """What a table of choices holds under the name that a setting gives. `file`: where the table stands.

    Raises ConfigError for a name that common/sections.py allows but the table lacks.
    """
    if name not in table:
        raise ConfigError(f"{setting} = {json.dumps(name)}: {file} has no such entry, only {', '.join(table)}")
    return table[name]


def with_training(cfg: Config, **changes) -> Config:
    """`cfg` with these keys of [training] changed, checked as those of a file. Raises ConfigError."""
    try:
        training = Training.model_validate({**cfg.training.model_dump(), **changes})
    except ValidationError as error:
        mistakes = "; ".join(mistake["msg"] for mistake in error.errors())
        raise ConfigError(f"[training] cannot be used with {changes}: {mistakes}") from None
    return cfg.model_copy(update={"training": training})


def to_toml(cfg: Config) -> str:
    """The whole configuration as a TOML file that `config.load` reads back."""
    return "".join(_tables(cfg.model_dump(mode="json", by_alias=True), ()))


def _tables(tree: dict, names: tuple[str, ...]) -> Iterator[str]:
    # a search space's {choices = [...]} is a value in one line
    plain = {k: v for k, v in tree.items() if not isinstance(v, dict) or names[-1:] == ("search_space",)}
    if names:
        yield f"[{'.'.join(names)}]\n"
        yield from (f"{key} = {_toml(value)}\n" for key, value in plain.items())
        yield "\n"
    for key in tree:
        if key not in plain:
            yield from _tables(tree[key], (*names, key))


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # strings, numbers and booleans are written alike in both


def is_folder(name: str) -> bool:
    """Whether a model's name is a folder on this machine (`load` makes those absolute), not a name on the hub."""
    return Path(name).is_absolute()


def _absolute(cfg: Config, base: Path) -> Config:
    root = (base / cfg.paths.root.expanduser()).resolve()
    paths = {name: (root / Path(value).expanduser()).resolve() for name, value in cfg.paths if name != "root"}
    model = cfg.embedding_model
    folder = base / Path(model.name).expanduser()
    if folder.is_dir():
        model = model.model_copy(update={"name": str(folder.resolve())})
    elif model.name.startswith((".", "/", "~")):
        raise ConfigError(f"embedding_model.name: there is no folder {folder}")
    return cfg.model_copy(update={"paths": Paths(root=root, **paths), "embedding_model": model})


def _apply(tree: dict, override: str) -> None:
    """Set one value in the tree that the file gave. Unknown keys are left for the validation to explain."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not sections or not key:
        raise ConfigError(f"--set {override}: write it as --set section.key=value")
    node = tree
    for section in sections:
        if not isinstance(node.get(section), dict):
            raise ConfigError(f"--set {dotted}: there is no section {section}{suggestion(section, node)}")
        node = node[section]
    if key not in node and "search_space" not in sections:
        raise ConfigError(f"--set {dotted}: [{'.'.join(sections)}] has no key {key}{_where(key, sections)}")
    value = _toml_value(text.strip())
    is_text = _is_text(sections, key) and not isinstance(value, str)
    node[key] = text.strip() if is_text else value  # a run may be called 2024, a time limit is 04:00:00


def _toml_value(text: str) -> Any:
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text  # a plain string: a path, a name


def _is_text(sections: list[str], key: str) -> bool:
    """Whether the setting at this place of the tree is a string or a path."""
    fields = _fields_of(sections)
    return key in fields and fields[key].annotation in (str, Path)


def _where(key: str, sections: list[str]) -> str:
    """What an unknown key of a section may have been meant to be."""
    homes = [name for name in _fields_of([]) if key in _fields_of([name])]
    return f"; it belongs to [{homes[0]}]" if homes else suggestion(key, _fields_of(sections))


def _is_usable(tree: dict) -> bool:
    """Whether the tree that a file gave is a valid configuration."""
    try:
        Config.model_validate(tree)
    except ValidationError:
        return False
    return True


def _explain(error: ValidationError) -> list[str]:
    """A line for each mistake."""
    lines = []
    for mistake in error.errors():
        *sections, key = [str(part) for part in mistake["loc"]] or ["config.toml"]
        where = f"[{'.'.join(sections)}] {key}" if sections else f"[{key}]"
        if sections[1:2] == ["search_space"]:  # told once, not for each form that a dimension may have
            name = [*sections, key][2]
            form = '[low, high], [low, high, "log"] or { choices = [...] }'
            lines.append(f"[tuning.search_space] {name} must be {form}")
        elif mistake["type"] == "extra_forbidden":
            lines.append(f"{where} is not a known key{_where(key, sections)}")
        elif mistake["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            lines.append(f"{where}: {mistake['msg'].removeprefix('Value error, ')}{_given(mistake)}")
    return list(dict.fromkeys(lines))


def _given(mistake) -> str:
    """What stood there, where the message does not say it: of a single value only."""
    value = mistake["input"]
    return "" if isinstance(value, dict) else f" (got {value!r:.80})"


def _fields_of(sections: list[str]) -> dict[str, FieldInfo]:
    """The fields of the model at a place of the tree, by the keys of the file."""
    model: Any = Config
    for section in sections:
        by_alias = {(field.alias or name): field.annotation for name, field in model.model_fields.items()}
        model = by_alias.get(section)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return {}
    return {(field.alias or name): field for name, field in model.model_fields.items()}
