"""publish/convert_to_hf.py and what it publishes. Oracles: the head on the pipeline's own embeddings, and
transformers' own AutoModel, pipeline and save_pretrained.
"""

import copy
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import ROOT
from embedding_setup import SIZES, cosines, picture
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import filter_repo_objects
from invented_metrics import FIGURES
from local_backbone import FAMILIES
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from trained_model import JPEGS, Trained
from transformers import AutoImageProcessor

from common import cli, parquet, provenance
from common.errors import PipelineError, StaleArtefact
from common.imagery.decoding import decode
from generate import backbone
from generate.model_files import weights_digest
from publish import build_index
from publish.convert_to_hf import main
from publish.hub import card_figures, model_card, parity, published_folder, push, space_push
from publish.inference import published_model
from publish.model.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from publish.model.modeling_spatial_embeddings import SpatialEmbeddingsHead, SpatialEmbeddingsModel

CPU = torch.device("cpu")


def publish_without_check(done: Trained) -> Path:
    """The folder as convert_to_hf writes it, without the parity check, which another test has."""
    path = done.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    checkpoint = torch.load(path, weights_only=True)
    folder = done.root / "published"
    folder.mkdir()
    settings = published_folder.backbone_settings(done.cfg, path, checkpoint)
    preprocessing = published_folder.write_model(folder, settings, path, checkpoint)
    model_card.write(folder, done.cfg, checkpoint, done.metrics, preprocessing)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Published; tests that change something take a copy."""
    done = Trained(tmp_path_factory.mktemp("trained"))
    assert main(done.flags) == 0
    return done


USE = """
import importlib.util, sys, glob, numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline
for name in ("pandas", "pyarrow", "sklearn", "simplejpeg", "torchvision", "scipy", "common", "publish"):
    assert importlib.util.find_spec(name) is None, name
folder = sys.argv[1]
paths = sorted(glob.glob("*.jpg"))
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder)
inputs = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
found = {}
with torch.inference_mode():
    found["auto_model"] = model(**inputs).pooler_output
    found["one_by_one"] = torch.cat([model(inputs["pixel_values"][i : i + 1]).pooler_output for i in range(7)])
    found["tuple"] = model(**inputs, return_dict=False)[1]
    found["project"] = model.project(torch.from_numpy(np.load("embeddings.npy")))
    extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, pool=True)
    found["pipeline"] = torch.tensor([extract(path)[0] for path in paths])
    model.save_pretrained("again")
    found["saved_again"] = AutoModel.from_pretrained("again", trust_remote_code=True)(**inputs).pooler_output
    half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.backbone.dtype == torch.bfloat16
    found["bfloat16"] = half(**inputs).pooler_output
    found["bfloat16_one_by_one"] = torch.cat(
        [half(inputs["pixel_values"][i : i + 1]).pooler_output for i in range(7)]
    )
    found["cast"] = model.to(torch.bfloat16)(**inputs).pooler_output
