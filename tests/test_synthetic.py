"""synthetic.py and local_backbone.py. Oracles: Python's tarfile, spherical trigonometry, a strict JPEG decoder."""

import gzip
import io
import json
import math
import tarfile
from collections import Counter

import damaged_tars
import numpy as np
import pandas as pd
import pytest
import simplejpeg
import torch
from local_backbone import FAMILIES, LOCAL_PX, colour_layout_weights, write_local_backbone, write_tiny_backbone
from PIL import Image
from synthetic import write_dataset
from transformers import AutoModel

EARTH_RADIUS_M = 6_371_000
REASONS = (  # every kind that is planted; common/schemas.py has the same
    "label_empty label_malformed label_missing image_missing jpeg_corrupt not_an_image jpeg_blank "
    "not_finite "
    "position_out_of_range angle_out_of_range distance_out_of_range duplicate_id dataset_mismatch name_malformed "
    "partner_rejected tar_truncated"
).split()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    out = tmp_path_factory.mktemp("clean")
    return out, write_dataset(out, streets=4, cities=2, image_px=64, compress=False)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    out = tmp_path_factory.mktemp("damaged")
    return out, write_dataset(out, streets=4, cities=2, image_px=64, damage=True, compress=False)


def contents(path) -> dict[str, bytes]:
    """Regular files of a tar, up to where it ends; the cut one as far as it goes."""
    found = {}
    with tarfile.open(path) as tar, open(path, "rb") as raw:
        try:
            for member in tar:
                if member.isfile():
                    raw.seek(member.offset_data)
                    assert member.name not in found
                    found[member.name] = raw.read(member.size)
        except tarfile.ReadError:
            assert path.stat().st_size < member.offset_data + member.size, "only the last member may be cut"
    return found


def ground_m(lat_a, lon_a, lat_b, lon_b):
    """Haversine distance."""
    lat_a, lon_a, lat_b, lon_b = map(np.radians, (lat_a, lon_a, lat_b, lon_b))
    h = np.sin((lat_b - lat_a) / 2) ** 2 + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    return 2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(h))


@pytest.mark.parametrize("which", ["clean", "damaged"])
def test_truth_accounts_for_every_file_of_every_tar(which, request):
    out, truth = request.getfixturevalue(which)
    assert sorted(path.stem for path in out.iterdir()) == sorted(truth.members) == ["0088", "0089"]
    for stem, counts in truth.members.items():
        names = set(contents(out / f"{stem}.tar"))
        images = set(truth.images.member[truth.images.tar == f"{stem}.tar"])
        rejects = truth.rejects.member[truth.rejects.tar == f"{stem}.tar"]
        labels = {name.rsplit(".", 1)[0] + ".txt" for name in images}
        others = names - images - labels - set(rejects)
        assert images | labels | set(rejects) <= names
        assert rejects.is_unique
        assert not set(rejects) & (images | labels)
        assert all(name.endswith(("README", ".csv")) for name in others)
        expected = {"images": len(images), "labels": len(labels), "rejects": len(rejects), "other": len(others)}
        assert counts == expected


