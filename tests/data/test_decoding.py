"""Images as they come: formats, depths, colour profiles, oversized files and other files."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image, features

from raygkd.data import decode
from raygkd.data.decoding import MAX_PIXELS, pillow_decode

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    """Return the decoded pixels (H, W, 3)."""
    return decode(content).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("kind", "feature", "options"),
    [
        ("AVIF", "avif", {"quality": 100, "subsampling": "4:4:4"}),
        ("JPEG2000", "jpg_2000", {}),
        ("WEBP", "webp", {"lossless": True}),
    ],
)
def test_newer_formats_keep_their_pixels(kind, feature, options):
    if not features.check(feature):
        pytest.skip(f"Pillow without {feature}")
    smooth = Image.fromarray(PIXELS).resize((64, 48), Image.Resampling.BICUBIC)
    difference = pixels(encoded(smooth, kind, **options)).astype(int) - np.asarray(smooth)
    assert np.abs(difference).mean() < 3


def heic() -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(PIXELS).resize((64, 48))).save(file, quality=95)
    return file.getvalue()


def test_heic_is_read_with_its_package():
    assert decode(heic()).shape == (3, 48, 64)


def test_heic_without_its_package_names_the_command(monkeypatch):
    content = heic()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"HEIC; to read it: pip install 'raygkd\[heif\]'"):
        decode(content)


def test_tiff_with_several_pages_gives_the_first():
    pages = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (pixels(content) == PIXELS).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 257 * 7, 65535]], np.int32), [0, 7, 255]),
        (np.array([[-100, 0, 155]], np.int32), [0, 100, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 7, 255]], np.float32), [0, 7, 255]),
        (np.array([[-1, 1, 3]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, -np.inf, 1e4]], np.float32), [0, 0, 0]),
        (np.array([[np.nan, np.nan, np.nan]], np.float32), [0, 0, 0]),
    ],
)
def test_deep_tiffs_become_8_bits(values, expected):
    decoded = pixels(encoded(Image.fromarray(values), "TIFF"))
    assert decoded.shape == (1, 3, 3)
    assert decoded[0, :, 0].tolist() == expected
    assert (decoded == decoded[..., :1]).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"])
def test_palettes_with_transparency_keep_their_colours(kind, transparency):
    if kind == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF has one transparent colour")
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 200, 100, 0])
    content = encoded(image, "PNG" if kind == "WEBP" else kind, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = pillow_decode(content).permute(1, 2, 0).numpy()
    assert decoded[0].tolist() == [[10, 20, 30], [40, 50, 60], [200, 100, 0]]
    assert (pixels(content) == decoded).all()


# colorants of Adobe RGB and of sRGB for the white D50: columns red, green, blue
ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
GAMMA = 563 / 256


def profile() -> bytes:
    """Return an ICC profile of Adobe RGB's primaries and gamma."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"Wide gamut\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
    }
    for name, colorant in zip((b"r", b"g", b"b"), ADOBE.T):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*colorant)
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(GAMMA * 256))
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02100000, b"mntr", b"RGB ",
                       b"XYZ ")  # fmt: skip
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_wide_gamut_becomes_srgb(kind):
    colour = np.array([120, 180, 100])
    linear = np.linalg.inv(SRGB) @ ADOBE @ (colour / 255) ** GAMMA
    expected = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 0)
    assert np.abs(expected - colour).max() > 10
    image = Image.new("RGB", (8, 8), tuple(colour.tolist()))
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = pixels(encoded(image, kind, icc_profile=profile(), **options))
    # rounding in a JPEG is amplified
    assert np.abs(decoded - expected).max() < (8 if kind == "JPEG" else 3)
    plain = pixels(encoded(image, kind, **options))
    assert np.abs(plain - colour).max() < 3


def test_damaged_profile_is_ignored():
    image = Image.fromarray(PIXELS)
    assert (pixels(encoded(image, "PNG", icc_profile=profile()[:90])) == PIXELS).all()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header has a size, without its pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    size = struct.pack(">I", len(chunk) - 4)
    return b"\x89PNG\r\n\x1a\n" + size + chunk + struct.pack(">I", zlib.crc32(chunk)) + end


def jpeg_bomb() -> bytes:
    content = bytearray(encoded(Image.fromarray(PIXELS), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(content)


@pytest.mark.parametrize("content", [bomb(60000, 60000), bomb(20000, 9000), jpeg_bomb()])
def test_too_many_pixels_are_refused_before_they_are_decoded(content):
    assert 60000 * 60000 > 20000 * 9000 > MAX_PIXELS
    with pytest.raises(ValueError, match="pixels") as caught:
        decode(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>", "not an image, but an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer; run git lfs"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04zip", "a ZIP archive"),
        (b'{"a": 1}', "JSON"),
        (b"<?xml version='1.0'?><svg/>", "XML"),
        (b"words", "not a known image format"),
        (b"", "it is empty"),
    ],
)
def test_other_files_are_named(content, kind):
    with pytest.raises(ValueError, match=kind):
        decode(content)


def test_content_counts_and_not_the_suffix(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    assert torch.equal(decode((tmp_path / "photo.jpg").read_bytes()).permute(1, 2, 0),
                       torch.from_numpy(PIXELS))  # fmt: skip
