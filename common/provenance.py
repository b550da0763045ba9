"""Records of how files were made: written into each file, and compared with what a run would record.

Two records agree if they name the same stage, the same values of the settings that it reads, and the same inputs.
A tar is identified by its size and its two ends, a file of ours by the id in its record: a digest of its rows.
Recreating a file with the same result therefore leaves the files made from it valid.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

# what a run does with existing output: refuse what is stale, recreate that, or recreate everything
Redo = Literal["", "stale", "all"]

_LIBRARIES = ("torch", "transformers", "pyarrow", "numpy", "scikit-learn", "pillow", "simplejpeg", "imagehash")
_MOVED_SETTINGS = {  # key that was once in [training] -> its section now
    **dict.fromkeys(("gallery", "bootstrap_samples"), "evaluation"),
    **dict.fromkeys(("trial_epochs", "pruner", "search_space"), "tuning"),
}
_FORMER_VALUES = {  # of settings that older records lack
    "training.mining": "none",
    "embedding_model.views": [1.0],
    "data.held_out": "",
}
# stage -> the setting that gives other files of it a place of their own, and which changed settings call for it
_BESIDE = {"train": ("training.run", ""), "generate_embeddings": ("embedding_model.label", "embedding_model.")}
_PROBED_BYTES = 2**16  # at each end of a file that is not ours


@dataclass(frozen=True)
class Provenance:
    """The record in every artefact."""

    stage: str
    config: dict  # "section.key" -> value, of the settings that affect the stage's output
    inputs: dict  # file name -> identity (see `identity`)
    rows: dict = field(default_factory=dict)  # counts: in, out, and rejected by reason
    facts: dict = field(default_factory=dict)  # results of the stage, such as the model's dimension
    id: str = ""
    config_hash: str = ""
    git_commit: str = ""
    versions: dict = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0  # that making it took
    began: float | None = field(default=None, compare=False)  # on this process's clock; not in files

    def timed(self, seconds: float = 0.0) -> "Provenance":
        """This record of a file that has been in the making for so long; by default, one that is begun now."""
        return replace(self, began=time.monotonic() - seconds)

    def finished(self, content_digest: str, rows: dict, facts: dict | None = None) -> "Provenance":
        """This record, completed after the file has been written."""
        return replace(
            self,
            id=content_digest,
            rows=rows,
            facts={**self.facts, **(facts or {})},
            config_hash=digest_of(json.dumps(self.config, sort_keys=True)),
            git_commit=_git_commit(),
            versions=_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=0.0 if self.began is None else round(time.monotonic() - self.began, 2),
        )

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "began"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> "Provenance":
        """Raises ValueError if it is no record."""
        return Provenance.from_dict(json.loads(text))

    @staticmethod
    def from_dict(content: object) -> "Provenance":
        """What `to_dict` gave, perhaps in another version of the pipeline: fields that are not known here are
        passed over, and those added since have their defaults. Raises ValueError if it is no record."""
        known = {name: content[name] for name in _FIELDS if name in content} if isinstance(content, dict) else {}
        record = Provenance(**{"stage": "", "config": None, "inputs": None, **known})
        if not all(isinstance(part, dict) for part in (record.config, record.inputs, record.rows, record.facts)):
            raise ValueError("not the record of a file")
        return record


_FIELDS = [one.name for one in fields(Provenance) if one.compare]


def identity(path: Path) -> str:
    """The identity of a file that is not ours, such as a tar: its size and a digest of its two ends.

    (A gzip stream ends with a checksum of all its content.)
    """
    status = path.stat()
    return _identity(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.cache  # called for each part of a tar
def _identity(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb", buffering=0) as file:
        start = file.read(_PROBED_BYTES)
        file.seek(max(0, size - _PROBED_BYTES))
        return f"{size} bytes, {digest_of(start, file.read(_PROBED_BYTES))[:16]}"


def record(stage: str, config: dict, inputs: dict[str, str]) -> Provenance:
    """The record of a file that is now begun. `config`: see `config.values`; `inputs`: name -> identity."""
    return Provenance(stage=stage, config=json.loads(json.dumps(config)), inputs=inputs).timed()


def differences(existing: Provenance, expected: Provenance) -> list[str]:
    """How the record of a file differs from the one that a run would give it, in words; empty if they agree."""
    reasons = []
    if existing.stage != expected.stage:
        reasons.append(f"was made by {existing.stage}, not by {expected.stage}")
    changed = [
        f"{key} = {json.dumps(old)} (now {json.dumps(new)})"
        for key, (old, new) in changed_settings(existing, expected).items()
    ]
    if changed:
        reasons.append(f"was made with {', '.join(changed)}")
    return reasons + input_differences(existing.inputs, expected.inputs)


def changed_settings(existing: Provenance, expected: Provenance) -> dict[str, tuple]:
    """Setting -> (value then, value now), of those that differ between two records."""
    moved = {f"training.{key}": f"{section}.{key}" for key, section in _MOVED_SETTINGS.items()}
    then = {moved.get(key, key): value for key, value in existing.config.items()}  # by today's names
    pairs = {
        key: (then.get(key, _FORMER_VALUES.get(key)), expected.config.get(key))
        for key in sorted({*then, *expected.config})
    }
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def input_differences(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """How the inputs of a file (name -> identity) differ from those that it would be made from now, in words."""
    tars_then, tars_now = (
        {tar_of(name) for name in names if name.startswith("intermediates/")} for names in (then, now)
    )  # of a merge
    came, went = tars_now - tars_then, tars_then - tars_now
    reasons = []
    if came or went:
        moves = [f"{some(names)} {verb}" for names, verb in ((came, "came"), (went, "went")) if names]
        count = f"{len(tars_then)} tar{'s' * (len(tars_then) != 1)}"
        reasons.append(f"was made from {count}; there are {len(tars_now)} now: {', '.join(moves)}")
    others = [name for name in {**then, **now} if tar_of(name) not in came | went]
    if changed := [name for name in others if name in then and name in now and then[name] != now[name]]:
        reasons.append(f"was made from an earlier version of {some(changed)}")
    if added := [name for name in others if name not in then]:
        reasons.append(f"was made without {some(added)}")
    if removed := [name for name in others if name not in now]:
        reasons.append(f"was also made from {some(removed)}")
    return reasons


def tar_of(name: str) -> str:
    """The name of the tar behind an input of a merge: "0088" of "intermediates/0088.parquet" and of
    "embeddings/0088-3.parquet"; "" for any other."""
    folder, _, file = name.rpartition("/")
    stem = file.removesuffix(".parquet")
    if folder == "intermediates":
        return stem
    return stem.rpartition("-")[0] if folder in ("fingerprints", "embeddings") else ""


def some(names: Collection[str]) -> str:
    """Names for a message: all of them if they are few."""
    first = sorted(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def ways_out(existing: Provenance, expected: Provenance, command: Callable[..., str]) -> list[str]:
    """What can be done about a stale file other than to redo it, a line each. `command`: of more words, the whole
    command line with them at its end."""
    changed = changed_settings(existing, expected)
    lost = {name: value for name, value in existing.inputs.items() if name not in expected.inputs}
    same = existing.stage == expected.stage and existing.inputs == {**expected.inputs, **lost}
    # not by a setting: the weights of a model, the arguments of a script, a list that is known by its content
    unset = {key for key in changed if key.endswith("model.weights") or "." not in key}
    unset |= {key for key in changed if key == "data.held_out" and changed[key][0]}
    can_be_set = not unset and all(old is not None for old, _ in changed.values())
    ways = []
    if same and can_be_set and (changed or lost):
        restored = [f", restore {some({tar_of(name) or name for name in lost})}"] if lost else []
        settings = [word for key, (old, _) in changed.items() for word in ("--set", f"{key}={json.dumps(old)}")]
        restored += [f": {command(*settings)}"] if changed else []
        ways.append(f"to keep it{' and run'.join(restored)}")
    beside, prefix = _BESIDE.get(expected.stage, ("", ""))
    if beside and (not prefix or any(key.startswith(prefix) for key in changed)):
        ways.append(f"to keep both: {command('--set', f'{beside}=NAME')}")
    return ways


def embedding_model(record: Provenance) -> dict:
    """The model that made a file's embeddings: its settings, and what loading it determined; {} if unknown."""
    if "embedding_model" in record.facts:  # of the splits
        model = record.facts["embedding_model"]
    else:
        model = {key.partition(".")[2]: value for key, value in record.config.items() if "embedding_model." in key}
        model |= {key: value for key, value in record.facts.items() if value is not None and key != "model"}
    return with_views(model) if model else {}


def with_views(model: dict) -> dict:
    """A record of an embedding model, completed if it is older than views: then they were the whole image. Of a
    table of vectors, which has no pooling, nothing is known."""
    return {"views": _FORMER_VALUES["embedding_model.views"], **model} if "pooling" in model else model


def model_differences(one: dict, other: dict, keys: Iterable[str]) -> tuple[str, str]:
    """What each of two models has where they differ in `keys`, as "key = value, ..."; both empty if they agree."""
    different = [key for key in keys if one.get(key) != other.get(key)]
    first, second = (
        ", ".join(f"{key} = {json.dumps(model.get(key))}" for key in different) for model in (one, other)
    )
    return first, second


def digest_of(*parts: bytes | str) -> str:
    """A digest of these parts, in this order: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


@functools.cache
def _git_commit() -> str:
    root = Path(__file__).resolve().parents[1]
    # with the folders named, git asks a colleague's checkout, too; without locks: if a full disk kills git, a
    # leftover lock would block the user's next commit
    command = ["git", f"--git-dir={root}/.git", f"--work-tree={root}", "--no-optional-locks", "-C", str(root)]
    command += ["describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # no git, or not a checkout


@functools.cache
def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