np.savez("found.npz", **{name: vectors.float().numpy() for name, vectors in found.items()})
"""


def fresh_environment(folder: Path, more: list[str]) -> str:
    """The Python of a new virtual environment with torch, transformers, pillow, numpy and `more`, and what those
    require.

    The packages are links to the ones that run this test: downloading them takes minutes and gives the same files.
    """
    wanted, todo = {}, ["torch", "transformers", "pillow", "numpy", *more]
    while todo:
        name = todo.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for other systems
        if found.name in wanted:
            continue
        wanted[found.name] = found
        requirements = [Requirement(text) for text in found.requires or []]
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for found in wanted.values():
        root = Path(found.locate_file(""))
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(root / top)
    return str(folder / "bin" / "python")


def in_fresh_environment(place: Path, code: str, *arguments: str, more: list[str] | None = None) -> str:
    """What the code prints in a fresh environment, in `place`, offline, without this repository."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    command = [fresh_environment(place / "environment", more or []), "-c", code, *arguments]
    done = subprocess.run(command, cwd=place, env=kept, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_published_folder_alone_gives_the_pipelines_vectors(trained, tmp_path):
    for number, content in enumerate(JPEGS):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    np.save(tmp_path / "embeddings.npy", trained.embeddings().numpy())
    in_fresh_environment(tmp_path, USE, str(trained.cfg.paths.published_dir))
    found = np.load(tmp_path / "found.npz")
    assert len(found.files) == 9
    for name in found.files:
        assert found[name].shape == (7, 16), name
        assert np.allclose(np.linalg.norm(found[name], axis=1), 1, atol=1e-5), name
        assert (1 - cosines(found[name], trained.vectors()) < 1e-3).all(), name


def code_of(card: Path, *headings: str) -> str:
    """The Python in some sections of a card."""
    sections = re.split("^##+ (.*)\n", card.read_text(), flags=re.MULTILINE)
    text = dict(zip(sections[1::2], sections[2::2], strict=True))
    return "\n".join(
        code for name in headings for code in re.findall("```python\n(.*?)```", text[name], re.DOTALL)
    )


CARD_SECTIONS = ("Use", "A folder, in batches", "A vector for each building", "Search with faiss")


def test_the_cards_code_runs_as_it_stands(tmp_path):
    for name, content in zip(("a.jpg", "b.jpg"), JPEGS, strict=False):
        (tmp_path / name).write_bytes(content)
    for number, content in enumerate(JPEGS):  # the first building has three views
        path = tmp_path / "photographs" / f"building {number // 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    code, expected = "", {}
    for family in ("dinov2", "dinov3_vit"):  # the second prepares images without AutoImageProcessor
        done = Trained(tmp_path / family, family)
        folder = publish_without_check(done)
        example = code_of(folder / "README.md", *CARD_SECTIONS).replace("PATH", str(folder))
        example += (
            f"\nimport numpy\nnumpy.savez({family!r}, a=a, b=b, vectors=vectors, buildings=building_vectors)"
        )
        code += f"exec({example!r}, {{}})\n"  # each by itself
        expected[family] = done.vectors()
    printed = in_fresh_environment(tmp_path, code, more=["faiss-cpu"])
    for family, vectors in expected.items():
        found = np.load(tmp_path / f"{family}.npz")
        means = [vectors[start : start + 3].mean(axis=0) for start in (0, 3, 6)]
        assert (1 - cosines(found["vectors"], vectors) < 1e-3).all()
        assert (1 - cosines(np.stack([found["a"], found["b"]]), vectors[:2]) < 1e-3).all()
        assert (1 - cosines(found["buildings"], means) < 1e-3).all()
        assert np.allclose(np.linalg.norm(found["buildings"], axis=1), 1, atol=1e-5)
        ranked = [f"building {row}" for row in np.argsort(-found["buildings"] @ found["a"])]
        lines = printed.split("images/s\n")[1 + list(expected).index(family)].splitlines()
        assert [line.split("  ")[1] for line in lines[:3]] == ranked


@pytest.fixture
def used_here(monkeypatch):
    """The parity check's script runs in this process, which has imported everything already."""

    def run(command, *, cwd, **_):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", *command[3:]])
            patch.chdir(cwd)
            exec(command[2], {})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(parity.subprocess, "run", run)


def settings_changed(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def weights_changed(folder: Path, part: str, share: float) -> None:
    """A share of noise in the weights of a part: another revision of it."""
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in weights.items():
        if name.startswith(part):
            tensor += share * tensor.std(correction=0) * torch.randn_like(tensor)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


OTHER_MODELS = {  # what is done to the published folder -> the part that the check names
    "pooling": (lambda folder: settings_changed(folder, pooling="mean"), "model's embeddings"),
    "views": (lambda folder: settings_changed(folder, views=[1.0, 0.7]), "model's embeddings"),
    "backbone": (lambda folder: weights_changed(folder, "backbone.", 0.05), "model's embeddings"),
    "head": (lambda folder: weights_changed(folder, "head.", 0.01), "head's vectors"),
}


def checked(done: Trained, folder: Path, **resize) -> parity.Parity:
    checkpoint = torch.load(done.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt", weights_only=True)
    preprocessing = backbone.load(done.cfg.embedding_model, "float32", CPU).preprocessing
    return parity.check(folder, done.cfg, checkpoint, dataclasses.replace(preprocessing, **resize), CPU)


@pytest.mark.parametrize("change", OTHER_MODELS)
def test_the_parity_check_finds_what_differs(change, trained, tmp_path, used_here):
    folder = shutil.copytree(trained.cfg.paths.published_dir, tmp_path / f"other_{change}")
    alter, part = OTHER_MODELS[change]
    alter(folder)
    with pytest.raises(PipelineError, match=rf"the published {part} are up to"):
        checked(trained, folder)


def test_the_parity_check_finds_another_resize(trained, used_here):
    folder = trained.cfg.paths.published_dir
    found = checked(trained, folder)
    assert found.parity_images == 7
    assert found.backbone_cosine_distance < 1e-6  # stored with 11 bits
    assert found.head_cosine_distance < 1e-12
    with pytest.raises(PipelineError, match="different backbone or preprocessing"):
        checked(trained, folder, shortest_edge=160)  # of which the middle 112 pixels are cut, instead of 112


def test_the_backbones_rounding_may_be_amplified_by_the_head(trained, monkeypatch):
    """As by a whitening, where few embeddings differ in a direction: here none does."""
    stored, head = trained.embeddings(), copy.deepcopy(trained.head)
    direction = torch.linalg.svd(stored)[2][-1]
    head.mean.data -= (head.mean @ direction) * direction
    head.linear.weight.data[0] = 100 * direction
    rounded = stored + 0.01 * torch.linalg.norm(stored, dim=1, keepdim=True) * direction
    with torch.inference_mode():
        vectors = head(rounded)
        assert (1 - cosines(vectors, head(stored))).min() > 1e-2
    path = trained.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    checkpoint = {**torch.load(path, weights_only=True), "head": head.state_dict()}
    monkeypatch.setattr(parity, "outputs_of", lambda *_: (rounded.numpy(), vectors.numpy()))
    preprocessing = backbone.load(trained.cfg.embedding_model, "float32", CPU).preprocessing
    found = parity.check(Path("published"), trained.cfg, checkpoint, preprocessing, CPU)
    assert found.backbone_cosine_distance == pytest.approx(0.01**2 / 2, rel=1e-2)
    assert found.head_cosine_distance < 1e-12


def test_project_gives_the_vectors_of_embeddings_made_earlier(trained):
    model = SpatialEmbeddingsModel.from_pretrained(trained.cfg.paths.published_dir)
    with torch.inference_mode():
        assert np.allclose(model.project(trained.embeddings()).numpy(), trained.vectors(), atol=1e-6)


def test_the_folder_holds_what_a_user_needs_and_no_path_of_this_machine(trained):
    folder = trained.cfg.paths.published_dir
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "provenance.json"),
        *("configuration_spatial_embeddings.py", "modeling_spatial_embeddings.py", "projection_head.py"),
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "results.png"),
    }
    for path in folder.glob("*.*"):
        if path.suffix in (".json", ".md", ".py"):
            assert str(trained.root) not in path.read_text(), path.name
    assert len({path.stat().st_mode for path in folder.glob("*.*")}) == 1  # others may read the weights too
    settings = json.loads((folder / "config.json").read_text())
    assert settings["backbone_config"]["model_type"] == "dinov2"
    assert set(settings["auto_map"]) == {"AutoConfig", "AutoModel"}
    # where sentence-transformers looks for the output's dimensions; hidden_dim, its next choice, is 24
    assert SpatialEmbeddingsConfig.from_pretrained(folder).projection_dim == 16
    for name in ("configuration_spatial_embeddings.py", "modeling_spatial_embeddings.py", "projection_head.py"):
        assert (folder / name).read_bytes() == (ROOT / "publish" / "model" / name).read_bytes()


