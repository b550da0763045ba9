"""publish/demo_usage.py and photo_search.py. Oracles: the published model run plainly, and histograms small enough
to count in.
"""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from conftest import paths_below
from embedding_setup import cosines, jpeg, picture, write_intermediates, write_tar
from invented_metrics import FOUND
from local_backbone import write_preprocessor
from PIL import Image
from test_generate_embeddings_from_hf import flags, image_folder, model, plain_vectors  # noqa: F401 - fixtures
from trained_model import JPEGS

from common import cli, config, parquet, provenance, schemas
from common.errors import ConfigError, PipelineError
from publish.demo_usage import main
from publish.inference import image_labels, photo_search, published_model
from train.evaluation import metrics_json

QUERY = jpeg(picture(90, 70, seed=500))


@pytest.fixture
def query(tmp_path) -> str:
    (tmp_path / "query.jpg").write_bytes(QUERY)
    return str(tmp_path / "query.jpg")


def results_of(output: str) -> list[tuple[float, str]]:
    """(similarity, image) of the lines of the table."""
    lines = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]
    return [(float(line[1]), line[-1]) for line in lines]


def test_search_gives_the_most_similar_images_first(model, flags, query, tmp_path, capsys):  # noqa: F811
    names = image_folder(tmp_path / "gallery")
    out = tmp_path / "found.png"
    command = ["search", query, "--gallery", str(tmp_path / "gallery"), "--top", "4", "--out", str(out), *flags]
    assert main(command) == 0
    similarities = plain_vectors(model, JPEGS) @ plain_vectors(model, [QUERY])[0]
    found = results_of(capsys.readouterr().out)
    assert [name for _, name in found] == [names[i] for i in np.argsort(-similarities)[:4]]
    assert np.allclose([s for s, _ in found], np.sort(similarities)[::-1][:4], atol=2e-3)  # 3 digits, grey levels
    assert Image.open(out).width > 4 * Image.open(out).height / 2  # the query and 4 results in a row


def test_search_in_a_tar_names_what_cannot_be_decoded(flags, query, tmp_path, capsys, caplog):  # noqa: F811
    write_tar(tmp_path / "0088.tar", [*JPEGS[:3], JPEGS[3][:600]])
    out = str(tmp_path / "found.png")
    assert main(["search", query, "--gallery", str(tmp_path / "0088.tar"), "--out", out, *flags]) == 0
    told = capsys.readouterr().out
    assert len(results_of(told)) == 3
    assert "the nearest of 3 images" in told
    [warning] = [record.message for record in caplog.records if "skipping" in record.message]
    assert "_3_" in warning


def test_a_gallery_of_several_tars_is_refused(flags, query, tmp_path):  # noqa: F811
    rows = {name: [1] for name in schemas.INTERMEDIATES.names}
    for tar in ("0088", "0089"):
        made = provenance.record("process_tar", {}, {})
        with parquet.writer(tmp_path / "many" / f"{tar}.parquet", schemas.INTERMEDIATES, made) as out:
            out.append(pa.table(rows).cast(schemas.INTERMEDIATES))
    with pytest.raises(ConfigError, match="holds the images of 2 tars: name one of these tars"):
        main(["search", query, "--gallery", str(tmp_path / "many"), *flags])


def test_a_gallery_of_which_nothing_can_be_decoded_is_a_clear_error(flags, query, tmp_path):  # noqa: F811
    write_tar(tmp_path / "0088.tar", [content[:600] for content in JPEGS[:2]])
    with pytest.raises(PipelineError, match="none of the 2 images"):
        main(["search", query, "--gallery", str(tmp_path / "0088.tar"), *flags])


def verdicts(output: str) -> dict[str, bool | None]:
    """Name -> whether it is said to show the query's building; None: nothing is said."""
    words = {"same building": True, "another building": False}
    lines = [line for line in output.splitlines() if line.strip()[:1].isdigit()]
    told = [next((verdict for text, verdict in words.items() if text in line), None) for line in lines]
    return dict(zip([line.split()[-1] for line in lines], told, strict=True))


