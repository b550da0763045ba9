"""damaged_tars.py. Oracles: GNU tar, gzip, Python's tarfile and gzip; where none reads on, spans of bytes."""

import gzip
import io
import subprocess
import tarfile
import zlib

import damaged_tars
import numpy as np
import pytest
import simplejpeg
from damaged_tars import KINDS, PLAIN_KINDS, DamagedTar, damage, gzipped, inflated, members_of
from synthetic import write_dataset

BOTH_FORMS = [(kind, True) for kind in KINDS] + [(kind, False) for kind in PLAIN_KINDS]
LOSE_NOTHING = ("checksum", "length", "inserted", "three_streams", "trailing_zeros", "trailing_garbage")
SEEDS = range(4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole")
    write_dataset(out, streets=1, cities=1, image_px=96, facades_per_street=6, compress=False)
    return (out / "0088.tar").read_bytes()


@pytest.fixture(scope="module")
def damaged(whole):
    """`damaged(kind, compress, seed)`: made once."""
    made: dict[tuple, DamagedTar] = {}

    def make(kind: str, compress: bool, seed: int = 0) -> DamagedTar:
        key = kind, compress, seed
        if key not in made:
            made[key] = damage(kind, whole, members_of(whole), np.random.default_rng(seed), compress)
        return made[key]

    return make


def contents(tar: bytes) -> dict[str, bytes]:
    return {m.name: tar[m.data : m.data + m.size] for m in members_of(tar)}


def gnu_tar(path, folder) -> tuple[dict[str, bytes], str]:
    """The files that GNU tar extracts, and what it says; it inflates by itself."""
    folder.mkdir()
    done = subprocess.run(["tar", "-xf", path, "-C", folder], capture_output=True, text=True)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}, done.stderr


def gzip_tool(stream: bytes) -> tuple[bytes, int, str]:
    done = subprocess.run(["gzip", "-dc"], input=stream, capture_output=True)
    return done.stdout, done.returncode, done.stderr.decode()


def tar_bytes(kind: str, compress: bool, damaged, seed: int = 0) -> bytes:
    content = damaged(kind, compress, seed).content
    return gzip_tool(content)[0] if compress else content


@pytest.mark.parametrize(("kind", "compress"), BOTH_FORMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_lost_are_the_members_that_an_intact_copy_cannot_be_cut_out_of(kind, compress, seed, whole, damaged):
    """Slow and plain: a member is there if its header and data are, anywhere."""
    content, lost = damaged(kind, compress, seed)
    broken = inflated(content) if compress else content
    there = {m.name: whole[m.header : m.data + m.size] in broken for m in members_of(whole)}
    assert {name for name, is_there in there.items() if not is_there} == set(lost)
    assert (kind in LOSE_NOTHING) == (not lost)
    assert len(lost) < len(there) * 0.8
    assert compress == content.startswith(b"\x1f\x8b")


@pytest.mark.parametrize(("kind", "compress"), BOTH_FORMS)
def test_the_same_seed_gives_the_same_damage(kind, compress, whole, damaged):
    again = damage(kind, whole, members_of(whole), np.random.default_rng(0), compress)
    assert again == damaged(kind, compress)
    assert again.content != damaged(kind, compress, seed=1).content


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("checksum", 1, "crc error"),
        ("length", 1, "length error"),
        ("three_streams", 0, ""),
        ("trailing_zeros", 0, ""),
        ("trailing_garbage", 2, "trailing garbage ignored"),
    ],
)
def test_gzip_gives_the_whole_tar_and_says_what_the_reports_do(kind, code, said, whole, damaged):
    for seed in SEEDS:
        stream = damaged(kind, True, seed).content
        found, exit_code, message = gzip_tool(stream)
        assert found == inflated(stream) == whole
        assert (exit_code, said in message) == (code, True)


def test_python_gzip_takes_the_streams_without_damage_and_no_others(whole, damaged):
    for kind in ("three_streams", "trailing_zeros"):
        assert gzip.decompress(damaged(kind, True).content) == whole
    for kind in ("checksum", "length", "trailing_garbage", "cut", "garbage_deflate"):
        with pytest.raises((OSError, EOFError, zlib.error)):
            gzip.decompress(damaged(kind, True).content)


def test_published_damage_is_what_gnu_tar_reports(damaged, tmp_path, whole):
    (tmp_path / "0088.tar").write_bytes(damaged("checksum", True).content)
    found, said = gnu_tar(tmp_path / "0088.tar", tmp_path / "out")
    assert "invalid compressed data--crc error" in said
    assert found == contents(whole)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_gnu_tar_extracts_all_that_stands_before_a_cut(compress, seed, damaged, tmp_path, whole):
    content, lost = damaged("cut", compress, seed)
    (tmp_path / "0088.tar").write_bytes(content)
    found, said = gnu_tar(tmp_path / "0088.tar", tmp_path / "out")
    assert "Unexpected EOF" in said or "unexpected end of file" in said
    expected = contents(whole)
    assert {name for name in expected if found.get(name) == expected[name]} == set(expected) - set(lost)
    names = list(expected)
    assert names[-len(lost) :] == list(lost)  # nothing after the cut, all before it
    assert set(list(lost.values())[1:]) <= {"absent"}
    assert next(iter(lost.values())) in ("cut", "absent")


