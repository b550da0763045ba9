"""common/archives/tars.py. Oracle: Python's tarfile, on tars that tarfile wrote in each of its formats."""

import gzip
import io
import os
import queue
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common.archives import gzip_streams, tar_headers, tars
from common.archives.tar_blocks import CHUNK_BYTES
from common.errors import PipelineError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def listed(path):
    return [(m.name, m.offset, m.size) for m in tars.walk(path) if m.kind == "file"]


def survivors(path):
    """Names of members, and the damages."""
    found = list(tars.walk(path, contents=True))
    damages = [one for one in found if isinstance(one, tars.Damage)]
    return [one.name for one in found if not isinstance(one, tars.Damage)], damages


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_two_members_lie_where_the_blocks_say(tmp_path):
    path = make_tar(tmp_path / "0001.tar", [("a.txt", b"x" * 600), ("b.txt", b"yz")], format=tarfile.USTAR_FORMAT)
    assert listed(path) == [("a.txt", 512, 600), ("b.txt", 512 + 1024 + 512, 2)]
    assert [m.content for m in tars.walk(path, contents=True)] == [b"x" * 600, b"yz"]


path_names = st.text(st.characters(codec="utf-8", exclude_characters="\0/\n"), min_size=1, max_size=90)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.lists(path_names, min_size=1, max_size=5), st.binary(max_size=1500)), max_size=8),
)
def test_the_index_is_tarfiles(tmp_path, form, files):
    files = [("/".join(["d", *parts]), content) for parts, content in files]  # long ones take extra headers
    try:
        path = make_tar(tmp_path / "random.tar", files, format=form)
    except ValueError:
        assume(form != tarfile.USTAR_FORMAT)  # which has no room for a name as long as this
        raise
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert listed(path) == expected
    assert [m.content for m in tars.walk(path, contents=True)] == [content for _, content in files]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS[1:]), st.lists(st.integers(0, 2**40), min_size=1, max_size=3), st.text(max_size=150)
)
def test_sizes_that_take_base_256_or_a_pax_header_are_tarfiles(tmp_path, form, sizes, name):
    path = tmp_path / "sparse.tar"
    with path.open("wb") as file:
        for number, size in enumerate(sizes):  # up to 1 TB, as a hole: the eleven octal digits end at 8 GB
            info = tarfile.TarInfo(f"{number}{name.encode('utf-8', 'replace').hex()}")
            info.size = size
            file.write(info.tobuf(form))
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert listed(path) == expected
    assert [size for _, _, size in expected] == sizes


@pytest.mark.timeout(10)  # 0.5 s; cutting the rest of the header out for each record took 14
def test_a_pax_header_of_200_000_records_is_read_in_one_pass(tmp_path):
    records = b"5 a=\n" * 200_000 + b"12 path=x/y\n"
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    member = tarfile.TarInfo("short")
    padding = bytes(-len(records) % 512)
    (tmp_path / "a.tar").write_bytes(header.tobuf() + records + padding + member.tobuf() + bytes(1024))
    assert [name for name, *_ in listed(tmp_path / "a.tar")] == ["x/y"]