def test_results_of_the_dataset_say_whether_they_show_the_same_building(flags, tmp_path, capsys):  # noqa: F811
    cfg = config.load(None, [f"paths.root={tmp_path}"])
    tar = cfg.paths.raw_dir / "0088.tar"
    write_tar(tar, JPEGS[:4])  # images 0 and 1 show building 0, 2 and 3 building 1
    out = ["--out", str(tmp_path / "found.png"), *flags]
    search = ["search", f"{tar}:0088/0088_0_0_0.jpg", *out]
    main([*search, "--gallery", str(tar)])
    assert set(verdicts(capsys.readouterr().out).values()) == {None}  # it is not among the pipeline's sources yet
    write_intermediates(cfg)
    main([*search, "--gallery", str(tar)])
    expected = {n: n < 2 for n in (1, 2, 3)}  # without the query itself
    assert verdicts(capsys.readouterr().out) == {f"0088/0088_{n}_0_{n // 2}.jpg": expected[n] for n in expected}
    main([*search, "--gallery", str(cfg.paths.intermediates_dir)])
    assert verdicts(capsys.readouterr().out) == {f"0088_{n}": expected[n] for n in expected}
    (tmp_path / "away").mkdir()
    write_tar(tmp_path / "away" / "0088.tar", JPEGS[2:])  # another tar of this name
    main(["search", f"{tmp_path}/away/0088.tar:0088/0088_0_0_0.jpg", *out, "--gallery", str(tar)])
    assert set(verdicts(capsys.readouterr().out).values()) == {None}


@pytest.mark.parametrize(
    "names",
    [[f"WhatsApp Image {n}5.jpg" for n in range(7)], ["0088_7_1_3.jpg", *(f"photo {n}.jpg" for n in range(6))]],
)
def test_names_of_files_are_no_labels(names, model, flags, tmp_path, capsys):  # noqa: F811
    (tmp_path / "gallery").mkdir()
    for name, content in zip(names, JPEGS, strict=True):
        (tmp_path / "gallery" / name).write_bytes(content)
    (tmp_path / "0088_1_2_3.jpg").write_bytes(QUERY)  # the same building as 0088_7_1_3.jpg in the dataset
    out = tmp_path / "found.png"
    search = ["search", str(tmp_path / "0088_1_2_3.jpg"), "--gallery", str(tmp_path / "gallery"), *flags]
    assert main([*search, "--out", str(out), "--top", "7"]) == 0
    assert "building" not in capsys.readouterr().out
    pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    for colour in ((0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)):  # of the frames of verdicts
        assert not (pixels == colour).all(axis=1).any()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_labels_gives_verdicts(suffix, flags, query, tmp_path, capsys):  # noqa: F811
    names = image_folder(tmp_path / "gallery")
    table = pa.table({"image": ["query.jpg", *names[:4]], "building": ["7", "7", "8", "7", "07"]})
    path = tmp_path / f"labels.{suffix}"
    (pq.write_table if suffix == "parquet" else pyarrow.csv.write_csv)(table, path)
    out = ["--out", str(tmp_path / "found.png"), "--top", "7", "--labels", str(path), *flags]
    assert main(["search", query, "--gallery", str(tmp_path / "gallery"), *out]) == 0
    expected = dict.fromkeys(names) | dict(zip(names, [True, False, True, False], strict=False))
    assert verdicts(capsys.readouterr().out) == expected


def test_a_query_has_the_label_of_the_longest_end_of_its_path(tmp_path, monkeypatch):
    image_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "0088.tar", JPEGS[:1])
    (tmp_path / "a.jpg").write_bytes(QUERY)  # another photograph of that name
    labels = {"a.jpg": "1", "b/d.jpg": "2", "d.jpg": "3", "0088/0088_0_0_0.jpg": "4", "there/a.jpg": "5"}
    for query, building in {
        "photos/a.jpg": "1",
        str(tmp_path / "photos" / "a.jpg"): "1",
        "photos/b/d.jpg": "2",
        "elsewhere/d.jpg": "3",
        "0088.tar:0088/0088_0_0_0.jpg": "4",
        "there/a.jpg": "5",
        "a.jpg": "1",  # as typed
        "./a.jpg": None,
        "photos/g.jpg": None,
    }.items():
        assert image_labels.of_query(labels, query, tmp_path / "photos") == building, query