def test_what_inflates_of_a_cut_stream_is_what_zlib_gives_byte_by_byte(damaged):
    for kind in ("cut", "garbage_deflate", "checksum"):
        stream = damaged(kind, True).content
        inflater, slowly = zlib.decompressobj(wbits=31), bytearray()
        try:
            for n in range(len(stream)):
                slowly += inflater.decompress(stream[n : n + 1])
        except zlib.error:
            assert kind != "cut"
        assert inflated(stream) == slowly
        if kind == "cut":  # zlib's own end: feeding less by one byte gives no more
            assert gzip_tool(stream)[0] == slowly


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_garbled_member_is_one_image_that_no_longer_decodes(compress, seed, damaged, whole):
    expected, found = contents(whole), contents(tar_bytes("garbage_member", compress, damaged, seed))
    changed = [name for name in expected if found[name] != expected[name]]
    assert damaged("garbage_member", compress, seed).lost == dict.fromkeys(changed, "garbled")
    assert len(changed) == 1
    simplejpeg.decode_jpeg(expected[changed[0]], strict=True)
    with pytest.raises(ValueError, match=r"."):
        simplejpeg.decode_jpeg(found[changed[0]], strict=True)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_other_tars_skip_a_garbled_header(compress, seed, damaged, tmp_path, whole):
    content, lost = damaged("garbage_header", compress, seed)
    (tmp_path / "0088.tar").write_bytes(content)
    expected = contents(whole)
    left = {name: content for name, content in expected.items() if name not in lost}
    assert list(lost.values()) == ["absent"]
    assert gnu_tar(tmp_path / "0088.tar", tmp_path / "out")[0] == left
    with tarfile.open(tmp_path / "0088.tar", ignore_zeros=True) as tar:  # which skips garbage as well
        assert [m.name for m in tar if m.isfile()] == list(left)


def common_ends(a: bytes, b: bytes) -> tuple[int, int]:
    """How many bytes two files share at their start, and at their end beyond that."""
    shorter = min(len(a), len(b))
    array_a, array_b = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    differ = np.flatnonzero(array_a[:shorter] != array_b[:shorter])
    start = int(differ[0]) if len(differ) else shorter
    differ = np.flatnonzero(array_a[::-1][: shorter - start] != array_b[::-1][: shorter - start])
    return start, int(differ[0]) if len(differ) else shorter - start


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["spliced_out", "blocks_spliced_out"])
def test_spliced_tars_lack_one_span_and_the_members_in_it(kind, compress, seed, damaged, whole):
    broken, lost = tar_bytes(kind, compress, damaged, seed), damaged(kind, compress, seed).lost
    start, tail = common_ends(whole, broken)
    assert start + tail == len(broken)  # one span is gone, the rest is as it was
    end = len(whole) - tail
    assert ((end - start) % 512 == 0) == (kind == "blocks_spliced_out")
    inside = [m.name for m in members_of(whole) if m.header < end and m.data + m.size > start]
    assert list(lost) == inside
    assert len(lost) > 1
    assert list(lost.values()) == ["garbled"] + ["absent"] * (len(lost) - 1)
    assert inside[0].endswith(".jpg")


def test_gnu_tar_reads_on_behind_whole_blocks_that_are_gone(damaged, tmp_path, whole):
    for seed in SEEDS:
        content, lost = damaged("blocks_spliced_out", False, seed)
        (tmp_path / "0088.tar").write_bytes(content)
        expected = contents(whole)
        found = gnu_tar(tmp_path / "0088.tar", tmp_path / f"out{seed}")[0]
        right = {name for name in expected if found.get(name) == expected[name]}
        assert right.isdisjoint(lost)
        names = list(expected)
        assert len(right) >= len(expected) - len(lost) - 20  # it skips what lies where the half image would end
        assert names[-1] in right


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_inserted_bytes_stand_before_a_header_and_shift_it_off_the_blocks(compress, seed, damaged, whole):
    broken = tar_bytes("inserted", compress, damaged, seed)
    start, tail = common_ends(whole, broken)
    count = len(broken) - len(whole)
    assert start + tail >= len(whole)
    assert count > 512
    assert count % 512
    cuts = [m.header for m in members_of(whole) if len(whole) - tail <= m.header <= start]
    assert any(broken[:at] + broken[at + count :] == whole for at in cuts)


def test_members_are_tarfiles_own(whole):
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        for member in members_of(whole):
            assert tar.extractfile(member.name).read() == whole[member.data :][: member.size]


def test_gzip_from_file_to_file_has_no_name_or_time(whole, tmp_path):
    (tmp_path / "a.tar").write_bytes(whole)
    damaged_tars.write_gzip(tmp_path / "a.tar", tmp_path / "b.tar")
    stream = (tmp_path / "b.tar").read_bytes()
    assert stream == gzipped(whole)
    assert gzip.decompress(stream) == whole
    assert stream[3] == 0  # flags: no name
    assert stream[4:8] == bytes(4)  # no time


def test_damage_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no place for"):
        damage("cut", bytes(100), [damaged_tars.Member("a", 0, 0, 20)], np.random.default_rng(0), compress=False)
