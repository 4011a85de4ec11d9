"""Classify images by an exported student, with only ONNX Runtime, NumPy and Pillow.

    raygkd export raygkd-output/runs/NAME --format onnx --out student.onnx
    python examples/onnx_classifier.py student.onnx image.png ...

Copy this file into your service: raygkd and torch need not be installed there.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *paths: str) -> None:
    """Print the class of each image, with its probability."""
    session = onnxruntime.InferenceSession(model)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["raygkd"])
    height, width = session.get_inputs()[0].shape[2:]
    for path in paths:
        image = Image.open(path).convert("RGB")
        if facts["resize"] == "centre-crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels_HWC = np.asarray(image, dtype=np.float32) / 255
        images_BCHW = pixels_HWC.transpose(2, 0, 1)[np.newaxis]  # the file normalises them itself
        (logits_BK,) = session.run(["logits"], {session.get_inputs()[0].name: images_BCHW})
        weights_K = np.exp(logits_BK[0] - logits_BK[0].max())
        best = int(weights_K.argmax())
        print(f"{path}: {facts['class_names'][best]} ({weights_K[best] / weights_K.sum():.2f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
