"""``Matching`` and ``distill`` with models of other libraries, at an image size of their own.

Shapes: B batch, C channels, H height, W width.
"""

import timm
import torch
import transformers
from torch.utils.data import TensorDataset

from raygkd import Matching, distill


def data(images: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, 64, 64, generator=generator)
    return TensorDataset(pixels, torch.arange(images) % 3)


def huggingface_vit() -> torch.nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=64,
            patch_size=16,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    )


def huggingface_convnext() -> torch.nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 12, 16, 24], num_labels=3)
    )


def test_a_hugging_face_student_learns_from_a_hugging_face_teacher():
    torch.manual_seed(0)
    student = huggingface_convnext()
    before = [parameter.detach().clone() for parameter in student.parameters()]
    history = distill(huggingface_vit(), student, data(), data(), epochs=2, batch_size=8, lr=0.01)
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert all(0 <= epoch["val_score"] <= 1 and epoch["loss_vertex"] > 0 for epoch in history)
    moved = [
        not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2


def test_matching_of_a_timm_teacher_reaches_every_layer_before_the_last_level():
    torch.manual_seed(0)
    images, _ = data().tensors
    teacher = timm.create_model("test_vit", num_classes=3, img_size=64)
    student = timm.create_model("test_resnet", num_classes=3)
    matching = Matching(teacher, student, images)
    _, loss = matching(images)
    loss.backward()
    assert student.conv1[0].weight.grad.abs().sum() > 0
    # timm starts with residual branches of zero, so the shortcut has the gradient
    assert student.layer4[0].downsample[1].weight.grad.abs().sum() > 0
    matching.close()
