"""The parts of README.md that are made from the code and from what `make bench` measured, so that they cannot go
stale: settings, columns of the artefacts, reasons of rejects, the tables of the demo and the comparison, ratios
of benchmarks, costs.

Reads    config.toml, common/config.py, common/schemas.py, tests/benchmarks/{demo,results,full_dataset}.json of
         `make bench`, tests/benchmarks/comparison.json of `make compare`
Writes   README.md, between the comments <!-- NAME --> and <!-- end of NAME -->
Command  python tests/readme_parts.py     (make readme; tests/test_readme.py fails where the README lags behind)
"""

import json
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tomli

from common import config, files, schemas, sections
from train.report import comparison

README = ROOT / "README.md"
MEASURED = ROOT / "tests" / "benchmarks"
TYPES = {"bool": "bool", "string": "str", "binary": "bytes", "halffloat": "f16", "float": "f32", "double": "f64"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------ settings


def settings() -> str:
    """A table per section: key, default, and the meaning as it stands beside the key in config.toml."""
    comments = comments_of(config.DEFAULT_PATH.read_text())
    tree = tomli.loads(config.DEFAULT_PATH.read_text())
    parts = []
    for section, keys in tree.items():
        rows = [
            [f"`{key}`", f"`{as_toml(value)}`", comments.get((section, key), ""), allowed(section, key)]
            for key, value in keys.items()
            if not isinstance(value, dict)
        ]
        parts.append(f"**`[{section}]`**\n\n{table(['key', 'default', 'meaning', 'values'], rows)}")
    space, stages = (
        tree["tuning"]["search_space"],
        {k: v for k, v in tree["slurm"].items() if isinstance(v, dict)},
    )
    rows = [[f"`{key}`", f"`{as_toml(choices)}`"] for key, choices in space.items()]
    parts.append(f"**`[tuning.search_space]`**\n\n{table(['what Optuna varies', 'from, to; or choices'], rows)}")
    keys = ["time", "sbatch", "throttle"]
    rows = [
        [f"`{stage}`", *(f"`{as_toml(values[key])}`" if key in values else "" for key in keys)]
        for stage, values in stages.items()
    ]
    parts.append(f"**`[slurm.<stage>]`**\n\n{table(['stage', *(f'`{key}`' for key in keys)], rows)}")
    return "\n\n".join(parts)


def comments_of(text: str) -> dict[tuple[str, str], str]:
    """{(section, key): what the comment beside it says}; a comment goes on in lines that hold nothing else."""
    found: dict[tuple[str, str], str] = {}
    section, key = "", ""
    for line in text.splitlines():
        heading = re.match(r"\[([\w.]+)\]", line)
        setting = re.match(r"(\w+) = [^#]*(?:#\s*(.*))?$", line)
        if heading:
            section, key = heading[1], ""
        elif setting:
            key = setting[1]
            found[section, key] = setting[2] or ""
        elif key and re.match(r"\s+#", line):
            found[section, key] += " " + line.strip(" #")
        else:
            key = ""
    return found


def as_toml(value) -> str:
    """A default as it is written in the file."""
    return json.dumps(value) if not isinstance(value, float) else f"{value:g}"


def allowed(section: str, key: str) -> str:
    """What the model accepts: choices, or the type with its bounds."""
    model = next(f.annotation for name, f in sections.Config.model_fields.items() if (f.alias or name) == section)
    field = model.model_fields[key]
    return " or ".join(dict.fromkeys(kind(field.annotation, field.metadata)))


def kind(annotation, metadata) -> list[str]:
    """The words for a type: its alternatives, each with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return [f'`"{choice}"`' for choice in arguments]
    if origin is list:
        return [f"list of {' or '.join(kind(arguments[0], ()))}"]
    if arguments:
        return [word for argument in arguments for word in kind(argument, metadata)]
    name = {"Path": "folder", "str": "text"}.get(annotation.__name__, annotation.__name__)
    return [f"{name}{bounds(metadata)}"]


def bounds(metadata) -> str:
    """ " >= 0, < 1" of a field's constraints."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    constraints = [part for item in metadata for part in getattr(item, "metadata", [item])]
    told = [f"{signs[name]} {getattr(c, name):g}" for c in constraints for name in signs if hasattr(c, name)]
    return f" {', '.join(told)}" if told else ""


# ------------------------------------------------------------------------------------------------- schemas


def artefacts() -> str:
    """A table per Parquet artefact: column, type, unit and meaning as they stand in common/schemas.py."""
    source = (ROOT / "common" / "schemas.py").read_text()
    notes = dict(re.findall(r'\("(\w+)", [^#\n]*# (.*)', source))
    common_columns = set(schemas.INTERMEDIATES.names)
    kept = ", ".join(f"`{name}`" for name in schemas.merged(768).names if name in common_columns)
    parts = [
        columns("intermediates/<tar>.parquet: a valid image", schemas.INTERMEDIATES, notes),
        columns("intermediates_rejects/<tar>.parquet: a rejected member", schemas.REJECTS, notes),
        columns(
            "intermediates_index/<tar>.parquet: a place in a gzip tar at which inflating can begin",
            schemas.RESTART_POINTS,
            notes,
        ),
        columns("fingerprints/<tar>-<part>.parquet: an image", schemas.FINGERPRINTS, notes),
        columns(
            "embeddings/<tar>-<part>.parquet: an image, with the columns of the intermediates and",
            [field for field in schemas.embeddings(768) if field.name not in common_columns],
            notes,
        ),
        columns(
            "merged/{train,val,test}.parquet: an image of a building with two or more; "
            f"of the intermediates {kept}, and",
            [field for field in schemas.merged(768) if field.name not in common_columns],
            notes,
        ),
        columns(
            "difficulty/difficulty_metadata.parquet: a row of merged/train", schemas.difficulty(150, 7), notes
        ),
        columns("summary/summary.parquet: a dataset in a split", schemas.SUMMARY, notes),
        columns(
            "checkpoints/<run>/history.parquet: an epoch; share and reward for each band",
            schemas.history(1),
            notes,
        ),
    ]
    return "\n\n".join(parts)


def columns(title: str, fields, notes: dict[str, str]) -> str:
    """One artefact's table. Vectors are as long as config.toml's defaults and a 768-d backbone make them."""
    rows = [[f"`{field.name}`", short_type(str(field.type)), notes.get(field.name, "")] for field in fields]
    return f"{title}\n\n{table(['column', 'type', 'unit, meaning'], rows)}"


def short_type(name: str) -> str:
    """ "i32" for int32, "f16[768]" for a fixed-size list of that length."""
    vector = re.match(r"fixed_size_list<\w+: (\w+) not null>\[(\d+)\]", name)
    if vector:
        return f"{short_type(vector[1])}[{vector[2]}]"
    return TYPES.get(name, re.sub(r"^(u?)int(\d+)$", lambda m: f"{m[1] or 'i'}{m[2]}", name))


def rejects() -> str:
    """Why a member of a tar was not used: the enum, with the comments beside it."""
    source = (ROOT / "common" / "schemas.py").read_text()
    meanings = re.findall(r'^    [A-Z_]+ = "(\w+)"  # (.*)$', source, re.MULTILINE)
    return table(["reason", "meaning"], [[f"`{reason}`", meaning] for reason, meaning in meanings])


# ---------------------------------------------------------------------------------------------- benchmarks


def measured(name: str) -> dict:
    """What stands in tests/benchmarks/<name>.json."""
    return json.loads((MEASURED / f"{name}.json").read_text())


def demo() -> str:
    """The table that the demo ended with."""
    return f"```text\n{measured('demo')['table']}\n```"


def compared() -> str:
    """The table of samplers and losses."""
    return comparison.as_markdown(measured("comparison"))


def benchmarks() -> str:
    """The ratios of the last `make bench`, with the machine."""
    found = measured("results")
    rows = [
        [
            row["what"],
            f"{rate(row['ours'])} {row['unit']}",
            row["baseline"],
            f"**{row['ratio']:.3g}** ({row['low']:.3g} to {row['high']:.3g})",
            "" if row["target"] is None else f"{row['target']:g}",
        ]
        for row in found["ratios"]
    ]
    header = ["what", "ours", "against", "times as fast (range)", "wanted"]
    return f"Measured on {found['machine']}.\n\n{table(header, rows)}"


def costs() -> str:
    """What the full dataset would cost, a column per backbone; what does not depend on it stands above."""
    found = measured("full_dataset")
    backbones = found["backbones"]

    def row(what: str, form: str, key: str) -> list[str]:
        return [what, *(form.format(backbone[key]) for backbone in backbones.values())]

    rows = [
        row("dimensions", "{:,}", "dim"),
        row(f"embeddings, images/s on one {found['gpu']}", "{:,.0f}", "gpu_images_per_s"),
        row("... GPU hours", "{:.1f}", "gpu_hours_embeddings"),
        row("... CPU cores that read and prepare images as fast", "{:.0f}", "decoding_cores_per_gpu"),
        row("merge and split, hours here", "{:.1f}", "hours_merge"),
        row("neighbours, GPU hours", "{:.1f}", "gpu_hours_neighbors"),
        row("... days here, without a GPU", "{:,.0f}", "days_neighbors_here"),
        row("training by the defaults, hours here", "{:.1f}", "hours_training_here"),
        row("embeddings on disk, GB, and again merged", "{:,.0f}", "gb_embeddings"),
        row("training set in memory, GB", "{:,.0f}", "gb_training_in_memory"),
    ]
    hours = {name: f"{found[f'core_hours_{name}']:.0f}" for name in ("process_tar", "fingerprints")}
    text = (
        f'The same for all, with "here" as the machine above: `process_tar.py` takes {hours["process_tar"]} and '
        f"`compute_fingerprints.py` {hours['fingerprints']} hours of one core; the evaluation of one method "
        f"{found['days_evaluation_here']:.1f} days, {60 * found['gpu_hours_evaluation']:.1f} minutes on one GPU. "
        f"Metadata are {found['gb_metadata']:.0f} GB, neighbours {found['gb_difficulty']:.0f} GB. There are three "
        f"files for each tar, and {found['embedding_files']:,} or more each of fingerprints and embeddings (each "
        "tar begins a new one)."
    )
    return "\n\n".join([table([f"{found['images']:,} images", *backbones], rows), text])


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------- README

PARTS = {
    "demo": demo,
    "benchmarks": benchmarks,
    "costs": costs,
    "comparison": compared,
    "settings": settings,
    "artefacts": artefacts,
    "rejects": rejects,
}


def renewed(text: str) -> str:
    """The README's text with all its parts made afresh."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    files.write_text(README, renewed(README.read_text()))