def test_the_card_holds_the_measured_figures_with_their_intervals(trained):
    made = ModelCard.load(trained.cfg.paths.published_dir / "README.md")
    assert made.data.pipeline_tag == "image-feature-extraction"
    assert made.data.library_name == "transformers"
    assert made.data.license == "other"  # of a local folder nobody knows
    by_type = {result.metric_type: result for result in made.data.eval_results}
    assert set(by_type) == {"recall@1", "map@r", "median_rank"}  # in a gallery of 2 images the others tell nothing
    for key, result in by_type.items():
        figure = FIGURES[key]
        assert result.metric_value == figure["value"]
        assert result.metric_args == {"low": figure["low"], "high": figure["high"]}
    assert "| this model | 25.0 [15.0, 35.0] | 12.5 [2.5, 22.5] | 4 [4, 4] |" in made.text
    assert "| learned whitening | 0.0 [0.0, 0.0] |" in made.text
    assert "| this model minus learned whitening | +25.0 [+15.0, +35.0] |" in made.text
    assert "non-commercial" in made.text
    assert "its licence, which this card does not know" in made.text
    assert "{{ " not in made.text
    assert "{%" not in made.text


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("facebook/dinov2-base", "apache-2.0"),
        ("facebook/dinov2-with-registers-large", "apache-2.0"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "other"),
    ],
)
def test_the_licence_is_that_of_the_backbone(name, licence):
    assert model_card.licence(name)["license"] == licence
    assert (model_card.licence(name).get("license_name") == "dinov3-license") == ("dinov3" in name)