def test_labels_that_cannot_be_used_are_refused(flags, query, tmp_path):  # noqa: F811
    image_folder(tmp_path / "gallery")
    labels = tmp_path / "labels.csv"
    search = ["search", query, "--gallery", str(tmp_path / "gallery"), "--labels", str(labels), *flags]
    for text, told in {
        "image,building\na.jpg,1\n": r"labels\.csv has no row for the query: add one with .*query\.jpg",
        f"image,building\n{query},1\n{query},2\n": r"two buildings, 1 and 2",
        "file,building\na.jpg,1\n": r"no column image: it has file, building",
    }.items():
        labels.write_text(text)
        with pytest.raises(PipelineError, match=told):
            main(search)


def test_compare_gives_the_cosine_of_the_two_vectors(model, flags, query, tmp_path, capsys):  # noqa: F811
    write_tar(tmp_path / "0088.tar", JPEGS)
    member = f"{tmp_path / '0088.tar'}:0088/0088_3_0_1.jpg"
    assert main(["compare", query, member, *flags]) == 0
    output = capsys.readouterr().out
    expected = float(np.prod(plain_vectors(model, [QUERY, JPEGS[3]]), axis=0).sum())
    assert float(output.split()[1]) == pytest.approx(expected, abs=2e-3)
    assert "run train/evaluate.py" in output  # there are no histograms here


def test_many_results_are_drawn_in_lines_and_as_the_model_sees_them(tmp_path):
    levels = np.full((30, 40), 64 * 257, np.uint16)  # a quarter of white
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    photograph = photo_search.Photograph("deep.png", buffer.getvalue())
    photo_search.draw(photo_search.Nearest(photograph, [(photograph, 1.0)] * 11, 11), tmp_path / "found.png")
    drawn = np.asarray(Image.open(tmp_path / "found.png").convert("L"))
    height, width = drawn.shape
    assert width / height == pytest.approx(8 * 2.5 / (2 * 3), rel=0.15)  # 12 pictures, 8 in a line
    assert np.isin(drawn, range(60, 69)).mean() > 0.3


@pytest.mark.parametrize(
    ("cosine", "told"),
    [
        (-1.0, "100.0% of matches and 100.00% of non-matches"),
        (0.5, "90.0% of matches and 10.00% of non-matches"),  # an edge
        (0.75, "45.0% of matches and 5.00% of non-matches"),  # half of the last bin
        (1.0, "0.0% of matches and 0.00% of non-matches"),
    ],
)
def test_a_similarity_is_placed_among_the_evaluations_pairs(cosine, told, tmp_path):
    counts = {"edges": [-1.0, 0.0, 0.5, 1.0], "matches": [0, 1, 9], "non_matches": [6, 3, 1]}
    (tmp_path / "metrics.json").write_text(metrics_json.to_json({**FOUND, "similarity_histograms": counts}))
    assert told in photo_search.percentiles_of(cosine, tmp_path / "metrics.json")


def test_the_evaluation_of_another_model_is_not_told_for_this_one(model, flags, query, tmp_path, capsys):  # noqa: F811
    folder = paths_below(tmp_path).evaluation_dir
    folder.mkdir(parents=True)
    theirs = {**FOUND["provenance"], "id": "theirs"}
    (folder / "metrics.json").write_text(metrics_json.to_json({**FOUND, "provenance": theirs}))
    for evaluation, told in (("ours", "is not this model's"), ("theirs", "0.0% of matches")):
        ours = shutil.copytree(model, tmp_path / evaluation)
        (ours / "provenance.json").write_text(json.dumps({"inputs": {"metrics.json": evaluation}}))
        assert main(["compare", query, query, *flags, "--model", str(ours)]) == 0
        assert told in capsys.readouterr().out


