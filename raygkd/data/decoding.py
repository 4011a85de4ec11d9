"""Decoding of encoded images to upright 8-bit sRGB.

Shapes: C channels (3: red, green, blue), H height, W width.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import struct
import zlib

import numpy as np
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from raygkd.data.image_files import HEIF_INSTALL

# images with more pixels are refused: a small file can hold one that fills the memory
MAX_PIXELS = 178_956_970
# how far into a file a colour profile is looked for
PROFILE_BYTES = 1 << 18

# Three times as fast as Pillow for small images. torchvision 0.29 deprecates it and a later
# release removes it; Pillow reads the same formats and gives the same pixels.
_torch_decode = getattr(torchvision.io, "decode_image", None)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
# what files with an image's name may be instead, by their first bytes
_OTHER_TYPES = {
    b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<?xml": "XML", b"<svg": "SVG",
    b"version https://git-lfs": "a Git LFS pointer; run git lfs pull", b"%pdf": "a PDF",
    b"pk\x03\x04": "a ZIP archive", b"\x1f\x8b": "gzip data", b"{": "JSON",
}  # fmt: skip


def decode(encoded: bytes) -> Tensor:
    """Return the pixels of an encoded image as uint8 (3, H, W), upright, in sRGB.

    All formats that Pillow reads are supported, and HEIC with the package pillow-heif. Greyscale,
    palette and CMYK images become RGB, transparency is dropped, an animation or a TIFF with several
    pages gives the first one, the EXIF orientation is applied, and a colour profile is converted to
    sRGB. Of 16-bit images the upper 8 bits are kept. Whole numbers of 32 bits count as 8-bit or
    16-bit if they fit; floating-point pixels count as 0..1 or 0..255 if they fit; all others are
    scaled from their lowest to their highest value, with NaN as the lowest.

    Raises:
        ValueError: the bytes are not a complete image, or it has more than ``MAX_PIXELS`` pixels.
    """
    if _torch_decode is not None and encoded.startswith((_JPEG, _PNG)) and _is_plain(encoded):
        data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        try:
            image_CHW = _torch_decode(data, mode="RGB", apply_exif_orientation=True)
        except RuntimeError:
            return pillow_decode(encoded)
        # a 16-bit PNG keeps its depth
        return image_CHW if image_CHW.dtype == torch.uint8 else (image_CHW.int() // 257).byte()
    return pillow_decode(encoded)


def pillow_decode(encoded: bytes) -> Tensor:
    """Return what ``decode`` returns, decoded by Pillow."""
    try:
        with Image.open(io.BytesIO(_readable(encoded))) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels, more than {MAX_PIXELS:,}")
            image = ImageOps.exif_transpose(file)
            rgb = _to_srgb(_to_8_bits(image), file.info.get("icc_profile"))
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
    # Pillow's readers raise almost any type of exception for corrupt files
    except Exception as error:
        raise ValueError(f"not a complete image ({_reason(encoded, error)})") from error


def _readable(encoded: bytes) -> bytes:
    """Return the bytes, after Pillow was prepared for their format."""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIF_BRANDS:
        if importlib.util.find_spec("pillow_heif") is None:
            raise ValueError(f"HEIC; to read it: {HEIF_INSTALL}")
        import pillow_heif

        pillow_heif.register_heif_opener()
    return encoded


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        pixels_HW = np.asarray(image)
        finite = pixels_HW[np.isfinite(pixels_HW)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        limits = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0)
        limit = next((limit for limit in limits if low >= 0 and high <= limit), None)
        return Image.fromarray(_scaled(pixels_HW, (0.0, limit) if limit else (low, high)))
    # a palette with transparent colours has to become RGBA first
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def _scaled(pixels_HW: NDArray, limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Return pixels as 0..255, from the lower to the upper limit."""
    low, high = limits
    bounded = np.nan_to_num(pixels_HW.astype(np.float64), nan=low, posinf=high, neginf=low)
    unit = 255 / max(high - low, 1e-30)
    return np.clip(np.rint((bounded - low) * unit), 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return an image as RGB in the colour space sRGB."""
    if profile and image.mode in ("RGB", "CMYK"):
        transform = _transform(profile, image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            return converted
    return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the conversion of a colour profile to sRGB; None if it is sRGB or unusable."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return None
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
    # a damaged profile, or one of another colour space, says nothing about the pixels
    except (ImageCms.PyCMSError, OSError):
        return None


def _is_plain(encoded: bytes) -> bool:
    """Return whether torchvision decodes a JPEG or PNG as ``decode`` should.

    It neither limits the pixels nor converts colour profiles, and a damaged PNG ends the process.
    """
    if encoded.startswith(_PNG):
        if not _is_intact_png(encoded):
            return False
        size = struct.unpack(">II", encoded[16:24])
        has_profile = encoded.find(b"iCCP", 0, encoded.find(b"IDAT")) >= 0
    else:
        size = _jpeg_size(encoded)
        has_profile = encoded.find(b"ICC_PROFILE\0", 0, PROFILE_BYTES) >= 0
    if size[0] * size[1] > MAX_PIXELS:
        return False
    return not has_profile or _has_srgb_profile(encoded)


def _is_intact_png(encoded: bytes) -> bool:
    """Return whether the chunks of a PNG have their lengths and checksums, from header to end."""
    at, kinds = len(_PNG), []
    while at + 12 <= len(encoded):
        end = at + 8 + int.from_bytes(encoded[at : at + 4], "big")
        kind = encoded[at + 4 : at + 8]
        if encoded[end : end + 4] != zlib.crc32(encoded[at + 4 : end]).to_bytes(4, "big"):
            return False
        kinds.append(kind)
        if kind == b"IEND":
            return kinds[0] == b"IHDR" and b"IDAT" in kinds
        at = end + 4
    return False


def _has_srgb_profile(encoded: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            profile = file.info.get("icc_profile")
            return file.mode == "RGB" and (not profile or _transform(profile, "RGB") is None)
    # reported when it is decoded
    except Exception:
        return False


def _jpeg_size(encoded: bytes) -> tuple[int, int]:
    """Return height and width in the header of a JPEG; zeros if there is none."""
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4], "big")
        # the frame headers, which are neither tables (C4, CC) nor extensions (C8)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", encoded[at + 5 : at + 9])
            return height, width
        # padding before a marker
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "it is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        head = encoded[:64].lstrip().lower()
        for start, kind in _OTHER_TYPES.items():
            if head.startswith(start):
                return f"not an image, but {kind}"
        return "not a known image format"
    return " ".join(str(error).split())
