"""open_image: the one place where image files are opened, so that every verb sees the same pixels.

Pillow passes many faults silently: rotated phone pictures, hidden colours under transparency, 16-bit grey
clipped to white, floats turned black, damaged PNG data, pictures of gigapixels in a few kilobytes.
"""

from __future__ import annotations

import hashlib
import io
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# 89 million pixels is where Pillow itself starts to warn; decoded as RGB that is 270 MB.
MAX_PIXELS = 89_000_000
# What 89 million pixels of 8-bit RGB take uncompressed; a larger file is no picture for training.
MAX_BYTES = 3 * MAX_PIXELS
# Qwen's processors refuse longer strips in the middle of a run; a strip that long shows nothing after resizing anyway.
MAX_ASPECT = 200
# Raster formats that data sets hold. Others are left out on purpose: EPS, for one, runs an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "DIB", "PCX")


class ImageError(UserError):
    """An image that cannot be used; the message says which and why, `reason` only why."""

    def __init__(self, name: str, reason: str = ""):
        super().__init__(": ".join(part for part in (name, reason) if part))
        self.name, self.reason = name, reason


def open_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, sha256: str | None = None) -> Image.Image:
    """A file (or the bytes of one) as an 8-bit RGB picture of its first frame, the right way up.

    EXIF orientation is applied, transparency is laid over white, 16-bit values are scaled to 8, CMYK is
    converted. Float pictures are scaled if all values lie in 0..1, taken as they are if in 0..255.
    sha256: what the file's content hash must be, where it is known.
    Errors raised: ImageError for a missing, truncated, damaged, unknown, too large or exchanged file.
    """
    name = "" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image(Path(source), name)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(name, "changed image: not the file that was prepared (its sha256 differs); put it back, or remove the prepared"
                         " data set (its folder below output_dir/data) and prepare again")
    return decode(data, name, max_pixels)[0]


def read_image(path: Path, name: str) -> bytes:
    """The bytes of an image file. Errors raised: ImageError; a pipe or a device, which could be read for ever, is one."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(name, "unreadable image: not a file" if not stat.S_ISDIR(found.st_mode) else "unreadable image: a folder")
        if found.st_size > MAX_BYTES:
            raise ImageError(name, f"unreadable image: {found.st_size} bytes, more than {MAX_BYTES} in all")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(name, "missing image: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(name, f"unreadable image: {getattr(error, 'strerror', None) or error}") from None


def decode(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """The picture in `data` as open_image gives it, and the name of its file format ("JPEG")."""
    from PIL import Image, ImageFile

    if not data:
        raise ImageError(name, "unreadable image: the file is empty")
    # Another library may have switched this on; half a picture with a grey rest must not be trained on.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # size is judged below; the rest are notes on metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            kind = image.format or ""
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(name, f"unreadable image: {width} x {height} pixels, more than {max_pixels} in all")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(name, f"unreadable image: {width} x {height} pixels, a strip more than {MAX_ASPECT} times as long as wide")
            if kind == "PNG":
                # load() does not look at the checksums of the pixel data, verify() does.
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            image.load()
            return to_rgb(_upright(image), name), kind
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(name, f"unreadable image: {width} x {height} pixels do not fit in memory") from None
    except Exception as error:  # Pillow's readers raise a dozen kinds on damaged files
        reason = "not a picture in a known format" if type(error).__name__ == "UnidentifiedImageError" else " ".join(str(error).split())
        raise ImageError(name, f"unreadable image: {reason or type(error).__name__}") from None


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # metadata that cannot be read names no orientation
        return image


def to_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """Any Pillow picture as 8-bit RGB. Errors raised: ImageError for value ranges or modes with no meaning as colour."""
    from PIL import Image

    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return _scaled(image, name)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError:
        raise ImageError(name, f"unreadable image: mode {mode} has no conversion to RGB") from None


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Grey values of 16 or 32 bits, or floats, as RGB."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 255):
            raise ImageError(name, f"unreadable image: float values from {low:g} to {high:g}; save it with 0..1 or 0..255")
        grey = np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    else:
        if low < 0 or high > 65535:
            raise ImageError(name, f"unreadable image: whole-number values from {low:g} to {high:g}; save it with 8 or 16 bits")
        # 32-bit mode also holds what formats of 16 bits decode to; elsewhere small values are 8-bit ones in a wide type
        sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM") or high > 255
        grey = ((values.astype(np.uint32) + 128) // 257 if sixteen else values).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
