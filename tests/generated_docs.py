"""The generated parts of the documentation: settings, columns, reject reasons, and the tables of the demo, the
comparison and the benchmarks. They come from the code and from measurements, so they cannot go stale.

Reads    config.toml, common/sections.py, common/schemas.py, tests/benchmarks/{demo,results,full_dataset}.json of
         `make bench`, its on_gpu.json if there is one, comparison.json of `make compare` and views.json of
         `make views` beside them
Writes   README.md, CONTRIBUTING.md and docs/*.md, between the comments <!-- NAME --> and <!-- end of NAME -->
Command  python tests/generated_docs.py     (make docs; tests/test_docs.py fails where a document is out of date)
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
from slurm import chain
from train.evaluation.metrics_json import percent
from train.report import comparison

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = ROOT / "tests" / "benchmarks"
TYPES = {"bool": "bool", "string": "str", "binary": "bytes", "halffloat": "f16", "float": "f32", "double": "f64"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------ settings


def settings() -> str:
    """A table per section: each key with its default, its comment in config.toml, and the values it accepts."""
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
    parts.append(f"**`[tuning.search_space]`**\n\n{table(['setting', 'range, or choices'], rows)}")
    keys = ["time", "sbatch", "throttle"]
    rows = [
        [f"`{stage}`", *(f"`{as_toml(values[key])}`" if key in values else "" for key in keys)]
        for stage, values in stages.items()
    ]
    parts.append(f"**`[slurm.<stage>]`**\n\n{table(['stage', *(f'`{key}`' for key in keys)], rows)}")
    return "\n\n".join(parts)


def comments_of(text: str) -> dict[tuple[str, str], str]:
    """{(section, key): the comment on its line, continued on the comment-only lines that follow}."""
    comments: dict[tuple[str, str], str] = {}
    section, key = "", ""
    for line in text.splitlines():
        heading = re.match(r"\[([\w.]+)\]", line)
        setting = re.match(r"(\w+) = [^#]*(?:#\s*(.*))?$", line)
        if heading:
            section, key = heading[1], ""
        elif setting:
            key = setting[1]
            comments[section, key] = setting[2] or ""
        elif key and re.match(r"\s+#", line):
            comments[section, key] += " " + line.strip(" #")
        else:
            key = ""
    return comments


def as_toml(value) -> str:
    """A default as TOML."""
    return json.dumps(value) if not isinstance(value, float) else f"{value:g}"


def allowed(section: str, key: str) -> str:
    """The values a setting accepts: its choices, or its type with bounds."""
    model = next(f.annotation for name, f in sections.Config.model_fields.items() if (f.alias or name) == section)
    field = model.model_fields[key]
    return " or ".join(dict.fromkeys(kind(field.annotation, field.metadata)))


def kind(annotation, metadata) -> list[str]:
    """A type in words: its alternatives, each with its bounds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return [f'`"{choice}"`' for choice in arguments]
    if origin is list:
        return [f"list of {' or '.join(kind(arguments[0], ()))}"]
    if arguments:
        return [word for argument in arguments for word in kind(argument, metadata)]
    name = {"Path": "path", "str": "string"}.get(annotation.__name__, annotation.__name__)
    return [f"{name}{bounds(metadata)}"]


