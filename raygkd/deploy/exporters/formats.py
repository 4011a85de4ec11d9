"""The formats that a model is exported to: add a new one here."""

from __future__ import annotations

from raygkd.deploy.exporters.onnx import write_onnx
from raygkd.deploy.exporters.safetensors import write_safetensors
from raygkd.deploy.exporters.torch_program import write_program

# format -> suffix of its files, and packages it needs
FORMATS = {
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch": (".pt2", ()),
    "safetensors": (".safetensors", ("safetensors",)),
}
# format -> function of a model file and a path that writes it
WRITERS = {"onnx": write_onnx, "torch": write_program, "safetensors": write_safetensors}
