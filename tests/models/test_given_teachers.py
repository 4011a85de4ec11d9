"""Teachers that come with weights: their classes, and what is done with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch

from raygkd.assembly.compatibility import check_settings
from raygkd.assembly.given_teacher import given_teacher, named_teacher
from raygkd.assembly.models import untrained_file
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError
from raygkd.models import build_from_file, save_model_file
from raygkd.registry import METHODS
from raygkd.report.tables import models_table
from raygkd.workflows.ablation import variants
from raygkd.workflows.first_trials import first_trials
from raygkd.workflows.repeat import compared

SPEC = ImageSpec(
    class_names=("cat", "dog", "eel"), image_size=(8, 8), mean=(0.5,) * 3, std=(0.2,) * 3
)
OTHER_ORDER = ("eel", "cat", "dog")
MORE = ("ant", "eel", "bee", "cat", "dog")


def saved(folder: Path, *class_names: str) -> Path:
    """Save an untrained resnet8 of classes; return its path."""
    path = folder / "model.pt"
    spec = dataclasses.replace(SPEC, class_names=class_names)
    save_model_file(path, untrained_file("resnet8", spec))
    return path


def config(path: Path, **more: str) -> Config:
    return with_settings(Config(), {"teacher": "resnet8", "teacher_weights": str(path), **more})


@pytest.mark.parametrize("names", [SPEC.class_names, OTHER_ORDER, MORE])
def test_the_classes_of_the_images_are_selected_by_name(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    path = saved(tmp_path, *names)
    images = torch.randn(2, 3, 8, 8)
    spec = dataclasses.replace(SPEC, class_names=names)
    whole = build_from_file(untrained_file("resnet8", spec))(images)
    wanted = whole[:, [names.index(one) for one in SPEC.class_names]]
    named = named_teacher(config(path), SPEC)
    assert (named.mode, named.class_names) == ("as-is", names)
    assert torch.allclose(named.model.eval()(images), wanted, atol=1e-6)
    file = given_teacher(with_settings(Config(), {"teacher": str(path)}), SPEC)
    assert file.class_names == SPEC.class_names
    assert torch.allclose(build_from_file(file)(images), wanted, atol=1e-6)


def test_names_in_a_file_are_those_of_the_weights(tmp_path: Path) -> None:
    path, names = tmp_path / "weights.pth", tmp_path / "names.txt"
    model = build_from_file(untrained_file("resnet8", dataclasses.replace(SPEC, class_names=MORE)))
    torch.save(model.state_dict(), path)
    assert named_teacher(config(path), SPEC).mode == "probe"
    names.write_text("\n".join(MORE))
    named = named_teacher(config(path, teacher_classes=str(names)), SPEC)
    images = torch.randn(2, 3, 8, 8)
    assert named.mode == "as-is"
    assert torch.allclose(named.model.eval()(images), model(images)[:, [3, 4, 1]], atol=1e-6)
    names.write_text("\n".join(OTHER_ORDER))
    with pytest.raises(ConfigError, match="has 3 names, but the weights of resnet8 have a"):
        named_teacher(config(path, teacher_classes=str(names)), SPEC)


def test_weights_of_other_classes_get_a_new_last_layer(tmp_path: Path) -> None:
    path = saved(tmp_path, "cat", "dog", "fox")
    named = named_teacher(config(path), SPEC)
    assert (named.mode, named.class_names) == ("probe", ())
    assert "resnet8 has 3 classes, but none named 'eel', a class of the images" in named.notice
    with pytest.raises(ConfigError, match="--teacher-mode as-is: resnet8 has 3 classes, but none"):
        named_teacher(config(path, teacher_mode="as-is"), SPEC)
    # a person who trains it anyway is not asked
    assert named_teacher(config(path, teacher_mode="finetune"), SPEC).notice == ""


def test_weights_without_names_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build_from_file(untrained_file("resnet8", SPEC)).state_dict(), path)
    named = named_teacher(config(path), SPEC)
    assert (named.mode, named.class_names) == ("as-is", ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mode": "probe"}, "--teacher-mode probe does not use the last layer of its we"),
        ({"teacher_weights": "none"}, "the weights of resnet8 are random; omit it"),
        ({"teacher": "MODEL"}, "model.pt has class names of its own; omit it"),
        ({"teacher": "fcos_resnet18_fpn16"}, "fcos_resnet18_fpn16 is a detector; omit it"),
    ],
)
def test_class_names_that_say_nothing_are_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    path, names = saved(tmp_path, *MORE), tmp_path / "names.txt"
    names.write_text("\n".join(MORE))
    settings = {name: value.replace("MODEL", str(path)) for name, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        named_teacher(config(path, **{"teacher_classes": str(names), **settings}), SPEC)


# methods that read feature maps alone
MAPS = [
    *("none", "graph", "graph+metrics", "crd", "dense", "fitnet", "ickd", "at", "vid"),
    *("graph-metrics", "reviewkd", "sp", "rkd", "pkt", "trg"),
]
FEATURES = with_settings(Config(), {"teacher_mode": "features"})


def test_feature_maps_alone_need_no_last_layer_and_no_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("test_vit", num_classes=0)
    torch.save(backbone.state_dict(), tmp_path / "dino.pth")
    changes = {"teacher": "timm:test_vit", "teacher_weights": str(tmp_path / "dino.pth")}
    spec = dataclasses.replace(SPEC, image_size=(32, 32))
    named = named_teacher(with_settings(FEATURES, changes), spec)
    assert named.mode == "features"
    assert torch.equal(named.model.state_dict()["net.norm.weight"], backbone.norm.weight)
    path = saved(tmp_path, "ant", "bee")
    file = given_teacher(with_settings(FEATURES, {"teacher": str(path)}), SPEC)
    assert file.class_names == ("ant", "bee")


def test_methods_that_read_logits_are_refused_and_left_out() -> None:
    for method in METHODS.names():
        settings = with_settings(FEATURES, {"method": method})
        if method in ("cwd", "pkd", "fgd", "mgd"):
            continue
        if method in MAPS:
            check_settings(settings, "classification")
            continue
        with pytest.raises(
            ConfigError, match=f"--method .*: reads the teacher's logits.*{MAPS[1]}"
        ):
            check_settings(settings, "classification")
    assert list(variants(FEATURES, "classification", {1: 8})) == MAPS
    ablation = variants(
        with_settings(FEATURES, {"preset": "ablation"}), "classification", {1: 8, 2: 8}
    )
    assert {one["method"] for one in ablation.values()} == {"none", "graph"}
    assert "kd" not in compared(FEATURES, {}, "classification")
    for config, count in ((Config(), 2), (FEATURES, 1)):
        assert len(first_trials(config, (), {1: 8}, "classification")) == count


def test_a_teacher_without_a_score_has_a_dash() -> None:
    table = models_table([("teacher", "dino", 20, None), ("student", "resnet8", 10, 0.5)])
    assert list(table.columns[4].cells) == ["-", "0.5000"]