def test_gzip_tars_inflate_to_the_plain_ones(clean, tmp_path):
    out, truth = clean
    packed = write_dataset(tmp_path, streets=4, cities=2, image_px=64, compress=True)
    for stem in truth.members:
        assert gzip.decompress((tmp_path / f"{stem}.tar").read_bytes()) == (out / f"{stem}.tar").read_bytes()
    assert packed.images.equals(truth.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0088.tar", "0089.tar"]


@pytest.mark.parametrize("bad_files", [False, True])
@pytest.mark.parametrize("kind", damaged_tars.KINDS)
def test_truth_knows_what_a_damaged_tar_has_lost(kind, bad_files, tmp_path):
    """Of the same streets with and without the damage to the first tar."""
    same = {"streets": 2, "cities": 2, "image_px": 64, "facades_per_street": 5, "damage": bad_files}
    broken = write_dataset(tmp_path / "broken", **same, compress=True, stream_damage=kind)
    path = tmp_path / "broken/0088.tar"
    tar = damaged_tars.inflated(path.read_bytes())
    whole = write_dataset(tmp_path / "whole", **same, stream_damage="three_streams", compress=True)
    members = contents_of(damaged_tars.inflated((tmp_path / "whole/0088.tar").read_bytes()))
    assert len(whole.lost) == 0
    assert (tmp_path / "whole/0089.tar").read_bytes() == (tmp_path / "broken/0089.tar").read_bytes()

    lost = set(broken.lost.member)
    assert lost == {name for name, content in members.items() if content not in tar}
    assert set(broken.lost.tar) <= {"0088.tar"}
    label_of = {name: name.rsplit(".", 1)[0] + ".txt" for name in members}
    before, after = ({*truth.images.member[truth.images.tar == "0088.tar"]} for truth in (whole, broken))
    assert after == {name for name in before if not {name, label_of[name]} & lost}
    pairs = [(image, label_of[image]) for image in before] + [(label_of[image], image) for image in before]
    left = {other for name, other in pairs if name in lost and other not in lost}
    assert set(broken.rejects.member[broken.rejects.tar == "0088.tar"]) == left
    counts = broken.members["0088"]
    assert counts["lost"] == len(lost)
    assert sum(counts.values()) == len(members)
    assert broken.members["0089"] == whole.members["0089"]


def contents_of(tar: bytes) -> dict[str, bytes]:
    """Header and content of each file of a whole tar."""
    return {m.name: tar[m.header : m.data + m.size] for m in damaged_tars.members_of(tar)}


def test_the_partner_of_a_lost_file_is_rejected_for_it(tmp_path):
    same = {"streets": 1, "cities": 1, "image_px": 64, "compress": False}
    truth = write_dataset(tmp_path, **same, stream_damage="garbage_member")
    image, reject = truth.lost.iloc[0], truth.rejects.iloc[0]
    assert (image.why, reject.reason) == ("garbled", "partner_rejected")
    assert reject.member == image.member.rsplit(".", 1)[0] + ".txt"
    for seed in range(4):  # an image's header and a label's
        truth = write_dataset(tmp_path, **same, seed=seed, stream_damage="garbage_header")
        lost, reject = truth.lost.iloc[0], truth.rejects.iloc[0]
        assert lost.why == "absent"
        assert reject.reason == ("label_missing" if lost.member.endswith(".txt") else "image_missing")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"streets": 1, "cities": 2}, "at least as many streets"),
        ({"stream_damage": "checksum", "compress": False}, "damage of gzip streams"),
        ({"stream_damage": "rust"}, "no such damage"),
        ({"stream_damage": "cut", "damage": True, "cities": 1}, "two cities"),
    ],
)
def test_datasets_that_cannot_be_written_are_refused(wrong, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        write_dataset(tmp_path, **{"streets": 2, **wrong})


def test_the_command_writes_a_damaged_gzip_tar_and_what_it_has_lost(run_script, tmp_path):
    flags = ["--streets", 1, "--cities", 1, "--image-px", 64, "--stream-damage", "cut"]
    done = run_script("tests/synthetic.py", "--out", tmp_path / "raw", *flags, "--truth", tmp_path / "truth")
    assert done.returncode == 0, done.stderr
    with pytest.raises(EOFError):
        gzip.decompress((tmp_path / "raw/0088.tar").read_bytes())
    lost = pd.read_parquet(tmp_path / "truth/lost.parquet")
    counts = json.loads((tmp_path / "truth/members.json").read_text())["0088"]
    assert counts["lost"] == len(lost) > 0
    done = run_script("tests/synthetic.py", "--out", tmp_path, "--plain", "--stream-damage", "checksum")
    assert (done.returncode, "damage of gzip streams" in done.stderr) == (2, True)


def test_names_have_seven_digits_for_each_id(clean):
    names = clean[1].images.member.str.rsplit("/", n=1).str[-1]
    assert names.str.fullmatch(r"(\d{7}_){3}\d{7}\.jpg").all()
    first = clean[1].images.iloc[0]
    ids = [first.dataset_id, first.patch_id, first.street_view_id, first.target_id]
    assert [int(number) for number in names.iloc[0][:-4].split("_")] == ids


def test_labels_say_what_truth_says(damaged):
    out, truth = damaged
    for tar, rows in truth.images.groupby("tar"):
        files = contents(out / tar)
        for row in rows.itertuples():
            lines = files[row.member.rsplit(".", 1)[0] + ".txt"].decode().splitlines()
            fields = lines[0].split()
            assert fields[0] == "d"
            assert len(fields) == 18
            ids = [row.dataset_id, row.target_id, row.patch_id, row.street_view_id]
            assert [int(field) for field in fields[1:5]] == ids
            numbers = [float(field) for field in fields[5:]]
            assert numbers[:3] == [row.target_lat, row.target_lon, row.target_height]
            assert numbers[6:8] == [row.camera_lat, row.camera_lon]
            assert numbers[9:] == [row.distance, row.heading, row.pitch, 0.0]
            assert row.aligned == (len(lines) == 2)


def test_every_damage_is_planted(damaged):
    _, truth = damaged
    assert set(truth.rejects.reason) == set(REASONS)
    assert set(truth.images.kind) == {"plain", "near_duplicate", "no_imagery"}
    assert truth.images.member.str.endswith(".jpeg").any()
    for _, members in truth.images.groupby("tar").member:
        assert members.str.contains("/").all() or not members.str.contains("/").any()
    assert truth.images.member.str.contains("/").nunique() == 2  # one tar with folders, one without


def test_damage_leaves_the_clean_images_as_they_are(clean, damaged):
    ids = ["dataset_id", "patch_id"]
    columns = [*ids, "target_id", "target_lat", "heading", "kind"]
    before = clean[1].images.set_index(ids, drop=False)[columns]
    after = damaged[1].images.set_index(ids, drop=False)[columns].loc[before.index]
    assert before.equals(after)


def test_good_images_decode_strictly_and_corrupt_ones_do_not(damaged):
    out, truth = damaged
    corrupt = set(truth.rejects.member[truth.rejects.reason == "jpeg_corrupt"])
    for tar, rows in truth.images.groupby("tar"):
        files = contents(out / tar)
        for name in rows.member:
            assert np.ptp(simplejpeg.decode_jpeg(files[name])) > 0
        for name in corrupt & set(files):
            with pytest.raises(ValueError):  # noqa: PT011  # the decoder's messages vary with the damage
                simplejpeg.decode_jpeg(files[name], strict=True)


def test_no_imagery_is_identical_and_far_apart(damaged):
    out, truth = damaged
    rows = truth.images[truth.images.kind == "no_imagery"]
    assert len({contents(out / row.tar)[row.member] for row in rows.itertuples()}) == 1
    pairs = rows[rows.tar == "0088.tar"].drop_duplicates("target_id")
    first, last = pairs.iloc[0], pairs.iloc[1]
    assert ground_m(first.target_lat, first.target_lon, last.target_lat, last.target_lon) > 25


def test_the_same_parameters_give_the_same_bytes(clean, tmp_path):
    out, truth = clean
    again = write_dataset(tmp_path, streets=4, cities=2, image_px=64, processes=2, compress=False)
    for stem in truth.members:
        assert (tmp_path / f"{stem}.tar").read_bytes() == (out / f"{stem}.tar").read_bytes()
    assert again.images.equals(truth.images)


def test_a_larger_set_contains_the_streets_of_a_smaller_one(clean, tmp_path):
    out, _ = clean
    small = write_dataset(tmp_path, streets=2, cities=2, image_px=64, compress=False)
    for stem in small.members:
        large_files = contents(out / f"{stem}.tar")
        small_files = contents(tmp_path / f"{stem}.tar")
        assert small_files.items() <= large_files.items()
        assert len(small_files) < len(large_files)


def test_camera_distance_and_heading_lead_to_the_target(clean):
    rows = clean[1].images
    angle = rows.distance / EARTH_RADIUS_M  # of the great circle: distances are horizontal
    lat, lon, heading = map(np.radians, (rows.camera_lat, rows.camera_lon, rows.heading))
    sin_lat = np.sin(lat) * np.cos(angle) + np.cos(lat) * np.sin(angle) * np.cos(heading)
    turn = np.arctan2(
        np.sin(heading) * np.sin(angle) * np.cos(lat), np.cos(angle) - np.sin(lat) * sin_lat
    )  # the destination formula
    reached = np.degrees(np.arcsin(sin_lat)), np.degrees(lon + turn)
    assert (ground_m(*reached, rows.target_lat, rows.target_lon) < 0.05).all()  # 3D distances overshoot by more
    assert rows.heading.between(0, 360, inclusive="left").all()


def test_buildings_have_views_and_close_neighbours(clean):
    rows = clean[1].images
    views = rows.groupby(["dataset_id", "target_id"]).patch_id.count()
    assert views.between(2, 7).all()
    assert views.nunique() > 3
    for _, targets in rows.drop_duplicates(["dataset_id", "target_id"]).groupby("dataset_id"):
        lat, lon = targets.target_lat.to_numpy(), targets.target_lon.to_numpy()
        apart = ground_m(lat[:, None], lon[:, None], lat, lon)[~np.eye(len(lat), dtype=bool)]
        assert 2.45 < apart.min() < 6
        streets = targets.groupby("street")[["target_lat", "target_lon"]].mean().to_numpy()
        assert 150 < ground_m(*streets[0], *streets[1]) < 450
    shared = rows.groupby(["dataset_id", "street_view_id"]).target_id.nunique()
    assert (shared > 1).any()  # a panorama that sees several targets
    assert rows.groupby("dataset_id").patch_id.agg(lambda ids: ids.is_unique).all()
    assert set(rows[rows.city == 0].target_id) & set(rows[rows.city == 1].target_id)


def test_the_target_is_in_the_centre_of_its_view():
    from street_views import STRIP_MARGIN_M, STRIP_TOP_M, rays, strip_homography

    camera, target = np.array([3.0, 11.0, 2.5]), np.array([9.0, 0.0, 6.0])
    x, y, w = strip_homography(camera, rays(camera, target, 80.0, 100), 24.0) @ [50, 50, 1]
    assert math.isclose(x / w, 24 * (9 + STRIP_MARGIN_M))
    assert math.isclose(y / w, 24 * (STRIP_TOP_M - 6))
    right = strip_homography(camera, rays(camera, target, 80.0, 100), 24.0) @ [60, 40, 1]
    assert right[0] / right[2] > x / w  # a mirrored or upturned view fails here
    assert right[1] / right[2] < y / w


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    return AutoModel.from_pretrained(write_local_backbone(tmp_path_factory.mktemp("local"))).eval()


def pooled(model, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)


def test_local_backbone_is_a_linear_layout_up_to_its_layer_norm(local_model):
    pixels = torch.randn(4, 3, LOCAL_PX, LOCAL_PX, generator=torch.Generator().manual_seed(0))
    layout = pixels.flatten(1) @ torch.from_numpy(colour_layout_weights()).flatten(1).T
    expected = torch.nn.functional.layer_norm(layout, layout.shape[1:])
    torch.testing.assert_close(pooled(local_model, pixels), expected, atol=1e-4, rtol=0)  # float32 sums of 9,408


def test_local_backbone_finds_views_of_a_building_alike(local_model, clean):
    out, truth = clean
    pixels, buildings = [], []
    for tar, rows in truth.images.groupby("tar"):
        files = contents(out / tar)
        for row in rows.itertuples():
            image = Image.open(io.BytesIO(files[row.member])).resize(
                (LOCAL_PX, LOCAL_PX), Image.Resampling.BICUBIC
            )
            pixels.append(np.asarray(image, np.float32).transpose(2, 0, 1) / 255 - 0.5)
            buildings.append((row.dataset_id, row.target_id))
    embeddings = torch.nn.functional.normalize(pooled(local_model, torch.from_numpy(np.stack(pixels))))
    similarities = (embeddings @ embeddings.T).numpy()
    number = np.unique(buildings, axis=0, return_inverse=True)[1].ravel()
    same = (number[:, None] == number) & ~np.eye(len(number), dtype=bool)
    assert similarities[same].mean() > similarities[number[:, None] != number].mean() + 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_backbones_load_and_are_the_same_each_time(family, tmp_path):
    outputs = []
    for name in ("one", "two"):
        model = AutoModel.from_pretrained(write_tiny_backbone(tmp_path / name, family)).eval()
        assert model.config.model_type == family
        outputs.append(model(pixel_values=torch.ones(1, 3, 64, 64)).last_hidden_state)
    assert outputs[0].shape[-1] == 32
    assert torch.equal(*outputs)


def test_every_planted_reason_is_counted_once(damaged):
    counts = Counter(damaged[1].rejects.reason)
    assert counts["tar_truncated"] == counts["duplicate_id"] == 1
    assert (counts["jpeg_corrupt"], counts["not_an_image"]) == (4, 2)
    assert counts["name_malformed"] == 4


def test_of_two_images_with_one_id_the_kept_one_comes_first(damaged):
    out, truth = damaged
    reject = truth.rejects[truth.rejects.reason == "duplicate_id"].iloc[0]
    patch_id = int(reject.member.split("/")[-1].split("_")[1])
    kept = truth.images[(truth.images.tar == reject.tar) & (truth.images.patch_id == patch_id)]
    names = [name.rsplit(".", 1)[0] for name in contents(out / reject.tar)]
    assert len(kept) == 1
    files_of_kept = [n for n, name in enumerate(names) if name == kept.member.iloc[0].rsplit(".", 1)[0]]
    assert max(files_of_kept) < names.index(reject.member.rsplit(".", 1)[0])