def test_a_head_alone_says_how_many_dimensions_it_takes():
    head = SpatialEmbeddingsHead(SpatialEmbeddingsConfig(input_dim=8, hidden_dim=4, output_dim=2))
    assert head(embeddings=torch.ones(3, 8)).pooler_output.shape == (3, 2)
    for call in (head, head.project):
        with pytest.raises(ValueError, match="takes 8 dimensions, not 9"):
            call(torch.ones(3, 9))


def test_the_cards_metadata_is_whole_by_the_hubs_rules(trained):
    """The hub's own check needs a network; these are its rules, and huggingface_hub's reading without excuses."""
    text = (trained.cfg.paths.published_dir / "README.md").read_text()
    made = ModelCard(text, ignore_metadata_errors=False)
    (model,) = yaml.safe_load(text.split("---")[1])["model-index"]
    metrics = json.loads((trained.cfg.paths.evaluation_dir / "metrics.json").read_text())["methods"]["trained"]
    assert model["name"]
    assert model_index_to_eval_results([model])[1] == made.data.eval_results
    listed = {}
    for result in model["results"]:
        assert result["task"]["type"] == made.data.pipeline_tag
        assert result["dataset"]["type"]
        assert result["dataset"]["name"]
        listed |= {metric["type"]: (metric["value"], metric["args"]) for metric in result["metrics"]}
    figures = {key: (f["value"], {"low": f["low"], "high": f["high"]}) for key, f in metrics.items()}
    assert listed == {key: figures[key] for key in ("recall@1", "map@r", "median_rank")}
    assert made.data.language == "en"
    assert made.data.datasets == ["3d-street-view"]
    assert re.fullmatch(r"[a-z0-9.-]+", made.data.license_name)  # required where the licence is "other"
    assert all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in made.data.tags)


def test_a_dry_run_lists_what_would_go_and_sends_nothing(trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained.cfg.paths.published_dir, tmp_path / "published")
    (folder / "sheet.png").write_bytes(b"a picture of the dataset")
    monkeypatch.setattr(push, "HfApi", None)
    flags = [*trained.flags, "--set", f"paths.published_dir={folder}"]
    assert main([*flags, "--push", "me/buildings", "--dry-run"]) == 0
    told = capsys.readouterr().out
    weights = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"{weights:,} bytes  model\.safetensors", told)
    kept = [path.stat().st_size for path in folder.iterdir() if path.name not in ("sheet.png", "README.md")]
    total = sum(kept) + len(push.of_model(folder, "me/buildings")["README.md"].encode())
    assert f"{total:,} bytes  in total" in told
    assert "stays here: sheet.png" in told
    assert cli.exit_code_of(lambda: main([*flags, "--dry-run"])) == 2


class Hub:
    """In the place of HfApi: what it is asked, and the files that it is sent."""

    def __init__(self):
        self.calls, self.sent = [], {}

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))

    def upload_folder(self, *, repo_id, folder_path, repo_type, delete_patterns, commit_message):
        self.calls.append((repo_id, repo_type))
        self.replaced = delete_patterns
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]  # as huggingface_hub lists them
        self.sent = {str(path.relative_to(folder_path)): path.read_bytes() for path in paths}
        return SimpleNamespace(commit_url="https://hub/commit")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    return hub


def test_pushing_sends_the_listed_files_to_a_private_repository(trained, tmp_path, hub):
    folder = shutil.copytree(trained.cfg.paths.published_dir, tmp_path / "published")
    (folder / "sheet.png").write_bytes(b"a picture of the dataset")
    (folder / "models-old").mkdir()
    (folder / "models-old" / "a.safetensors").write_bytes(b"not in the listing")
    assert main([*trained.flags, "--set", f"paths.published_dir={folder}", "--push", "me/buildings"]) == 0
    assert hub.calls == [("me/buildings", {"private": True, "exist_ok": True}), ("me/buildings", None)]
    files = {path.name: path.read_bytes() for path in trained.cfg.paths.published_dir.iterdir()}
    assert hub.sent.keys() == files.keys()
    assert [name for name in files if hub.sent[name] != files[name]] == ["README.md"]
    former = ["model-00001-of-00002.safetensors", "provenance.json", ".gitattributes", "a.png"]
    assert list(filter_repo_objects(former, allow_patterns=hub.replaced)) == former[:2]


