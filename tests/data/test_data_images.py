"""open_image: pixel values worked out by hand for every kind of file that loaders get wrong silently."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile
from small import Given, caption_row, make

from mmft.common.errors import UserError
from mmft.data.images import ImageError, decode, open_image


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    wide = Image.new("RGB", (4, 2), (0, 0, 0))
    wide.putpixel((0, 0), (255, 255, 255))  # the top left corner as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    image = open_image(encoded(wide, "PNG", exif=exif))
    assert image.size == (2, 4)
    assert image.getpixel((1, 0)) == (255, 255, 255)  # top left went to top right
    assert image.getpixel((0, 0)) == (0, 0, 0)


def test_broken_exif_is_ignored():
    data = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert open_image(data).size == (4, 2)


@pytest.mark.parametrize(("color", "expected"), [
    ((200, 0, 0, 0), (255, 255, 255)),  # hidden red is white
    ((200, 0, 0, 255), (200, 0, 0)),
    ((0, 0, 0, 51), (204, 204, 204)),  # a fifth of black over white: 255 * 0.8
])
def test_rgba_is_laid_over_white(color, expected):
    assert open_image(encoded(Image.new("RGBA", (2, 2), color), "PNG")).getpixel((0, 0)) == expected


def test_grey_with_alpha_is_laid_over_white():
    assert open_image(encoded(Image.new("LA", (2, 2), (10, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_a_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    shown = open_image(encoded(image, "PNG", transparency=0))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 200)]


def test_rgb_with_a_transparent_color():
    shown = open_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert shown.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)  # 65535 / 255 = 257
    shown = open_image(encoded(Image.fromarray(values), kind))
    assert [shown.getpixel((x, 0)) for x in range(4)] == [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]


def test_dark_sixteen_bit_png_stays_dark():
    shown = open_image(encoded(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)), "PNG"))
    assert shown.getpixel((0, 0)) == (1, 1, 1)  # 200 / 257, not 200


@pytest.mark.parametrize(("values", "expected"), [([0.0, 0.2, 1.0], [0, 51, 255]), ([0.0, 51.0, 255.0], [0, 51, 255])])
def test_float_pictures_are_scaled(values, expected):
    shown = open_image(encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert [shown.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("value", [-1.0, 300.0, float("nan")])
def test_float_pictures_without_a_meaning_are_refused(value):
    with pytest.raises(ImageError, match="float values"):
        open_image(encoded(Image.fromarray(np.array([[0.0, value]], dtype=np.float32)), "TIFF"))


def test_cmyk():
    assert open_image(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "TIFF")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF")).getpixel((0, 0)) == (0, 0, 0)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), c) for c in ((255, 0, 0), (0, 255, 0))]
    assert open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def test_one_bit_picture():
    assert open_image(encoded(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_file_is_refused(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries leave it
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(ImageError, match="unreadable image"):
        open_image(data[: len(data) // 2])


def test_flipped_bit_in_a_png_is_refused():
    data = bytearray(encoded(Image.new("RGB", (64, 64), (9, 9, 9)), "PNG"))
    at = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[at - 8:at - 4])[0]
    data[at + length] ^= 1  # the checksum of the pixel data
    with pytest.raises(ImageError):
        open_image(bytes(data))


def test_a_small_file_of_very_many_pixels_is_refused_before_decoding():
    row = b"\x00" * 1251  # 10,000 pixels of one bit, with the filter byte
    packed = zlib.compress(row * 10_000, 9)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    assert len(data) < 20_000
    with pytest.raises(ImageError, match="10000 x 10000"):
        open_image(data)


def test_postscript_is_not_opened():  # Pillow would start an external program for it
    with pytest.raises(ImageError, match="not a picture in a known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    for name, reason in (("absent.jpg", "no such file"), ("empty.jpg", "empty"), ("text.jpg", "known format")):
        with pytest.raises(UserError, match=reason) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)


def jpeg(size=(700, 500), seed=0, **options) -> bytes:
    """A picture of smooth patches."""
    patches = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    patches.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_jpeg_is_checked_at_a_reduced_size_and_recorded_with_its_own(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=exif))
    whole = open_image(tmp_path / "a.jpg")
    small = decode((tmp_path / "a.jpg").read_bytes(), least=200)
    assert small.size == whole.size == ((500, 700) if orientation > 4 else (700, 500)) and small.kind == "JPEG"
    assert small.picture.size == tuple(-(-side // 2) for side in whole.size)
    record = list(make(Given(root=str(tmp_path), given=[caption_row("a.jpg")]), tmp_path).images())[0]
    assert (record["width"], record["height"]) == whole.size
    png = io.BytesIO()
    whole.save(png, "PNG")
    assert decode(png.getvalue(), least=64).picture.size == whole.size, "only JPEG has smaller forms"


def test_a_damaged_jpeg_is_refused_at_every_size_or_at_none():
    """Cut files, flipped bits and missing bytes, of baseline and progressive files in colour and grey."""
    rng, refused = np.random.default_rng(0), 0
    grey = io.BytesIO()
    Image.open(io.BytesIO(jpeg((300, 200)))).convert("L").save(grey, "JPEG")
    for good in (jpeg((300, 200)), jpeg((300, 200), progressive=True), jpeg((300, 200), subsampling=0), grey.getvalue()):
        for number in range(30):
            data, at = bytearray(good), int(rng.integers(len(good)))
            if number % 3 == 0:
                data = data[:at]
            elif number % 3 == 1:
                data[at] ^= 1 << int(rng.integers(8))
            else:
                del data[at : at + int(rng.integers(1, 100))]
            found = []
            for least in (None, 1, 128):
                try:
                    found.append(decode(bytes(data), least=least).size)
                except ImageError as error:
                    found.append(error.reason)
            assert found[0] == found[1] == found[2]
            refused += isinstance(found[0], str)
    assert 30 < refused < 100
