"""Cluttered digits."""

import hashlib
import io

import numpy as np
from PIL import Image

from raygkd.data import open_source
from raygkd.data.scenes import digits_of_split
from raygkd.data.sets.cluttered import CANVAS, IMAGES, KEY, ClutteredImage
from raygkd.data.sklearn_digits import load_digits

# of the digits of the first 20 training images
DIGEST = "bf1bfdb261d55fee5d722840e9733f15547a0885d74a9de1c2703cd9e223b666"


def first_images(count: int) -> list[ClutteredImage]:
    digits = load_digits()
    chosen = digits_of_split(digits, "train")
    return [ClutteredImage(digits, chosen, (KEY, 0, index)) for index in range(count)]


def test_the_data_set_has_its_splits_and_classes():
    source = open_source("cluttered-digits")
    splits = [sample.split for sample in source.samples]
    assert {split: splits.count(split) for split in IMAGES} == IMAGES
    assert source.class_names == tuple("0123456789")
    counts = np.bincount([sample.label for sample in source.samples], minlength=10)
    assert counts.min() > 0.7 * counts.mean()
    sample = source.samples[0]
    with Image.open(io.BytesIO(sample.read())) as image:
        assert (image.size, image.mode) == ((CANVAS, CANVAS), "L")


def test_an_image_is_the_same_every_time_and_no_other():
    images = [image.paint() for image in first_images(20)]
    for image, again in zip(images, first_images(20), strict=True):
        assert np.array_equal(image, again.paint())
    assert len({image.tobytes() for image in images}) == 20
    labels = [image.label for image in first_images(20)]
    painted = np.stack(images)
    assert painted.std((1, 2)).min() > 20
    assert hashlib.sha256(bytes(labels)).hexdigest() == DIGEST
