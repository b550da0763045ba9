"""Whether two runs of the chain have left the same: everything but times, dates and paths."""

import json
from pathlib import Path

import pandas as pd

from common import parquet

TIMED = ["seconds", "triplets_per_second"]  # columns of a history


def assert_same_artefacts(ours: Path, theirs: Path, folders: tuple[str, ...] = ("data", "checkpoints")) -> None:
    """The same files below `folders` of two roots, temporary ones included, with the same content."""
    paths, expected = (
        sorted(p.relative_to(root) for folder in folders for p in (root / folder).rglob("*") if p.is_file())
        for root in (ours, theirs)
    )
    assert paths == expected
    assert paths
    for path in paths:
        assert_same_file(ours / path, theirs / path)


def assert_same_file(ours: Path, theirs: Path) -> None:
    if ours.name == "history.parquet":
        tables = [parquet.read(path).to_pandas().drop(columns=TIMED) for path in (ours, theirs)]
        pd.testing.assert_frame_equal(*tables)
    elif ours.suffix == ".parquet":
        assert parquet.read(ours).equals(parquet.read(theirs)), ours
        assert parquet.read_provenance(ours).id == parquet.read_provenance(theirs).id, ours
    elif ours.suffix == ".pt":
        assert_same_checkpoint(ours, theirs)
    elif ours.name in ("metrics.json", "summary.json", "split_report.json"):
        a, b = (json.loads(path.read_text()) for path in (ours, theirs))
        assert {**a, "provenance": None} == {**b, "provenance": None}, ours
        assert a["provenance"]["id"] == b["provenance"]["id"], ours
    elif ours.suffix == ".safetensors":
        from safetensors.torch import load_file

        assert_equal(load_file(ours), load_file(theirs))
    elif ours.suffix == ".py":
        assert ours.read_bytes() == theirs.read_bytes(), ours


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Heads bit for bit; of one that can be gone on from, also the optimizer, the bandit and the epochs."""
    import torch

    a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
    assert_equal(a["head"], b["head"])
    assert ("resume" in a) == ("resume" in b)
    if "resume" in a:
        for state in (a["resume"], b["resume"]):
            state.pop("timings")
        assert_equal(a["resume"], b["resume"])


def assert_equal(a, b) -> None:
    """Nested dicts and lists of tensors and plain values are equal, NaN to NaN."""
    import torch

    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b or (a != a and b != b)
