"""The explorer as one HTML file: tables, style and scripts inlined, and the record of what it was made from."""

import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from common import pages, parquet
from common.errors import PipelineError
from common.provenance import Provenance, Redo
from common.sections import Config

_FOLDER = Path(__file__).parent
_SCRIPTS = ("state.js", "panels.js", "buildings.js", "failures.js", "start.js")
_RECORD = re.compile('<script type="application/json" id="provenance">(.*?)</script>', re.DOTALL)
_HEAD_CHARACTERS = 16_384  # of a page, which hold its record


def render(content: dict[str, Any], pictures: list[str], record: Provenance, cfg: Config) -> str:
    """The page. `content`: what the scripts read, arrays included; `pictures`: JPEGs in base64."""
    return pages.render(
        _FOLDER / "explorer.html",
        content=content,
        without_picture=sum(not numbers for numbers in content["images_of"]),
        has_map=any(city["located"] for city in content["cities"]),
        has_projection=bool(np.isfinite(content["x"]).any()),
        run=cfg.training.run,
        cell_m=cfg.data.split_cell_m,
        raw_dir=cfg.paths.raw_dir,
        provenance=as_json(record.to_dict()),
        style=Markup((_FOLDER / "explorer.css").read_text()),
        script=Markup("\n".join((_FOLDER / name).read_text() for name in _SCRIPTS)),
        data=as_json(content),
        pictures=as_json(pictures),
    )


def as_json(value: Any) -> Markup:
    """JSON for a <script> element, which no string in it can close. Arrays become their type and bytes (little
    endian, in base64); NaN outside them is refused."""
    text = json.dumps(value, default=_packed, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _packed(array: np.ndarray) -> dict[str, str]:
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {"type": array.dtype.name, "bytes": b64encode(data).decode()}


def is_done(path: Path, record: Provenance, redo: Redo) -> bool:
    """Whether the page exists and was made from these inputs with these settings.

    Raises PipelineError if it was not, or is none of ours, and `redo` does not allow to replace it.
    """
    if redo == "all" or not path.exists():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        found = _RECORD.search(file.read(_HEAD_CHARACTERS))
    if not found:
        if redo:
            return False
        raise PipelineError(f"{path} was not written by publish/explore.py\nname another file, or use --overwrite")
    existing = Provenance.from_json(found[1])
    return parquet.matches(path, existing, record, redo, f"{existing.rows.get('out', 0):,} buildings")
