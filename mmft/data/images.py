"""open_image: opens every image file of every verb, so that all of them see the same pixels.

Pillow passes many faults silently: EXIF rotation, colours hidden under transparency, 16-bit grey clipped to white,
floats turned black, damaged PNG data, gigapixel images in files of a few kilobytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Pillow starts to warn at 89 million pixels; decoded as RGB they take 270 MB.
MAX_PIXELS = 89_000_000
# 89 million uncompressed pixels of 8-bit RGB; a larger file is not an image for training.
MAX_BYTES = 3 * MAX_PIXELS
HEIF_HINT = "pip install 'mmft[heic]'"
MOST_PIXELS = 1 << 31  # the largest data.max_pixels
# Qwen's processors raise an error on longer strips during training; after resizing, such a strip shows nothing anyway.
MAX_ASPECT = 200
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif",
            ".jp2", ".ppm", ".pgm", ".pbm", ".tga", ".ico", ".pcx")  # fmt: skip
# Raster formats found in data sets. Others are excluded on purpose: EPS, for example, runs an external program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO", "DIB", "PCX")


# The first bytes of the formats above.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"P4", b"P5", b"P6")


def is_image(data: bytes) -> bool:
    """Whether bytes begin like an image file."""
    return data.startswith(_SIGNATURES) or data[4:8] == b"ftyp" or data[:4] == b"RIFF" and data[8:12] == b"WEBP"


ORIENTATION, TURNED, ON_ITS_SIDE = 0x0112, range(2, 9), range(5, 9)  # the EXIF tag, its values other than upright, those that swap width and height
CODECS = {"UNCOMPRESSED": "", "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}  # parquet's names: Arrow's
MOST_PAGE = 16 << 20  # bytes of a page that is unpacked for one image of it: with snappy it takes as long as decoding a photo
_PLACE = re.compile(rf"@(\d+)\+(\d+)(?:~({'|'.join(filter(None, CODECS.values()))})~(\d+)@(\d+)\+(\d+))?")


@dataclass(frozen=True)
class Page:
    """A compressed page of a parquet file. packed, unpacked: its bytes. start: of the image in the unpacked page."""

    codec: str
    packed: int
    unpacked: int
    start: int


@dataclass(frozen=True)
class Inside:
    """An image inside a larger file (an uncompressed tar file, a parquet file): its bytes are read where they lie. offset: of the image, or of its page."""

    archive: Path
    offset: int
    size: int
    page: Page | None = None

    def read(self) -> bytes:
        """The bytes; fewer if the file ends before. Raises OSError, and ValueError for a page that cannot be unpacked."""
        page = self.page
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size if page is None else page.packed)
        if page is None:
            return data
        if page.unpacked > MOST_PAGE:
            raise ValueError(f"a page of {page.unpacked} bytes, more than {MOST_PAGE}")
        import pyarrow as pa

        whole = pa.decompress(data, decompressed_size=page.unpacked, codec=page.codec, asbytes=True)
        return whole[page.start : page.start + self.size]

    @property
    def place(self) -> str:
        """Where it lies, as `inside` reads it in a path."""
        page = self.page
        if page is None:
            return f"@{self.offset}+{self.size}"
        return f"@{self.offset}+{page.packed}~{page.codec}~{page.unpacked}@{page.start}+{self.size}"


class PlacedBytes(bytes):
    """The bytes of an image that also lie in a file, where they can be read again."""

    inside: Inside
    name: str  # of the cell they came from: `image-17`


def inside(path: Path) -> Inside | None:
    """Where an image of a path `shard.tar/@OFFSET+SIZE/name.jpg` lies; None for a file of its own. See Inside.place."""
    match = _PLACE.fullmatch(path.parent.name)
    if match is None or not path.parent.parent.is_file():
        return None
    offset, packed = int(match[1]), int(match[2])
    if match[3] is None:
        return Inside(path.parent.parent, offset, packed)
    return Inside(path.parent.parent, offset, int(match[6]), Page(match[3], packed, int(match[4]), int(match[5])))


class ImageError(UserError):
    """An image that cannot be used. The message names the image and the reason; `reason` holds the reason alone."""

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(": ".join(part for part in (name, reason) if part))
        self.name, self.reason = name, reason


def open_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS, sha256: str | None = None) -> Image.Image:
    """The first frame of an image file (or of its bytes) as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency is composited over white, 16-bit values are scaled to 8, CMYK is
    converted. Float images are scaled if all values lie in 0..1, and used unscaled if in 0..255.
    sha256: the expected content hash of the file, if known.
    Raises ImageError for a missing, truncated, damaged, unknown, too large or changed file.
    """
    name = "" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_image(Path(source), name, max_pixels)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(name, "changed image: not the file that was prepared (its sha256 differs); put it back, or delete the prepared"
                         " data set (its folder below output_dir/data) and prepare again")
    return decode(data, name, max_pixels).picture


def max_bytes(max_pixels: int) -> int:
    """The largest image file that is read: uncompressed 8-bit RGB."""
    return 3 * max(max_pixels, MAX_PIXELS)


def read_image(path: Path, name: str, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an image file, or of an image inside a tar or parquet file. Raises ImageError, also for pipes and devices, whose reading might never end."""
    try:
        if (place := inside(path)) is not None:
            if place.size > max_bytes(max_pixels):
                raise ImageError(name, f"unreadable image: {place.size} bytes, more than {max_bytes(max_pixels)} in all")
            data = place.read()
            if len(data) < place.size:
                raise ImageError(name, f"unreadable image: {place.archive.name} ends within it")
            return data
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(name, "unreadable image: not a file" if not stat.S_ISDIR(info.st_mode) else "unreadable image: a folder")
        if info.st_size > max_bytes(max_pixels):
            raise ImageError(name, f"unreadable image: {info.st_size} bytes, more than {max_bytes(max_pixels)} in all")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(name, "missing image: no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(name, f"unreadable image: {getattr(error, 'strerror', None) or error}") from None


class Decoded(NamedTuple):
    """An upright RGB picture, the name of its file format ("JPEG"), and (width, height) of the picture in full size."""

    picture: Image.Image
    kind: str
    size: tuple[int, int]


def decode(data: bytes, name: str = "", max_pixels: int = MAX_PIXELS, least: int | None = None) -> Decoded:
    """The image in `data` as open_image returns it.

    least: a JPEG may be returned with a half, a quarter or an eighth of its width and height, as long as both have `least` pixels. All of its data is
    read, so the same files raise an error; what is left out is arithmetic. Raises ImageError.
    """
    from PIL import Image, ImageFile

    if not data:
        raise ImageError(name, "unreadable image: the file is empty")
    # another library may have switched this on; a truncated image must not be filled up with grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked below; other warnings concern metadata
            heif = _is_heif(data) and _register_heif(name)
            image = Image.open(io.BytesIO(data), formats=(*FORMATS, *(["HEIF"] if heif else [])))
            kind = image.format or ""
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(name, f"unreadable image: {width} x {height} pixels, more than {max_pixels} in all; make it smaller, or allow it with data.max_pixels={width * height}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(name, f"unreadable image: {width} x {height} pixels, a strip more than {MAX_ASPECT} times as long as wide")
            if kind == "PNG":
                # verify() checks the checksums of the pixel data; load() does not
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            if least is not None and kind == "JPEG":
                image.draft(None, (least, least))  # None: the mode stays
            image.load()
            upright, sideways = _upright(image)
            return Decoded(to_rgb(upright, name), kind, (height, width) if sideways else (width, height))
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(name, f"unreadable image: {width} x {height} pixels do not fit in memory") from None
    except Exception as error:  # Pillow's readers raise many exception types on damaged files
        reason = "not a picture in a known format" if type(error).__name__ == "UnidentifiedImageError" else " ".join(str(error).split())
        raise ImageError(name, f"unreadable image: {reason or type(error).__name__}") from None


def _is_heif(data: bytes) -> bool:
    """Whether the file is HEIC or HEIF, by its brands; AVIF files, which Pillow reads itself, may share the general ones."""
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1") and b"avif" not in data[8:64]


def _register_heif(name: str) -> bool:
    """Let Pillow read HEIC files with the package pillow-heif. Raises ImageError if it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(name, f"unreadable image: a HEIC file, which needs the package pillow-heif ({HEIF_HINT})") from None
    pillow_heif.register_heif_opener()
    return True


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The upright image, and whether its width has become its height."""
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        # exif_transpose copies an image that is upright already, which takes a quarter of the time of decoding it
        return (ImageOps.exif_transpose(image), orientation in ON_ITS_SIDE) if orientation in TURNED else (image, False)
    except Exception:  # unreadable metadata: keep the stored orientation
        return image, False


def to_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """Any Pillow image as 8-bit RGB. Raises ImageError for value ranges or modes that have no meaning as colour."""
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
        # 16-bit formats decode to 32-bit mode, too; in other formats values up to 255 are 8-bit values in a wide type
        is_16_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM") or high > 255
        grey = ((values.astype(np.uint32) + 128) // 257 if is_16_bit else values).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