@pytest.mark.parametrize("form", FORMATS)
def test_links_folders_and_long_names_are_walked_over(tmp_path, form):
    path = tmp_path / "mixed.tar"
    long_name = "folder/" + "n" * 90 + "/" + "m" * 90 + ".jpg"  # ustar splits it, GNU and pax take a header
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, content in [
            ("folder", tarfile.DIRTYPE, b""),
            (long_name, tarfile.REGTYPE, b"jpeg"),
            ("link.jpg", tarfile.SYMTYPE, b""),
            ("last.txt", tarfile.REGTYPE, b"label"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "folder/x" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info, io.BytesIO(content))
    members = list(tars.walk(path, contents=True))
    assert [(m.name.rstrip("/"), m.kind) for m in members] == [
        ("folder", "directory"),
        (long_name, "file"),
        ("link.jpg", "other"),
        ("last.txt", "file"),
    ]
    assert members[1].content == b"jpeg"


def test_a_size_in_base_256_is_read(tmp_path):
    path = make_tar(tmp_path / "big.tar", [("a", b"12345")], format=tarfile.GNU_FORMAT)
    raw = bytearray(path.read_bytes())
    raw[124:136] = b"\x80" + (5).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    assert listed(path) == [("a", 512, 5)]


def test_names_that_are_not_utf8_can_be_stored(tmp_path):
    path = make_tar(tmp_path / "latin.tar", [("caf\udce9.txt", b"")], format=tarfile.GNU_FORMAT)
    [member] = tars.walk(path)
    assert tars.printable(member.name) == "caf\\xe9.txt"


def test_a_cut_member_is_named_with_the_offset_and_all_before_it_are_kept(tmp_path):
    path = make_tar(tmp_path / "cut.tar", [("a", b"1" * 512), ("b", b"2" * 512)])
    os.truncate(path, 512 + 512 + 512 + 100)
    names, [damage] = survivors(path)
    assert names == ["a"]
    assert (damage.member, damage.start, damage.end) == ("b", 1536, 1636)
    assert damage.reason == "tar_truncated"
    assert "100 of 512 bytes" in damage.detail


@pytest.mark.parametrize(("cut_at", "kept"), [(0, 0), (100, 0), (1024, 1), (1100, 1), (2048, 2)])
def test_a_tar_that_ends_anywhere_else_is_damaged_too(tmp_path, cut_at, kept):
    path = make_tar(tmp_path / "cut.tar", [("a", b"1" * 512), ("b", b"2" * 512)])
    os.truncate(path, cut_at)
    names, [damage] = survivors(path)
    assert names == ["a", "b"][:kept]
    assert damage.reason == "tar_truncated"  # at 2048 the end marker lacks: more may have followed


def test_data_behind_zeros_is_not_lost_in_silence(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a", b"1" * 512), ("b", b"2" * 512), ("c", b"3" * 512)])
    raw = bytearray(path.read_bytes())
    raw[1024:1536] = bytes(512)  # b's header: tarfile takes this for the end
    path.write_bytes(raw)
    names, [gap] = survivors(path)
    assert names == ["a", "c"]
    assert (gap.start, gap.end, gap.member, gap.reason) == (1024, 2048, "", "tar_damaged")
    raw[2048:] = bytes(len(raw) - 2048)  # and c's: nothing but b's data are left
    path.write_bytes(raw)
    names, [gap] = survivors(path)
    assert names == ["a"]
    assert (gap.start, gap.end) == (1024, len(raw))


@pytest.mark.parametrize("removed", [100, 512, 600, 1024])
def test_after_missing_bytes_the_next_header_is_found_inside_the_half_member(tmp_path, removed):
    path = make_tar(tmp_path / "a.tar", [("a", b"1" * 3000), ("b", b"2" * 700), ("c", b"3" * 10)])
    raw = bytearray(path.read_bytes())
    del raw[1000 : 1000 + removed]  # of a, so that its data seem to reach into b's
    path.write_bytes(raw)
    found = list(tars.walk(path, contents=True))
    half, gap, *whole = found
    assert (half.member, half.reason) == ("a", "tar_damaged")  # not a member: it would hold b's header
    assert (gap.start, gap.end) == (512, 512 + 3072 - removed)
    assert [(m.name, m.content) for m in whole] == [("b", b"2" * 700), ("c", b"3" * 10)]


@pytest.mark.parametrize("removed", [1, 40, 300])  # fewer than there are zeros behind the data
@pytest.mark.parametrize(("at", "is_whole"), [(600, False), (1230, True)])  # in a's data, in its padding
def test_a_member_that_lacks_few_bytes_is_told_from_one_whose_padding_does(tmp_path, removed, at, is_whole):
    path = make_tar(tmp_path / "a.tar", [("a", b"1" * 700), ("b", b"2" * 700), ("c", b"3" * 10)])
    raw = bytearray(path.read_bytes())
    del raw[at : at + removed]
    path.write_bytes(raw)
    names, damages = survivors(path)
    assert names == (["a", "b", "c"] if is_whole else ["b", "c"])
    assert [one.member for one in damages] == ([""] if is_whole else ["a", ""])
    gap, next_header = damages[-1], 1536 - removed
    assert (gap.start, gap.end) == (
        next_header if is_whole else 512,
        next_header,
    )  # it does not end before it starts
    assert "-" not in gap.detail  # nor is it of -40 bytes


@pytest.mark.parametrize("inserted", [1, 40, 300])
def test_a_member_that_has_bytes_too_many_within_is_a_half_one(tmp_path, inserted):
    path = make_tar(tmp_path / "a.tar", [("a", b"1" * 700), ("b", b"2" * 700), ("c", b"3" * 10)])
    raw = path.read_bytes()
    path.write_bytes(raw[:600] + b"4" * inserted + raw[600:])
    names, [half, gap] = survivors(path)
    assert names == ["b", "c"]  # in the first 700 bytes of a's are some of others, and its last ones lack
    assert (half.member, half.reason, gap.end) == ("a", "tar_damaged", 1536 + inserted)


@pytest.mark.parametrize("inserted", [1, 511, 512, 5000])
def test_after_bytes_too_many_the_next_header_is_found_at_any_byte(tmp_path, inserted):
    path = make_tar(tmp_path / "a.tar", [("a", b"1" * 10), ("b", b"2" * 700), ("c", b"3" * 10)])
    raw = path.read_bytes()
    path.write_bytes(raw[:1024] + random.Random(3).randbytes(inserted) + raw[1024:])
    found = list(tars.walk(path, contents=True))
    assert [one.name for one in found if isinstance(one, tars.Member)] == ["a", "b", "c"]  # a is whole
    [gap] = [one for one in found if isinstance(one, tars.Damage)]
    assert (gap.start, gap.end, gap.member) == (1024, 1024 + inserted, "")


def test_a_size_beyond_the_end_hides_no_members(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header("huge", 10**9) + b"x" * 512 + header("b", 3) + b"yes" + bytes(509 + 1024))
    names, [cut, gap] = survivors(path)
    assert names == ["b"]
    assert (cut.member, cut.reason, gap.start, gap.end) == ("huge", "tar_damaged", 512, 1024)


def test_a_header_in_the_data_of_a_member_is_none_where_nothing_is_damaged(tmp_path):
    inner = make_tar(tmp_path / "inner.tar", [("inner", b"1")]).read_bytes()
    path = make_tar(tmp_path / "a.tar", [("a.tar", inner), ("b", b"2")])
    assert survivors(path) == (["a.tar", "b"], [])
    os.truncate(path, len(path.read_bytes().rstrip(b"\0")) + 7)  # no end marker, and the last member is whole
    names, [damage] = survivors(path)
    assert names == ["a.tar", "b"]
    assert damage.reason == "tar_truncated"


def test_a_whole_tar_within_a_tar_before_damage_stays_one_member(tmp_path):
    inner = make_tar(tmp_path / "inner.tar", [("inner", b"1")]).read_bytes()
    path = make_tar(tmp_path / "a.tar", [("inner.tar", inner), ("b", b"2"), ("c", b"3")])
    raw = bytearray(path.read_bytes())
    start = 512 + len(inner)
    raw[start : start + 512] = b"x" * 512  # b's header
    path.write_bytes(raw)
    names, [gap] = survivors(path)
    assert names == ["inner.tar", "c"]
    assert (gap.start, gap.end) == (start, start + 1024)


def test_pictures_and_texts_have_no_headers_in_them(tmp_path):
    rng = random.Random(1)
    texts = b"".join(b"d %d %d 000644 \0 0000001 \0%d " % (n, rng.randrange(9**9), n) for n in range(20_000))
    raw = rng.randbytes(2**21) + texts + bytes(5000)
    assert tar_headers.find_header(lambda at, size: raw[at : at + size], 0) == (None, len(raw))
    raw += header("a", 1)
    assert tar_headers.find_header(lambda at, size: raw[at : at + size], 3)[0] == len(raw) - 512


def test_damage_is_never_an_error(tmp_path):
    rng = random.Random(0)
    files = [(f"{'long' * rng.randrange(40)}{n}", rng.randbytes(rng.randrange(900))) for n in range(12)]
    whole = [
        make_tar(tmp_path / f"{form}.tar", files, format=form, pax_headers={}).read_bytes() for form in FORMATS[1:]
    ]
    path = tmp_path / "damaged.tar"
    for n in range(300):
        raw = bytearray(whole[n % 2])
        start, length = rng.randrange(len(raw)), rng.choice([1, 16, 512, 3000])
        if n % 3 == 0:
            del raw[start:]
        elif n % 3 == 1:
            raw[start : start + length] = bytes(len(raw[start : start + length]))
        else:
            raw[start : start + length] = rng.randbytes(len(raw[start : start + length]))
        path.write_bytes(raw)
        names, _ = survivors(path)
        assert len(names) <= len(files)


@pytest.mark.parametrize("mode", ["w:bz2", "w:xz"])
def test_a_tar_compressed_otherwise_than_by_gzip_is_to_be_decompressed(tmp_path, mode):
    path = tmp_path / "c.tar"
    with tarfile.open(path, mode) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(PipelineError, match="decompress"):
        list(tars.walk(path))


def test_the_next_chunk_is_inflated_while_this_one_is_looked_at(tmp_path, monkeypatch):
    files = [(name, name.encode() * 600_000) for name in "abcd"]
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(make_tar(tmp_path / "plain.tar", files).read_bytes()))
    read, offsets = gzip_streams.Stream.read, queue.SimpleQueue()

    def recorded(stream, offset, size):
        offsets.put(offset)
        return read(stream, offset, size)

    monkeypatch.setattr(gzip_streams.Stream, "read", recorded)
    walk = tars.walk(path, contents=True)
    first = next(walk)  # in the first chunk; the header behind it is, too
    assert [offsets.get(timeout=30) for _ in range(2)] == [0, CHUNK_BYTES]
    assert [first.content, *(member.content for member in walk)] == [content for _, content in files]


def test_a_member_of_many_blocks_is_in_memory_once(tmp_path):
    content = os.urandom(8 * 2**20)
    path = make_tar(tmp_path / "a.tar", [("a", b"1"), ("b", content), ("c", b"3")])
    tracemalloc.start()
    sizes = [len(member.content) for member in tars.walk(path, contents=True)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [1, len(content), 1]
    assert peak < len(content) + 5 * CHUNK_BYTES  # not twice


def test_shards_take_every_tar_once(tmp_path):
    for n in range(7):
        (tmp_path / f"{n:04d}.tar").touch()
    shards = [tars.of_shard(tmp_path, shard, 3) for shard in range(3)]
    assert [[tar.stem for tar in shard] for shard in shards] == [
        ["0000", "0003", "0006"],
        ["0001", "0004"],
        ["0002", "0005"],
    ]
    assert tars.of_shard(tmp_path, 9, 10) == []


@pytest.mark.parametrize("num_shards", [1, 3, 7, 8, 20, 49])
def test_tasks_take_every_part_of_every_tar_once(tmp_path, num_shards):
    counts = {}
    for n in range(7):
        (tmp_path / f"{n:04d}.tar").touch()
        counts[f"{n:04d}"] = 1 + 5 * n
    listing = tars.of_shard(tmp_path, 0, 1)
    taken = [
        (tars.stem(share.tar), part)
        for shard in range(num_shards)
        for share in tars.shares_of(listing, shard, num_shards)
        for part in share.of(counts[tars.stem(share.tar)])
    ]
    assert sorted(taken) == [(name, part) for name, count in counts.items() for part in range(count)]
    if num_shards <= 7:  # shard i means the same tars as in process_tar.py
        assert all(
            [share.tar for share in tars.shares_of(listing, shard, num_shards)]
            == tars.of_shard(tmp_path, shard, num_shards)
            for shard in range(num_shards)
        )


def test_a_folder_without_tars_is_an_error_that_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PipelineError, match=r"paths\.raw_dir"):
            tars.of_shard(folder, 0, 1)
    (tmp_path / "dataset_aligned").mkdir()
    (tmp_path / "dataset_aligned/0088.tar").touch()  # where aria2c puts it
    with pytest.raises(PipelineError, match=r"there are some in .*dataset_aligned\nset paths\.raw_dir"):
        tars.of_shard(tmp_path, 0, 1)


def test_tars_are_those_that_can_be_read_in_place(tmp_path):
    for name in ("0088.tar", "0090.TAR", "0091.tar.gz", "0092.TGZ", "links.txt", "._0088.tar"):
        (tmp_path / name).touch()
    listing = tars.of_shard(tmp_path, 0, 1)
    assert [path.name for path in listing] == ["0088.tar", "0090.TAR", "0091.tar.gz", "0092.TGZ"]
    assert [tars.stem(path) for path in listing] == ["0088", "0090", "0091", "0092"]
    for name in ("0093.tar.zst", "0094.tbz2", "0095.tar.part1"):
        (tmp_path / name).touch()
        with pytest.raises(PipelineError, match=rf"{name} is neither a plain tar nor.*\ndecompress it"):
            tars.of_shard(tmp_path, 0, 1)
        (tmp_path / name).unlink()


def test_a_tar_that_is_still_being_downloaded_is_not_read(tmp_path):
    (tmp_path / "0088.tar").touch()
    (tmp_path / "0088.tar.aria2").touch()
    with pytest.raises(PipelineError, match=r"0088\.tar has not been downloaded completely"):
        tars.of_shard(tmp_path, 0, 1)
    (tmp_path / "0088.tar.aria2").unlink()
    for name in ("0089.tgz.aria2", "0089.tar.gz.aria2", "0089.tar.part"):
        (tmp_path / name).touch()
        with pytest.raises(PipelineError, match=r"0089.* has not been downloaded completely"):
            tars.of_shard(tmp_path, 0, 1)
        (tmp_path / name).unlink()


def test_a_folder_in_the_place_of_a_tar_is_not_passed_over(tmp_path):
    (tmp_path / "0088.tar").touch()
    (tmp_path / "0089.tar").mkdir()  # someone has unpacked it there
    with pytest.raises(PipelineError, match=r"0089\.tar is a folder"):
        tars.of_shard(tmp_path, 0, 1)


def test_a_link_to_nothing_and_one_name_twice_are_told(tmp_path):
    (tmp_path / "0088.tar").touch()
    (tmp_path / "0089.tar").symlink_to(tmp_path / "purged.tar")
    with pytest.raises(PipelineError, match=r"0089\.tar links to a file that does not exist"):
        tars.of_shard(tmp_path, 0, 1)
    (tmp_path / "purged.tar").touch()
    assert len(tars.of_shard(tmp_path, 0, 1)) == 3
    (tmp_path / "0088.TAR").touch()
    with pytest.raises(PipelineError, match=r"two names, 0088\.TAR and 0088\.tar"):  # one file of intermediates
        tars.of_shard(tmp_path, 0, 1)
    (tmp_path / "0088.TAR").rename(tmp_path / "0088.tgz")
    with pytest.raises(PipelineError, match=r"two names, 0088\.tar and 0088\.tgz"):
        tars.of_shard(tmp_path, 0, 1)