def test_the_pushed_card_names_its_repository_and_the_local_one_a_path(trained):
    folder = trained.cfg.paths.published_dir
    local, pushed = (folder / "README.md").read_text(), push.of_model(folder, "me/buildings")["README.md"]
    assert 'AutoModel.from_pretrained("PATH"' in local
    assert "`PATH` is the folder" in local
    assert 'AutoModel.from_pretrained("me/buildings"' in pushed
    assert "PATH" not in pushed


@pytest.fixture
def index(trained, tmp_path) -> Path:
    """An index of the published model's vectors."""
    return index_of(
        trained, tmp_path / "index", trained.vectors(), weights_digest(trained.cfg.paths.published_dir)
    )


def index_of(trained: Trained, folder: Path, vectors: np.ndarray, model: str, **more: pa.Array) -> Path:
    """An index of vectors by `model` of the test images, with `more` columns."""
    rows = parquet.read(trained.cfg.paths.merged_dir / "test.parquet").drop(["embedding"])
    columns = {"embedding": pa.array(vectors.tolist(), pa.list_(pa.float32())), **more}
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    made = provenance.record("generate_embeddings_from_parquet", {"model.weights": model}, {})
    with parquet.writer(folder.with_name("of") / "vectors.parquet", rows.schema, made) as out:
        out.append(rows)
    assert build_index.main([str(folder.with_name("of")), str(folder)]) == 0
    return folder


def test_a_space_is_sent_with_its_index_and_the_name_of_its_model(trained, index, hub, capsys):
    push_both = ["--push", "me/buildings", "--push-space", "me/search", "--set", f"paths.index_dir={index}"]
    assert main([*trained.flags, *push_both, "--dry-run"]) == 0
    assert not hub.calls
    told = capsys.readouterr().out
    assert "to https://huggingface.co/spaces/me/search (private, if it is new):" in told
    assert re.search(rf"{(index / 'vectors.npy').stat().st_size:,} bytes  vectors\.npy", told)
    assert main([*trained.flags, *push_both]) == 0
    options = {"private": True, "exist_ok": True, "repo_type": "space", "space_sdk": "gradio"}
    assert hub.calls[2:] == [("me/search", options), ("me/search", "space")]
    names = {"README.md", "requirements.txt", "app.py", "MODEL", "vectors.npy", "rows.parquet", "index.json"}
    assert hub.sent.keys() == names
    assert not hub.replaced
    assert hub.sent["MODEL"] == b"me/buildings\n"
    card = yaml.safe_load(hub.sent["README.md"].decode().split("---")[1])
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["me/buildings"])
    needs = {need.name: need.specifier for need in map(Requirement, _lines(hub.sent["requirements.txt"]))}
    assert not needs["pillow"].contains("13.0.0")  # gradio's own bound
    assert "torchvision" not in needs
    assert cli.exit_code_of(lambda: main([*trained.flags, "--push-space", "me/search"])) == 2


def _lines(content: bytes) -> list[str]:
    return [line for line in content.decode().splitlines() if not line.startswith("#")]


def test_a_space_keeps_photographs_no_longer_than_it_says():
    """Gradio looks every so many seconds, and deletes what is older than so many."""
    every, older_than = map(
        int, re.findall(r"delete_cache=\((\d+), (\d+)\)", (space_push.SPACE / "app.py").read_text())[0]
    )
    assert every + older_than <= 600
    for name in ("app.py", "README.md"):
        assert "within ten minutes" in (space_push.SPACE / name).read_text()