def test_a_damaged_query_and_options_that_make_no_sense_are_refused(flags, query, tmp_path):  # noqa: F811
    (tmp_path / "half.jpg").write_bytes(QUERY[:500])
    with pytest.raises(PipelineError, match=r"half\.jpg cannot be read as an image"):
        main(["compare", str(tmp_path / "half.jpg"), query, *flags])
    with pytest.raises(ConfigError, match="--top"):
        main(["search", query, "--gallery", str(tmp_path), "--top", "0", *flags])
    assert cli.exit_code_of(lambda: main(["search", query, *flags])) == 2


def test_a_box_is_a_picture_cut_beforehand(model, flags, tmp_path, capsys):  # noqa: F811
    image = picture(200, 160, seed=3)
    for name, content in {"whole.png": image, "cut.png": image.crop((40, 30, 140, 130))}.items():
        content.save(tmp_path / name)
    whole, cut = str(tmp_path / "whole.png"), str(tmp_path / "cut.png")
    box = ["--box", "40,30,140,130"]
    for command in (["compare", whole, cut, *box], ["compare", whole, whole, *box, *box]):
        assert main([*command, *flags]) == 0
        assert "similarity 1.000" in capsys.readouterr().out
    main(["compare", whole, cut, *flags])
    assert "similarity 1.000" not in capsys.readouterr().out
    (tmp_path / "gallery").mkdir()
    shutil.copy(cut, tmp_path / "gallery")
    search = ["search", whole, "--gallery", str(tmp_path / "gallery"), "--out", str(tmp_path / "found.png")]
    main([*search, *box, *flags])
    assert results_of(capsys.readouterr().out) == [(1.0, "cut.png")]
    with pytest.raises(PipelineError, match=r"box 40,30,240,130 is not within .*whole.png, 200 x 160"):
        main(["compare", whole, cut, "--box", "40,30,240,130", *flags])
    with pytest.raises(ConfigError, match="more --box than images"):
        main([*search, *box, *box, *flags])
    for wrong in ("1,2,3", "a,b", "nan,0,5,5"):
        with pytest.raises(SystemExit):
            main([*search, "--box", wrong, *flags])
        assert f"{wrong} is not LEFT,TOP,RIGHT,BOTTOM in pixels" in capsys.readouterr().err


@pytest.mark.parametrize("views", [[1.0], [1.0, 0.35], [0.5]])
def test_other_views_are_cut_from_the_same_picture(views, model, flags, query, tmp_path, monkeypatch, capsys):  # noqa: F811
    changed = shutil.copytree(model, tmp_path / "changed")
    settings = json.loads((model / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**settings, "views": views}))
    vector_of, vectors = photo_search.vector_of, []
    monkeypatch.setattr(photo_search, "vector_of", lambda *what: vectors.append(vector_of(*what)) or vectors[-1])
    assert main(["compare", query, query, "--views", ",".join(map(str, views)), *flags]) == 0
    assert "evaluat" not in capsys.readouterr().out  # whose histograms are those of the model's own views
    from_changed, from_own = (
        1 - cosines(vectors[:1], plain_vectors(folder, [QUERY])) for folder in (changed, model)
    )
    assert from_changed < 1e-4
    assert from_changed < 0.1 * from_own


@pytest.mark.parametrize("views", ["2", "0.1", "1,1", "a"])
def test_views_are_checked_like_the_setting(views, query):
    with pytest.raises(ConfigError, match=r"embedding_model.*views"):
        main(["compare", query, query, "--views", views])


def test_a_model_older_than_views_can_be_told_which_to_make(model, tmp_path):  # noqa: F811
    older = shutil.copytree(model, tmp_path / "older")
    settings = json.loads((model / "config.json").read_text())
    del settings["views"], settings["view_size"]
    (older / "config.json").write_text(json.dumps(settings))
    write_preprocessor(older, "dinov2", 56)
    published = published_model.load(older, "float32", torch.device("cpu"), [0.5])
    image = torch.rand(1, 3, 56, 56)
    enlarged = torch.nn.functional.interpolate(image[:, :, 14:42, 14:42], (56, 56), mode="bicubic", antialias=True)
    whole = published_model.load(older, "float32", torch.device("cpu"))
    assert torch.allclose(published.forward(image), whole.forward(enlarged), atol=1e-6)
