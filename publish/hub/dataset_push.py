"""Vectors and the building table as a dataset on the Hugging Face hub: its folder, its card, sending it."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCard, DatasetCardData

from common import errors, files, parquet, provenance, schemas
from common.errors import PipelineError, StaleArtefact
from common.sections import Config
from generate import model_files
from publish.hub import push
from publish.inference import model_record
from publish.retrieval import embedding_tables

TEMPLATE = Path(__file__).with_name("dataset_card.md")
PATTERNS = ("README.md", "images/*.parquet", "buildings/*.parquet")
_FIRST_IMPORTED = 1000  # `dataset_id` of photographs that are not the dataset's; see schemas.INTERMEDIATES
_WIDTHS = {"halffloat": "float16", "float": "float32", "double": "float64"}
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))


class Table(NamedTuple):
    """A table of the dataset: what the hub calls a configuration."""

    name: str  # "images" or "buildings"
    paths: list[Path]
    schema: pa.Schema
    rows: int

    @property
    def splits(self) -> dict[str, str]:
        """Name -> files. A table that is not in splits is one with the table's name ("all" is reserved)."""
        found = {path.name.rpartition("-")[0] for path in self.paths}
        if not found <= set(schemas.SPLITS):
            return {self.name: f"{self.name}/*.parquet"}
        return {split: f"{self.name}/{split}-*.parquet" for split in schemas.SPLITS if split in found}


def find_tables(cfg: Config) -> list[Table]:
    """The vectors of images, and those of buildings; one may be missing.

    Raises PipelineError if both are, or if a column holds bytes, which may be photographs; StaleArtefact if a file
    was made by another model than the published one, or the buildings of other vectors than those of the images.
    """
    model = model_record.folder_of(cfg, None)
    weights, tables = model_files.weights_digest(model), []
    for name, folder in (("images", cfg.paths.vectors_dir), ("buildings", cfg.paths.buildings_dir)):
        paths = sorted(folder.glob("*.parquet"))
        for path in paths:
            if parquet.read_provenance(path).config.get("model.weights") != weights:
                raise StaleArtefact(
                    f"{path} was made by another model than the one in {model}\n"
                    "make it again, or name its model's folder with --set paths.published_dir=FOLDER"
                )
            if binary := push.columns_of_bytes(parquet.open_file(path).schema_arrow):
                raise PipelineError(
                    f"{path} has columns of bytes, which may be photographs: {', '.join(binary)}\n"
                    "leave them out of the table that the vectors are made of, and make the vectors again"
                )
        if paths:
            schema = parquet.open_file(paths[0]).schema_arrow.remove_metadata()
            tables.append(Table(name, paths, schema, sum(map(parquet.num_rows, paths))))
    if len(tables) == 2:
        _refuse_other_images(*tables)
    if not tables:
        raise PipelineError(
            f"neither {cfg.paths.vectors_dir} nor {cfg.paths.buildings_dir} holds vectors\n"
            "run publish/generate_embeddings_from_parquet.py, then publish/aggregate_buildings.py"
        )
    return tables


def _refuse_other_images(images: Table, buildings: Table) -> None:
    for path in buildings.paths:
        if parquet.read_provenance(path).inputs != embedding_tables.identities(images.paths):
            raise StaleArtefact(
                f"{path} was made of other vectors than those in {images.paths[0].parent}\n"
                f"make it again: {errors.command('publish/aggregate_buildings.py', '--remake')}"
            )


def card(cfg: Config, tables: list[Table], repo: str, model_repo: str | None) -> str:
    """The dataset card. `model_repo`: the model's repository, if it has one."""
    model = model_files.read_json(model_record.folder_of(cfg, None) / "provenance.json")
    backbone = model["facts"]["trained_on"]["embedding_model"]
    has_street_view = any(_has_street_view(table) for table in tables)
    terms = {"license_name": "that-of-the-photographs"}
    if has_street_view:
        terms = {
            "license_name": "3d-street-view-non-commercial-research",
            "license_link": "https://github.com/amir32002/3D_Street_View",
        }
    data = DatasetCardData(
        license="other",
        **terms,  # type: ignore[arg-type] # its own fields follow those of the class
        pretty_name="Building embeddings",
        task_categories=["image-feature-extraction"],
        tags=["image-retrieval", "embeddings", "street-view", "buildings"],
        size_categories=next((name for name, end in _SIZES if tables[0].rows < end), "10M<n<100M"),
        configs=[
            {
                "config_name": table.name,
                "data_files": [{"split": split, "path": path} for split, path in table.splits.items()],
                # `datasets` takes what it has read of an equal card for the same: a retrained model's has others
                "description": provenance.digest_of(*(parquet.content_id(path).encode() for path in table.paths)),
                **({"default": True} if table is tables[0] else {}),
            }
            for table in tables
        ],
    )
    filled = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=repo,
        tables={table.name: table for table in tables},
        types={table.name: {field.name: _type_of(field.type) for field in table.schema} for table in tables},
        dim=tables[0].schema.field("embedding").type.list_size,
        weights=model_files.weights_digest(model_record.folder_of(cfg, None)),
        backbone=backbone,
        model_repo=model_repo,
        has_street_view=has_street_view,
    )
    return str(filled).rstrip() + "\n"


def _type_of(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{_type_of(kind.value_type)}[{kind.list_size}]"
    return f"list of {kind.value_type}" if pa.types.is_list(kind) else _WIDTHS.get(str(kind), str(kind))


def _has_street_view(table: Table) -> bool:
    """Whether some rows are of the dataset's photographs, or do not say whose they are."""
    if "dataset_id" not in table.schema.names:
        return True
    firsts = [pc.min(parquet.read(path, ["dataset_id"])["dataset_id"]).as_py() for path in table.paths]
    return any(first is None or first < _FIRST_IMPORTED for first in firsts)


def lay_out(folder: Path, tables: list[Table], text: str) -> None:
    """Write the dataset's folder: the card, and links to the tables' files in place of earlier ones."""
    for old in [path for path in going(folder).values() if path.is_symlink()]:
        old.unlink()
    for table in tables:
        (folder / table.name).mkdir(parents=True, exist_ok=True)
        for path in table.paths:
            (folder / table.name / path.name).symlink_to(path.resolve())
    files.write_text(folder / "README.md", text)


def going(folder: Path) -> dict[str, Path]:
    """The files of the folder that are sent to the hub, by their names there."""
    return {str(path.relative_to(folder)): path for pattern in PATTERNS for path in sorted(folder.glob(pattern))}


def listing(folder: Path, repo: str) -> str:
    """What would be sent where, with sizes, which table is missing, and where the card is to be read before."""
    names = going(folder)
    lines = [push.listing(names, f"https://huggingface.co/datasets/{repo}")]
    for table, script in (("images", "generate_embeddings_from_parquet"), ("buildings", "aggregate_buildings")):
        if not any(name.startswith(f"{table}/") for name in names):
            lines.append(f"without {table}: publish/{script}.py makes them")
    return "\n".join([*lines, f"the card: {folder / 'README.md'}"])


def send(folder: Path, repo: str) -> str:
    """Send the folder to the dataset repository `repo`; the commit's URL. Raises PipelineError."""
    former = PATTERNS[1:]  # vectors of an earlier push: a configuration would read them, too
    message = "Publish vectors of images and buildings"
    return push.upload(
        going(folder), repo, message, replaced=former, flag="push_embeddings.py", repo_type="dataset"
    )
