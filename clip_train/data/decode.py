"""Bytes -> pixels: RGB, uint8, upright, on white, whatever the file was.

JPEG goes through libjpeg-turbo (simplejpeg), plain WebP through torchvision (Pillow's pixels, and a tenth
to a quarter faster), everything else through Pillow. Safe in threads; the decoders release the interpreter's lock.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]
"""(H, W, 3) uint8 RGB."""

MAX_PIXELS = 1 << 26
"""Largest picture that is decoded (67 million pixels, 8192 x 8192): a small file can unpack to a huge
picture.
"""

# What Pillow may open: no format that starts other programs (EPS) or reads other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_ORIENTATION = 0x0112
_APP1, _START_OF_SCAN = b"\xe1", b"\xda"


class DecodeError(ValueError):
    """These bytes are no picture that can be used; the text is the cause."""


SHRINKS = (2, 4, 8)
"""Factors by which a JPEG may be shrunk while it is decoded: libjpeg's inverse transforms of 4, 2 and 1 frequencies a
side. Those of 7/8, 6/8 and 5/8 exist too, but have no SIMD code: they take longer than decoding the whole.
"""


def decode(data: bytes, shrink: int = 1) -> Pixels:
    """Decode a picture of any common format to RGB.

    Grey, palette, CMYK and 16-bit pictures are converted, transparent ones are put on white, EXIF orientation
    is applied, and of an animation the first frame counts.

    Args:
        shrink: one of `SHRINKS` decodes a JPEG at 1 / shrink of its sides, rounded up (libjpeg's scaling in the
            frequency domain); only for what `shrinkable_size` gave a size of.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        DecodeError: no picture, cut short, damaged, or above `MAX_PIXELS`.
    """
    if _is_upright_jpeg(data):
        return _decode_jpeg(data, shrink)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":  # lossy, and neither alpha, animation nor metadata
        return _decode_webp(data)
    return _decode_any(data)


def shrinkable_size(data: bytes) -> tuple[int, int] | None:
    """`(width, height)` of a JPEG without EXIF data, which may be shrunk while it is decoded; None for all else."""
    if not _is_upright_jpeg(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # `decode` finds out what is wrong
    return (int(width), int(height)) if colours in ("YCbCr", "Gray") else None


def _is_upright_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG without EXIF data, in which an orientation may be (rare, and Pillow's business).

    Goes from segment to segment up to the first scan (ITU-T T.81, B.1.1): a search would look through the scans too.
    """
    if data[:3] != b"\xff\xd8\xff":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != _START_OF_SCAN:
        if marker == _APP1 and data[at + 4 : at + 9] == b"Exif\0":
            return False
        # 0xff may be repeated before a marker
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _decode_jpeg(data: bytes, shrink: int) -> Pixels:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(width), int(height))
        if colours in ("YCbCr", "Gray"):  # strict: a file that is cut short is an error
            least = (-(-int(height) // shrink), -(-int(width) // shrink)) if shrink > 1 else (0, 0)
            return simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except DecodeError:
        raise
    except ValueError as error:
        if "premature" in str(error).lower():
            raise DecodeError(f"JPEG is cut short: {error}") from error
        # otherwise let Pillow judge: some oddities are readable
    return _decode_any(data)


def _decode_webp(data: bytes) -> Pixels:
    width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))  # RFC 6386, 9.1
    _check_size(width, height)
    import torch  # seconds to import, and looking into shards of JPEGs does without
    from torchvision.io import decode_webp

    try:
        image = decode_webp(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return _decode_any(data)  # Pillow says what is wrong
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _decode_any(data: bytes) -> Pixels:
    try:
        # Warnings are about odd metadata and sizes; sizes are checked here.
        with _no_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return to_rgb(image)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(f"picture is too large: {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes make them stumble over
        raise DecodeError(f"not a readable picture: {cause_of(error)}") from error


def cause_of(error: Exception) -> str:
    """What Pillow complains of, without the address of the buffer, which differs from run to run."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__


_quiet_lock = threading.Lock()
_quiet: list[warnings.catch_warnings[None]] = []  # of all threads that are within `_no_warnings`, the outermost first
_quiet_threads = [0]


@contextmanager
def _no_warnings() -> Generator[None]:
    """`warnings.catch_warnings` sets state that all threads share: the first to come sets it, the last to go resets."""
    with _quiet_lock:
        if not _quiet:
            _quiet.append(warnings.catch_warnings())
            _quiet[0].__enter__()
            warnings.simplefilter("ignore")
        _quiet_threads[0] += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads[0] -= 1
            if not _quiet_threads[0]:
                _quiet.pop().__exit__(None, None, None)


def to_rgb(image: Image.Image) -> Pixels:
    """A Pillow image -> (H, W, 3) uint8 RGB, upright, on white.

    Raises:
        DecodeError: above `MAX_PIXELS`. Pillow's own errors pass.
    """
    _check_size(*image.size)
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "F":  # Pillow would cut it to 0..255: mostly black
        raise DecodeError("its numbers are floating-point: which is black and which is white is not said")
    if image.mode.startswith("I"):  # 16 bits a sample; Pillow's own conversion clips at 255
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, image)
    return np.array(image.convert("RGB"))  # a copy: torch wants to own what it may write


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    found = np.empty(values.shape, dtype=np.uint8)
    for row in range(0, len(values), 64):  # of the whole in 64 bits a large picture would take gigabytes
        part = np.clip(values[row : row + 64].astype(np.int64), 0, 65535)
        found[row : row + 64] = (part * 255 + 32767) // 65535
    return Image.fromarray(found)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"picture is too large: {width} x {height} is above {MAX_PIXELS:,} pixels")
