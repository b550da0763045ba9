"""What made a file: recorded in it, compared with what a run would make, and told in a user's words.

Two runs agree when they are of one stage, with equal values of the settings that the stage reads, on the same
inputs. A tar is known by its name, its size and its two ends, a file of ours by the id in its record. That id is a
digest of the file's rows: making a file again, with the same result, leaves what was made from it valid.
"""

import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

_LIBRARIES = (
    "torch",
    "transformers",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "pillow",
    "simplejpeg",
    "imagehash",
)


_MOVED_SETTINGS = {  # from [training], to what section
    **dict.fromkeys(("gallery", "bootstrap_samples"), "evaluation"),
    **dict.fromkeys(("trial_epochs", "pruner", "search_space"), "tuning"),
}
_FORMER_VALUES = {"training.mining": "none"}  # of settings that are newer than some records
_PROBED_BYTES = 2**16  # of each end of a file that is not ours


@dataclass(frozen=True)
class Provenance:
    """The record that every artefact carries."""

    stage: str
    config: dict  # "section.key" -> value, of the settings that this stage reads and that change its values
    inputs: dict  # file name -> identity (see `identity`)
    rows: dict = field(default_factory=dict)  # counts: in, out, and rejected by reason
    facts: dict = field(default_factory=dict)  # what the stage found out, such as the model's dimension
    id: str = ""
    config_hash: str = ""
    git_commit: str = ""
    versions: dict = field(default_factory=dict)
    created: str = ""

    def finished(self, content_digest: str, rows: dict, facts: dict | None = None) -> "Provenance":
        """This record with what is known only once the file has been written."""
        return replace(
            self,
            id=content_digest,
            rows=rows,
            facts={**self.facts, **(facts or {})},
            config_hash=_digest(self.config),
            git_commit=_git_commit(),
            versions=_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def without(self, keys: set[str]) -> "Provenance":
        """This record without some of its settings."""
        return replace(self, config={key: value for key, value in self.config.items() if key not in keys})

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> "Provenance":
        return Provenance(**json.loads(text))


def identity(path: Path) -> str:
    """What a file that is not ours, such as a tar, is known by: its size and a digest of its two ends. (A gzip
    stream ends with a checksum of all of it.)
    """
    status = path.stat()
    return _identity(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.cache  # each part of a tar asks
def _identity(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb", buffering=0) as file:
        start = file.read(_PROBED_BYTES)
        file.seek(max(0, size - _PROBED_BYTES))
        return f"{size} bytes, {digest_of(start, file.read(_PROBED_BYTES))[:16]}"


def record(stage: str, config: dict, inputs: dict[str, str]) -> Provenance:
    """The record of a file that `stage` is about to make. `config`: see `config.values`; `inputs`: name -> id."""
    return Provenance(stage=stage, config=json.loads(json.dumps(config)), inputs=inputs)


def differences(there: Provenance, now: Provenance) -> list[str]:
    """Why a file made as `there` is not what `now` would make; empty if it is."""
    there = replace(there, config=_by_todays_names(there.config))
    reasons = []
    if there.stage != now.stage:
        reasons.append(f"was made by {there.stage}, not by {now.stage}")
    for key in sorted({*there.config, *now.config}):
        old, new = there.config.get(key, _FORMER_VALUES.get(key)), now.config.get(key)
        if old != new:
            reasons.append(f"was made with {key} = {json.dumps(old)}; this run says {json.dumps(new)}")
    changed = [name for name in sorted({*there.inputs, *now.inputs}) if _differs(name, there, now)]
    for name in changed[:3]:
        if name not in now.inputs:
            reasons.append(f"was made from {name} too, which is not among the inputs now")
        elif name not in there.inputs:
            reasons.append(f"was made without {name}, which is among the inputs now")
        else:
            reasons.append(f"was made from another {name} ({there.inputs[name]} then, {now.inputs[name]} now)")
    if len(changed) > 3:
        reasons.append(f"and {len(changed) - 3} more inputs differ")
    return reasons


def digest_of(*parts: bytes | str) -> str:
    """32 hexadecimal digits that stand for these parts, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


def _by_todays_names(recorded: dict) -> dict:
    """The settings of a record that an older version may have written."""
    moved = {f"training.{key}": f"{section}.{key}" for key, section in _MOVED_SETTINGS.items()}
    return {moved.get(key, key): value for key, value in recorded.items()}


def _differs(name: str, there: Provenance, now: Provenance) -> bool:
    return there.inputs.get(name) != now.inputs.get(name)


def _digest(values: dict) -> str:
    return digest_of(json.dumps(values, sort_keys=True))


@functools.cache
def _git_commit() -> str:
    root = Path(__file__).resolve().parents[1]
    # without optional locks: killed by a full disk, git would leave one that blocks the user's next commit
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # installed without git, or not from a checkout


@functools.cache
def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
