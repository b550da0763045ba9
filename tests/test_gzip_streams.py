"""common/archives/gzip_streams.py and restart_points.py. Oracle: Python's gzip and zlib, on streams that they
wrote.
"""

import contextlib
import errno
import gzip
import itertools
import random
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from common.archives import gzip_streams, restart_points
from common.archives.gzip_streams import Stream, inflate


@pytest.fixture(autouse=True)
def close_points(monkeypatch):
    """Points every 200 kB, so that small streams have many."""
    monkeypatch.setattr(gzip_streams, "SPACING_BYTES", 200_000)


def like_jpegs(size, seed=0):
    """Bytes that deflate can shorten by a tenth, with some text and zeros between, as a tar of JPEGs has them."""
    rng = np.random.default_rng(seed)
    noise = rng.choice(256, size, p=rng.dirichlet(np.full(256, 2.0))).astype(np.uint8)
    for start in range(0, size - 2_000, 40_000):
        noise[start : start + 300] = 0
        noise[start + 300 : start + 1500] = np.frombuffer(b"d 88 1234 40.7128 -74.0060" * 60, np.uint8)[:1200]
    return noise.tobytes()


def reader(content):
    return lambda offset, size: content[offset : offset + size]


def inflated(content, points=None):
    damages = []
    return b"".join(inflate(reader(content), [] if points is None else points, damages)), damages


def byte_by_byte(content):
    """What zlib gives before the first error, or the end."""
    inflater, parts = zlib.decompressobj(31), []
    with contextlib.suppress(zlib.error):
        for at in range(len(content)):
            parts.append(inflater.decompress(content[at : at + 1]))
    return b"".join(parts)


DATA = like_jpegs(1_500_000)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_every_restart_point_gives_the_rest(level):
    content = gzip.compress(DATA, level)
    points = []
    assert inflated(content, points) == (DATA, [])
    assert len(points) >= 5  # a finder that finds nothing would pass all that follows
    assert max(np.diff([point.offset for point in points])) < 500_000
    for point in points:
        assert b"".join(inflate(reader(content), points, [], point)) == DATA[point.offset :]


def test_points_are_found_at_every_bit_of_a_byte(monkeypatch):
    monkeypatch.setattr(gzip_streams, "SPACING_BYTES", 1)
    content, points = gzip.compress(like_jpegs(6_000_000, seed=5), 6), []
    inflated(content, points)
    assert {point.bit % 8 for point in points} == set(range(8))  # each takes another lead-in


def test_blocks_of_a_stream_within_the_stream_are_no_points():
    inner = gzip.compress(like_jpegs(700_000), 6)  # stored as it is, it is full of what look like blocks
    data = inner + like_jpegs(700_000, seed=2)
    for level in (0, 6):
        content, points = gzip.compress(data, level), []
        assert inflated(content, points) == (data, [])
        for point in points:
            assert b"".join(inflate(reader(content), points, [], point)) == data[point.offset :]


def test_a_stream_of_one_kind_of_block_that_is_not_sought_is_read_all_the_same():
    packer = zlib.compressobj(6, zlib.DEFLATED, 31, 9, zlib.Z_FIXED)
    data = b"".join(b"%d" % n for n in range(200_000))  # the fixed code is shorter than none at all
    content, points = packer.compress(data) + packer.flush(), []
    assert inflated(content, points) == (data, [])
    assert len(points) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 400_000), min_size=1, max_size=4),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 900_000), st.integers(0, 50_000)), max_size=12),
)
def test_reads_anywhere_in_several_members_are_gzips(sizes, level, places):
    data = b"".join(like_jpegs(size, seed) for seed, size in enumerate(sizes))
    starts = np.cumsum([0, *sizes]).tolist()
    content = b"".join(gzip.compress(data[a:b], level) for a, b in itertools.pairwise(starts))
    assert gzip.decompress(content) == data
    fresh = Stream(reader(content), [])  # finds its points as it goes
    points = []
    inflated(content, points)
    indexed = Stream(reader(content), points)
    for offset, size in places:
        assert fresh.read(offset, size) == indexed.read(offset, size) == data[offset : offset + size]


@pytest.mark.parametrize("flags", [4, 8, 16, 2, 4 | 8 | 16 | 2])
def test_headers_with_every_field_are_passed_over(flags):
    header = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    header += b"\x05\0extra" * bool(flags & 4) + b"name\0" * bool(flags & 8) + b"comment\0" * bool(flags & 16)
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little") * bool(flags & 2)
    content = header + gzip.compress(b"content", mtime=0)[10:]
    assert gzip.decompress(content) == b"content"
    assert inflated(content) == (b"content", [])


def test_a_damaged_header_is_not_told_as_data_behind_the_stream():
    content = bytearray(gzip.compress(b"content"))
    content[2] = 7  # no such method
    assert inflated(bytes(content)) == (b"", [(0, "the gzip header is damaged")])


def test_zeros_behind_the_stream_are_padding_and_anything_else_is_told():
    content = gzip.compress(DATA)
    assert inflated(content + bytes(100_000)) == (DATA, [])
    for rest in (b"garbage", bytes(70_000) + b"x", b"\x1f\x8b\x08"):
        data, [(offset, what)] = inflated(content + rest)
        assert (data, offset) == (DATA, len(DATA))
        assert "not gzip" in what