def test_a_space_with_photographs_or_another_models_vectors_is_refused(trained, index, tmp_path):
    published, vectors = trained.cfg.paths.published_dir, trained.vectors()
    with_bytes = index_of(
        trained, tmp_path / "bytes", vectors, "unknown", image=pa.array([b"jpeg"] * 7, pa.binary(4))
    )
    with pytest.raises(PipelineError, match="may be photographs: image"):
        space_push.of_space(published, "me/buildings", with_bytes)
    for name, values, model, message in (
        ("other", vectors, "another", "by another model"),
        ("longer", np.hstack([vectors, vectors]), "unknown", "of 32 dimensions"),
    ):
        with pytest.raises(StaleArtefact, match=message):
            space_push.of_space(published, "me/buildings", index_of(trained, tmp_path / name, values, model))
    shutil.copy(with_bytes / "rows.parquet", index)
    with pytest.raises(PipelineError, match="not of one index"):
        space_push.of_space(published, "me/buildings", index)
    (index / "index.json").unlink()
    with pytest.raises(PipelineError, match=r"build_index\.py"):
        space_push.of_space(published, "me/buildings", index)


@pytest.mark.parametrize(
    ("repo", "message"), [("me/buildings", "cannot be reached|network"), ("not a name", "not a valid repository")]
)
def test_a_hub_that_does_not_answer_or_a_wrong_name_is_a_clear_error(repo, message, trained):
    with pytest.raises(PipelineError, match=message):  # HF_HUB_OFFLINE is set for all tests
        push.push(trained.cfg.paths.published_dir, repo)


def test_a_network_that_is_not_there_is_a_clear_error_too(trained):
    code = "import sys; from pathlib import Path; from publish.hub import push; from common import cli; "
    code += "cli.run(lambda: push.push(Path(sys.argv[1]), 'me/buildings'))"
    command = [sys.executable, "-c", code, str(trained.cfg.paths.published_dir)]
    online = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=online, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "the hub cannot be reached from here" in done.stderr
    assert "Traceback" not in done.stderr


def test_recall_is_shown_up_to_a_tenth_of_the_gallery():
    shown = model_card.shown_titles({"counts": {"gallery": 1690}})
    assert list(shown) == ["recall@1", "recall@5", "recall@10", "recall@100", "map@r", "median_rank"]


def test_a_cosine_is_explained_by_the_pairs_that_reach_it():
    cosines = np.random.default_rng(0).normal([[0.5], [0.0]], 0.2, (2, 5_000)).clip(-1, 1)
    edges = np.linspace(-1, 1, 81)
    counts = [np.histogram(values, edges)[0].tolist() for values in cosines]
    histograms = {"edges": edges.tolist(), "matches": counts[0], "non_matches": counts[1]}
    found = card_figures.thresholds(histograms)
    assert len(found) == 2  # a thousandth of 5,000 pairs is 5: too few
    for threshold, share in zip(found, (0.1, 0.01), strict=True):
        matches, non_matches = (cosines >= threshold.cosine).mean(axis=1)
        assert threshold[1:] == pytest.approx((matches, non_matches))
        assert non_matches <= share < (cosines[1] >= threshold.cosine - 0.025).mean()  # the bin below is too low
    assert card_figures.thresholds({"edges": [-1.0, 1.0], "matches": [1], "non_matches": [1]}) == []


@pytest.mark.parametrize(
    ("gallery", "where"), [("test", "all in the test split"), ("all", "a test image and any")]
)
def test_the_cosines_of_the_card_are_those_that_were_counted(gallery, where, trained, tmp_path):
    path = trained.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    histograms = {"edges": [-1.0, 0.425, 0.475, 1.0], "matches": [1, 1, 2], "non_matches": [900, 80, 20]}
    metrics = {**trained.metrics, "gallery": gallery, "similarity_histograms": histograms}
    model_card.write(tmp_path, trained.cfg, torch.load(path, weights_only=True), metrics, None)
    section = (tmp_path / "README.md").read_text().split("### What a cosine means")[1].split("##")[0]
    assert "| 0.425 | 75 % | 10 % |" in section
    assert where in section
    assert ("test split" in section) == (gallery == "test")


def test_the_card_says_how_large_the_model_is(trained):
    folder = trained.cfg.paths.published_dir
    weights = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    head = sum(size for name, size in weights.items() if name.startswith("head."))
    preprocessing = backbone.load(trained.cfg.embedding_model, "float32", CPU).preprocessing
    sizes = model_card.sizes(folder, preprocessing)
    assert (sizes["head"], sizes["backbone"]) == (head, sum(weights.values()) - head)
    assert sizes["bytes"] == (folder / "model.safetensors").stat().st_size


