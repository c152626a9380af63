from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from tars import encoded

from clip_train.data.decode import DecodeError, decode, shrinkable_size


def gradient(mode: str, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """A smooth picture, so that JPEG hardly changes it."""
    y, x = np.mgrid[: size[1], : size[0]]
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    planes = [(x * (3 + c) + y * (5 - c)) % 256 for c in range(channels)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8).squeeze(), mode)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_plain_pictures_are_pillows(kind: str, mode: str) -> None:
    data = encoded(gradient(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = decode(data)
    assert found.dtype == np.uint8
    assert found.shape == (24, 40, 3)
    assert np.abs(found - expected).max() <= (1 if kind == "JPEG" else 0)


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}])
def test_jpegs_of_all_kinds(options: dict[str, int]) -> None:
    data = encoded(gradient("RGB", (123, 77)), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode(data) - expected).max() <= 1


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_shrunk_decoding_is_libjpegs(shrink: int, options: dict[str, int], mode: str) -> None:
    data = encoded(gradient(mode, (123, 77)), "JPEG", **options)
    assert shrinkable_size(data) == (123, 77)
    drafted = Image.open(io.BytesIO(data))
    drafted.draft(mode, (123 // shrink, 77 // shrink))  # Pillow's way of asking libjpeg for the same
    expected = np.asarray(drafted.convert("RGB")).astype(int)
    found = decode(data, shrink)
    assert found.shape == expected.shape == (-(-77 // shrink), -(-123 // shrink), 3)
    assert np.abs(found - expected).max() <= 1


def test_only_upright_jpegs_may_be_shrunk() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert shrinkable_size(encoded(gradient("RGB"), "JPEG", exif=exif)) is None
    assert shrinkable_size(encoded(gradient("CMYK"), "JPEG")) is None
    assert shrinkable_size(encoded(gradient("RGB"), "PNG")) is None
    assert shrinkable_size(b"\xff\xd8\xff\x00 broken") is None


def test_exif_is_looked_for_in_its_segment_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(gradient("RGB"), "JPEG", exif=exif, comment=b"first")
    far = turned[:2] + b"\xff\xfe\xff\xff" + bytes(0xFFFD) + b"\xff" + turned[2:]  # behind 64 KiB and a fill byte
    for data in (turned, far):
        assert shrinkable_size(data) is None
        assert decode(data).shape == (40, 24, 3)
    said = encoded(gradient("RGB"), "JPEG", comment=b"Exif\0\0 is what this is not")
    assert shrinkable_size(said) == (40, 24)


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    data = encoded(gradient("RGB", (200, 200)), "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, [data] * 64))
    assert warnings.filters == before
    assert all((one == found[0]).all() for one in found)


@pytest.mark.parametrize("options", [{"quality": 5}, {"quality": 100}, {"lossless": True}])
@pytest.mark.parametrize("size", [(3, 2), (123, 77), (400, 300)])
def test_webp_is_pillows_to_the_bit(options: dict[str, int], size: tuple[int, int]) -> None:
    data = encoded(gradient("RGB", size), "WEBP", **options)
    found = decode(data)
    assert found.flags.c_contiguous and found.flags.writeable
    assert (found == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_damaged_webp_is_refused() -> None:
    data = encoded(gradient("RGB", (400, 300)), "WEBP", quality=90)
    for broken in (data[: len(data) // 2], data[:26], data[:20] + bytes(len(data) - 20)):
        with pytest.raises(DecodeError, match="not a readable picture"):
            decode(broken)


def test_cmyk() -> None:
    data = encoded(gradient("CMYK"), "JPEG", quality=95)
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_white(kind: str) -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2] = (10, 200, 30, 255)
    pixels[3] = (100, 100, 100, 128)
    found = decode(encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (found[0] == (10, 200, 30)).all()
    assert (found[2] == 255).all()  # transparent black, which a plain conversion would show as black
    assert np.abs(found[3].astype(int) - 177).max() <= 1


def test_palette_with_transparency_and_grey_with_alpha() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image, "PNG", transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], dtype=np.uint8), "LA")
    assert decode(encoded(grey)).tolist() == [[[0] * 3, [255] * 3]]


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert decode(encoded(image)).tolist() == [[[0] * 3, [255] * 3]]


def test_sixteen_bits() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    found = decode(encoded(Image.fromarray(values)))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (found[..., 0] == found[..., 2]).all()


def test_sixteen_bits_take_no_more_memory_than_the_pixels() -> None:
    values = np.arange(4000 * 1000, dtype=np.uint32).reshape(4000, 1000).astype(np.uint16)
    data = encoded(Image.fromarray(values))
    tracemalloc.start()
    found = decode(data)
    _, peak = tracemalloc.get_traced_memory()  # numpy's own; Pillow's picture of 8 MB comes on top
    tracemalloc.stop()
    assert peak < 3 * found.nbytes
    wanted = (values.astype(np.float64) * 255 / 65535).round()
    assert (found[..., 0] == wanted).all()


def test_floating_point_pictures_are_refused() -> None:
    """Values from 0 to 1 would become black in silence."""
    with pytest.raises(DecodeError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))


def test_sixteen_bits_rgb_png() -> None:
    """Written by hand: Pillow does not write it."""
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 256 * 7, 0) * 2 for _ in range(2))
    chunks = (b"IHDR" + struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )
    assert (decode(data) == (255, 7, 0)).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (decode(data) == (255, 0, 0)).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient("RGB"), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (decode(data) == expected).all()


def test_tiny_and_long() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]
    assert decode(encoded(Image.new("RGB", (1, 5000)), "JPEG")).shape == (5000, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_cut_short(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(DecodeError):
        decode(data[: int(share * len(data))])


def test_a_jpeg_that_lost_its_middle_is_not_half_grey() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(DecodeError, match="cut short"):
        decode(data[: len(data) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)])
def test_no_picture(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


def png_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">2I", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_decompression_bombs_are_refused_unread(side: int) -> None:
    with pytest.raises(DecodeError, match="too large"):
        decode(png_that_claims(side, side))


def test_huge_jpeg_is_refused() -> None:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", 30_000, 30_000)
    with pytest.raises(DecodeError, match="too large"):
        decode(bytes(data))
