"""What a model in a folder is known by; without torch, since submit.py looks at it before it submits anything."""

from pathlib import Path

from common.provenance import digest_of

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MIB = 2**20


def weights_digest(folder: Path) -> str:
    """A digest of a model's configuration and of its weights by name, size, and first and last MiB."""
    parts: list[bytes | str] = []
    names = ("config.json", "preprocessor_config.json")
    for path in [folder / name for name in names if (folder / name).is_file()]:
        parts += [path.name, path.read_bytes()]
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(MIB)
            file.seek(max(0, size - MIB))
            parts += [path.name, str(size), head, file.read(MIB)]
    return digest_of(*parts)