def test_figures_without_intervals_are_told_without():
    assert model_card.as_text({"value": 0.5, "low": None, "high": None}, "recall@1") == "50.0"
    assert model_card.as_text({"value": 12.0, "low": 9.4, "high": 15.2}, "median_rank") == "12 [9, 15]"


def test_a_second_run_does_nothing(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.cfg.paths.published_dir.iterdir()}
    assert main(trained.flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.cfg.paths.published_dir.iterdir()} == before


def test_the_attention_that_a_user_asks_for_is_the_backbones(trained):
    folder = trained.cfg.paths.published_dir
    x = torch.zeros(1, 3, 112, 112)  # two views of 56 pixels
    by_default = SpatialEmbeddingsModel.from_pretrained(folder)
    assert by_default.backbone.config._attn_implementation == "sdpa"
    assert SpatialEmbeddingsModel.from_pretrained(folder, attn_implementation="sdpa")  # once refused
    eager = SpatialEmbeddingsModel.from_pretrained(folder, attn_implementation="eager")
    output = eager(x, output_attentions=True)
    assert [tuple(map.shape) for map in output.attentions] == [(2, 2, 17, 17)] * 2  # of two views; sdpa has none
    assert output.last_hidden_state.shape == (1, 34, 32)
    assert torch.allclose(output.pooler_output, by_default(x).pooler_output, atol=1e-5)


@pytest.mark.parametrize("views", [[1.0], [1.0, 0.5], [1.0, 0.7, 0.5, 0.35], [0.5]])
def test_processor_and_model_make_the_pipelines_views_of_images_of_every_shape(views, tmp_path):
    done = Trained(tmp_path, embedding_model__views=views)
    folder = publish_without_check(done)
    images = [picture(*size, mode).convert("RGB") for size in SIZES for mode in ("RGB", "L")]
    ours = backbone.load(done.cfg.embedding_model, "float32", CPU)
    model = SpatialEmbeddingsModel.from_pretrained(folder)
    inputs = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.inference_mode():
        expected = done.head(ours(ours.preprocessing(map(np.array, images), CPU)))
        vectors = model(**inputs).pooler_output
        exported = torch.export.export(model, (inputs["pixel_values"],)).module()(inputs["pixel_values"])
    assert (1 - cosines(vectors, expected) < 1e-3).all()
    assert torch.allclose(exported.pooler_output, vectors, atol=1e-5)


def test_a_folder_that_names_no_views_has_the_whole_image(tmp_path):
    done = Trained(tmp_path, embedding_model__views=[1.0])
    folder = publish_without_check(done)
    config = json.loads((folder / "config.json").read_text())
    assert (config.pop("views"), config.pop("view_size")) == ([1.0], [56, 56])
    (folder / "config.json").write_text(json.dumps(config))  # as published before there were views
    published = published_model.load(folder, "float32", CPU)
    images = [decode(content) for content in JPEGS]
    vectors = published.forward(published.preprocessing(images, CPU))
    assert published.preprocessing.image_size == [56, 56]
    assert (1 - cosines(vectors, done.vectors()) < 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_family_is_saved_in_the_dtype_of_its_embeddings_and_gives_the_same(family, dtype, tmp_path):
    settings = {"embedding_model__dtype": dtype, "embedding_model__pooling": "cls_mean"}
    done = Trained(tmp_path, family, **settings)
    path = done.cfg.paths.checkpoints_dir / "default" / "checkpoint_best.pt"
    checkpoint = torch.load(path, weights_only=True)
    (tmp_path / "out").mkdir()
    backbone_settings = published_folder.backbone_settings(done.cfg, path, checkpoint)
    preprocessing = published_folder.write_model(tmp_path / "out", backbone_settings, path, checkpoint)
    model_card.write(tmp_path / "out", done.cfg, checkpoint, done.metrics, preprocessing)
    assert "nan" not in ModelCard.load(tmp_path / "out" / "README.md").text
    model = SpatialEmbeddingsModel.from_pretrained(tmp_path / "out")
    assert model.backbone.dtype == getattr(torch, dtype)
    assert model.head.linear.weight.dtype == torch.float32
    rows = parquet.read(done.cfg.paths.merged_dir / "test.parquet")
    images = [parity.decode(encoded) for encoded in parity.of_paths(done.cfg.paths).read(rows)]
    with torch.inference_mode():
        vectors = model(preprocessing(images, CPU)).pooler_output.numpy()
    assert (1 - cosines(vectors, done.vectors()) < 1e-3).all()