@pytest.mark.parametrize(("byte", "what"), [(-6, "checksum"), (-2, "length")])
def test_a_wrong_checksum_or_length_costs_nothing(byte, what):
    content = bytearray(gzip.compress(DATA))
    content[byte] ^= 1
    data, [(offset, told)] = inflated(bytes(content))
    assert data == DATA  # zlib and isal, looking at it, keep the last 200 kB
    assert offset == len(DATA)
    assert what in told


@pytest.mark.parametrize("cut", [5, 10, 11, 300, 65_535, 262_144 + 10, 700_000, -9, -8, -4, -1])
def test_of_a_cut_stream_all_that_zlib_gives_byte_by_byte_is_given(cut):
    content = gzip.compress(DATA)[:cut]
    data, damages = inflated(content)
    assert data == byte_by_byte(content)
    assert len(damages) == 1


def test_of_garbled_streams_all_that_zlib_gives_byte_by_byte_is_given():
    rng = random.Random(0)
    whole = gzip.compress(DATA[:600_000])
    lost = 0
    for _ in range(60):
        content = bytearray(whole)
        start, length = rng.randrange(20, len(content)), rng.choice([1, 64, 5000])
        content[start : start + length] = rng.randbytes(len(content[start : start + length]))
        data, damages = inflated(bytes(content))
        assert data == byte_by_byte(content)
        assert damages  # the checksum at least
        lost += len(data) < 600_000
    assert lost > 5  # in some the deflate data themselves make no sense


def test_after_an_error_reads_from_points_stop_where_they_must():
    content = bytearray(gzip.compress(DATA))
    content[900_000:905_000] = random.Random(1).randbytes(5000)
    points = []
    data, _ = inflated(bytes(content), points)
    stream = Stream(reader(bytes(content)), points)
    for offset in (len(data) - 1000, 10, len(data) - 100_000):
        assert stream.read(offset, 200_000) == data[offset : offset + 200_000]


def test_content_that_inflates_a_thousandfold_takes_no_more_memory():
    content = gzip.compress(bytes(200_000_000))
    tracemalloc.start()
    sizes = [len(piece) for piece in inflate(reader(content), [], [])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 200_000_000
    assert max(sizes) <= 2 * 2**21
    assert peak < 12_000_000  # two pieces, and what they are joined of


def test_several_threads_read_one_stream():
    content = gzip.compress(DATA)
    stream, wrong = Stream(reader(content), [], kept_bytes=300_000), []

    def read_some(seed):
        rng = random.Random(seed)
        for offset in sorted(rng.randrange(len(DATA)) for _ in range(40)):
            if stream.read(offset, 30_000) != DATA[offset : offset + 30_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read_some, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_place_that_the_disk_does_not_give_costs_what_lies_there_alone():
    content, points, bad = gzip.compress(DATA), [], range(600_000, 604_096)  # of the file

    def read(offset, size):
        if offset < bad.stop and offset + size > bad.start:
            raise OSError(errno.EIO, "Input/output error")
        return content[offset : offset + size]

    inflated(content, points)
    for stream in (Stream(read, points), Stream(read, [])):
        unread = []
        for offset in range(0, len(DATA), 20_000):
            try:
                assert stream.read(offset, 20_000) == DATA[offset : offset + 20_000]
            except OSError:
                unread.append(offset)
        assert unread  # not fewer bytes in silence: that would be another tar
        assert min(unread) > 100_000
        assert stream.read(0, 20_000) == DATA[:20_000]
        if stream.points is points:
            assert max(unread) < len(DATA) - 300_000  # from the next restart point on, all can be read again


def test_reading_forward_inflates_once(monkeypatch):
    content, given = gzip.compress(DATA), []
    real = gzip_streams.inflate
    monkeypatch.setattr(gzip_streams, "inflate", lambda *args: (given.append(len(p)) or p for p in real(*args)))
    stream = Stream(reader(content), [], kept_bytes=300_000)
    for offset in range(0, len(DATA), 10_000):
        stream.read(offset, 10_000)
        stream.read(max(0, offset - 20_000), 10_000)  # a thread that comes a little late
    assert sum(given) == len(DATA)


def test_a_foreign_index_gives_other_bytes_and_no_traceback():
    points = []
    inflated(gzip.compress(like_jpegs(1_500_000, seed=9), 6), points)
    stream = Stream(reader(gzip.compress(DATA, 6)), points)
    for point in points[1:]:
        stream.read(point.offset + 5, 1000)


@pytest.mark.parametrize("library", [zlib, isal_zlib])
@pytest.mark.parametrize("bit", range(8))
def test_a_lead_in_has_no_content_and_ends_at_the_bit(library, bit):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_FIXED)
    block = packer.compress(b"window text") + packer.flush()
    shifted = (int.from_bytes(block, "little") << bit).to_bytes(len(block) + 1, "little")
    inflater = library.decompressobj(-zlib.MAX_WBITS, zdict=b"window text")
    content = inflater.decompress(restart_points.lead_in(bit, shifted[0]) + shifted[1:])
    assert (content, inflater.eof) == (b"window text", True)