def bounds(metadata) -> str:
    """A field's constraints: " ≥ 0, < 1"."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    constraints = [part for item in metadata for part in getattr(item, "metadata", [item])]
    words = [f"{signs[name]} {getattr(c, name):g}" for c in constraints for name in signs if hasattr(c, name)]
    return f" {', '.join(words)}" if words else ""


# ------------------------------------------------------------------------------------------------- schemas


def artefacts() -> str:
    """A table per Parquet artefact, with the comments of common/schemas.py."""
    source = (ROOT / "common" / "schemas.py").read_text()
    notes_of = {part.split("(")[0].split(" =")[0]: notes_in(part) for part in source.split("\n\n\n")}
    notes = {name: note for part in reversed(notes_of.values()) for name, note in part.items()}
    common_columns = set(schemas.INTERMEDIATES.names)
    kept = ", ".join(f"`{name}`" for name in schemas.merged(768).names if name in common_columns)
    parts = [
        columns("`intermediates/<tar>.parquet`: one row per valid image", schemas.INTERMEDIATES, notes),
        columns("`intermediates_rejects/<tar>.parquet`: one row per rejected member", schemas.REJECTS, notes),
        columns(
            "`intermediates_index/<tar>.parquet`: one row per point at which decompressing a gzip tar can start",
            schemas.RESTART_POINTS,
            notes,
        ),
        columns("`fingerprints/<tar>-<part>.parquet`: one row per image", schemas.FINGERPRINTS, notes),
        columns(
            "`embeddings/<tar>-<part>.parquet`: one row per image; the columns of the intermediates, and",
            [field for field in schemas.embeddings(768) if field.name not in common_columns],
            notes,
        ),
        columns(
            "`merged/{train,val,test}.parquet`: one row per image of a building that has at least two; "
            f"from the intermediates {kept}, and",
            [field for field in schemas.merged(768) if field.name not in common_columns],
            notes,
        ),
        columns(
            "`difficulty/difficulty_metadata.parquet`: one row per row of merged/train",
            schemas.difficulty(150, 7),
            notes,
        ),
        columns("`summary/summary.parquet`: one row per dataset and split", schemas.SUMMARY, notes),
        columns(
            "`checkpoints/<backbone>/<run>/history.parquet`: one row per epoch; a share and a reward for each "
            "band",
            schemas.history(1),
            notes,
        ),
        columns(
            "`buildings/<run>/buildings.parquet`: one row per building; also the columns of its "
            "images that have one value in each building",
            schemas.buildings(256),
            notes_of["def buildings"],
        ),
        columns(
            "`evaluation/<run>/queries.parquet`: one row per test image; from the merged file its ids, position, "
            "view, place in the tar and cell, and for each method of the table",
            [field for field in schemas.queries(["<method>"]) if field.name not in common_columns],
            {f"{name}_<method>": note for name, note in notes_of["def queries"].items()} | notes,
        ),
        columns(
            "`evaluation/<run>/pairs/pairs.parquet`: one row per verified pair; a cosine for each method",
            schemas.pairs(["trained"]),
            notes_of["def pairs"],
        ),
    ]
    return "\n\n".join(parts)


def notes_in(source: str) -> dict[str, str]:
    """Column -> comment, of the code that defines a schema."""
    return dict(re.findall(r'\("(\w+)", [^#\n]*# (.*)', source))


def columns(title: str, fields, notes: dict[str, str]) -> str:
    """One artefact's table. Vector lengths are those of config.toml's defaults and a 768-d backbone."""
    rows = [[f"`{field.name}`", short_type(str(field.type)), notes.get(field.name, "")] for field in fields]
    return f"{title}\n\n{table(['column', 'type', 'unit, meaning'], rows)}"


def short_type(name: str) -> str:
    """ "i32" for int32, "f16[768]" for a fixed-size list of that length."""
    vector = re.match(r"fixed_size_list<\w+: (\w+) not null>\[(\d+)\]", name)
    if vector:
        return f"{short_type(vector[1])}[{vector[2]}]"
    return TYPES.get(name, re.sub(r"^(u?)int(\d+)$", lambda m: f"{m[1] or 'i'}{m[2]}", name))


def rejects() -> str:
    """The reasons for rejecting a member of a tar: the enum, with its comments."""
    source = (ROOT / "common" / "schemas.py").read_text()
    meanings = re.findall(r'^    [A-Z_]+ = "(\w+)"  # (.*)$', source, re.MULTILINE)
    return table(["reason", "meaning"], [[f"`{reason}`", meaning] for reason, meaning in meanings])


# ---------------------------------------------------------------------------------------------- benchmarks


def measured(name: str) -> dict:
    """The content of tests/benchmarks/<name>.json."""
    return json.loads((MEASURED / f"{name}.json").read_text())


def demo() -> str:
    """The table that `make demo` prints at its end."""
    return f"```text\n{measured('demo')['table']}\n```"


def compared() -> str:
    """The figures of every loss with every sampler."""
    return comparison.as_markdown(measured("comparison"))


def gains() -> str:
    """The comparison in brief, a row per loss: its gain over whitening, and how much its samplers differ."""
    by_loss: dict[str, list[dict]] = {}
    for row in measured("comparison")["combinations"]:
        by_loss.setdefault(row["loss"], []).append(row)
    lines = []
    for loss, runs in by_loss.items():
        gain = {row_name(row): 100 * row["minus_whitening"]["map@r"]["value"] for row in runs}
        control = {row_name(row): 100 * row["minus_control"]["map@r"]["value"] for row in runs}
        worst, best = min(gain, key=gain.__getitem__), max(gain, key=gain.__getitem__)
        furthest = max(control, key=lambda name: abs(control[name]))
        lines.append(
            [
                f"`{loss}`",
                f"{gain[worst]:+.1f} (`{worst}`) to {gain[best]:+.1f} (`{best}`)",
                f"{control[furthest]:+.1f} (`{furthest}`)",
            ]
        )
    return table(["loss", "mAP@R over whitening, points", f"furthest from `{comparison.CONTROL}`"], lines)


def row_name(row: dict) -> str:
    """The sampler of a row of comparison.json, with its mining."""
    mining = row.get("mining", "none")
    return row["sampler"] if mining == "none" else f"{row['sampler']} + {mining}"


def views() -> str:
    """The figures of every choice of views, beside those of one view and of two."""
    counts = measured("views")["counts"]
    rows = [
        [
            arm["name"],
            percent(arm["figures"]["map@r"]),
            percent(arm["figures"]["recall@1"]),
            percent(arm["whitening"]["map@r"]),
            "" if arm["name"] == "1.0" else comparison.difference(arm["minus_one_view"]["map@r"]),
            "" if arm["name"] == "1.0 + 0.5" else comparison.difference(arm["minus_two_views"]["map@r"]),
        ]
        for arm in measured("views")["arms"]
    ]
    header = ["views", "mAP@R", "Recall@1", "mAP@R, whitening", "mAP@R - `1.0`", "mAP@R - `1.0 + 0.5`"]
    text = f"{counts['queries']:,} queries in {counts['cells']} cells, {counts['seeds']} seeds; %, 95 % intervals."
    return f"{text}\n\n{table(header, rows)}"


def views_cost() -> str:
    """GPU hours of the full dataset by backbone and number of views, of which they are multiples."""
    estimate = measured("full_dataset")
    backbones, num_views = estimate["backbones"], len(estimate["views"])
    rows = [
        [str(n), *(f"{one['gpu_hours_embeddings'] / num_views * n:,.1f}" for one in backbones.values())]
        for n in (1, 2, 4)
    ]
    return table([f"views; hours of one {estimate['gpu']} for {estimate['images']:,} images", *backbones], rows)


def benchmarks() -> str:
    """The results of the last `make bench`, with the machine that ran it."""
    results = measured("results")
    rows = [
        [
            row["what"],
            f"{rate(row['ours'])} {row['unit']}",
            row["baseline"],
            f"**{row['ratio']:.3g}** ({row['low']:.3g} to {row['high']:.3g})",
            "" if row["target"] is None else f"{row['target']:g}",
        ]
        for row in results["ratios"]
    ]
    header = ["benchmark", "this pipeline", "baseline", "ratio (range)", "target"]
    return f"Measured on {results['machine']}.\n\n{table(header, rows)}"


def on_gpu() -> str:
    """What tests/benchmarks/on_gpu.py has found on a card, if it has run on one."""
    if not (MEASURED / "on_gpu.json").exists():
        return "No GPU has been measured yet: there are no figures to show."
    results = measured("on_gpu")
    rows = []
    for row in results["rows"]:
        missing = "skipped" if row["is_right"] else "**failed**"
        found = missing if row["value"] is None else f"{rate(row['value'])} {row['unit']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        wrong = "" if row["is_right"] or row["value"] is None else ", **wrong**"
        rows.append([row["what"], found + wrong, row["against"], ratio, row["note"]])
    header = ["on the GPU", "found", "compared with", "ratio", "note"]
    return f"Measured on {results['machine']}.\n\n{table(header, rows)}"


def costs() -> str:
    """The estimated costs of the full dataset: a column per backbone, then those that do not depend on it."""
    estimate = measured("full_dataset")
    backbones = estimate["backbones"]

    def row(what: str, form: str, key: str) -> list[str]:
        return [what, *(form.format(backbone[key]) for backbone in backbones.values())]

    rows = [
        row("dimensions", "{:,}", "dim"),
        row(
            f"embeddings of {len(estimate['views'])} views: images/s on one {estimate['gpu']}",
            "{:,.0f}",
            "gpu_images_per_s",
        ),
        row("embeddings: GPU hours", "{:.1f}", "gpu_hours_embeddings"),
        row("embeddings: CPU cores that keep that GPU busy", "{:.0f}", "cores_per_gpu"),
        row("merge and split: hours", "{:.1f}", "hours_merge"),
        row("neighbour search: GPU hours", "{:.1f}", "gpu_hours_neighbors"),
        row("neighbour search: days without a GPU", "{:,.0f}", "days_neighbors_here"),
        row("training with the defaults: hours", "{:.1f}", "hours_training_here"),
        row("embeddings on disk, and again in the merged files: GB", "{:,.0f}", "gb_embeddings"),
        row("training set in memory: GB", "{:,.0f}", "gb_training_in_memory"),
    ]
    hours = {name: f"{estimate[f'core_hours_{name}']:.0f}" for name in ("process_tar", "fingerprints")}
    text = (
        f"Independent of the backbone: `process_tar.py` takes {hours['process_tar']} core-hours and "
        f"`compute_fingerprints.py` {hours['fingerprints']}; the evaluation of one method takes "
        f"{estimate['days_evaluation_here']:.1f} days, or {60 * estimate['gpu_hours_evaluation']:.0f} minutes on "
        f"one GPU. Metadata take {estimate['gb_metadata']:.0f} GB, neighbours {estimate['gb_difficulty']:.0f} GB. "
        "Each tar yields three metadata files; fingerprints and embeddings are at least "
        f"{estimate['embedding_files']:,} files each, since every tar starts a new one."
    )
    searched = {f"{int(rows):,} rows": f"{hours:.2f}" for rows, hours in estimate["gpu_hours_search"].items()}
    search = table(["neighbour search, 768 dimensions", *searched], [["GPU hours", *searched.values()]])
    return "\n\n".join([table([f"{estimate['images']:,} images", *backbones], rows), search, text])


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --------------------------------------------------------------------------------------------------- stages


def stages() -> str:
    """A row per stage of the chain: the files in its script's docstring, and the settings of its declaration."""
    steps = {step.script: step for tune in (0, 1) for step in chain.steps_of(config.load(), tune)}
    rows = []
    for script, step in steps.items():
        text = (ROOT / script).read_text().split('"""')[1]
        reads, writes = (files_in(text, heading) for heading in ("Reads", "Writes"))
        settings = [f"`{key}`" if "." in key else f"`[{key}]`" for key in step.stage.settings]
        rows.append([f"`{script}`", reads, writes, ", ".join(settings)])
    return table(["stage", "reads", "writes (below `paths.root`)", "settings that its files depend on"], rows)


def files_in(docstring: str, heading: str) -> str:
    """The files that a script's docstring names under a heading, which ends with the next one."""
    section = re.search(rf"^{heading} +(.*?)^(?=[A-Z]\w+ )", docstring, re.MULTILINE | re.DOTALL)
    paths = re.findall(r"(?:data|checkpoints)/[\w<>{},./*-]*[\w>}*/]", section[1] if section else "")
    return ", ".join(f"`{path}`" for path in dict.fromkeys(paths))


# ----------------------------------------------------------------------------------------------- documents

PARTS = {
    "stages": stages,
    "demo": demo,
    "benchmarks": benchmarks,
    "on a GPU": on_gpu,
    "costs": costs,
    "comparison": compared,
    "gains": gains,
    "views": views,
    "views cost": views_cost,
    "settings": settings,
    "artefacts": artefacts,
    "rejects": rejects,
}


def renewed(text: str) -> str:
    """A document with all its generated parts made afresh."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.split(end)[1]}"
    return text


def write_all() -> None:
    """Renew the generated parts of every document."""
    for path in DOCUMENTS:
        text = path.read_text()
        if renewed(text) != text:
            files.write_text(path, renewed(text))


if __name__ == "__main__":
    write_all()
