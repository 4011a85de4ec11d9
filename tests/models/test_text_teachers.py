"""Image-text models as teachers, in small models of the real libraries with random weights.

Shapes: B batch, K classes, P prompts, D entries of an embedding.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from small_clips import OPEN_CLIP, SIDE, hugging_face, opened
from torch import Tensor

from raygkd.assembly.given_teacher import named_teacher, untrained_teacher_file
from raygkd.assembly.text_teachers import check_texts, with_text_teacher
from raygkd.config import Config, with_settings
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, DataError, UserError
from raygkd.models import (
    FeatureTap,
    build_from_file,
    build_model,
    check_model_name,
    load_model_file,
    model_input,
    save_model_file,
    stage_modules,
    with_classes,
)
from raygkd.models.heads import ProxyTap
from raygkd.models.text_classifier import prompted_logits, read_prompts

SPEC = ImageSpec(
    class_names=("cat", "dog", "owl"),
    image_size=(SIDE, SIDE),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    class_counts=(1, 1, 1),
)
PROMPTS = ("a photo of a {}.", "the {}", "a picture of the {}.")


FAMILIES = {"hf": hugging_face, "open_clip": opened}
each_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(name: str, **settings: Any) -> Config:
    return with_settings(Config(), {"teacher": name, **settings})


def features_of(family: str, model: Any, folder: Path, images: Tensor, texts: list[str]) -> Any:
    """Return embeddings of images and texts as the library itself computes them, of length 1."""
    with torch.no_grad():
        if family == "hf":
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            # one text at a time: nothing is padded
            tokens = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
            output = [model(input_ids=one, pixel_values=images) for one in tokens]
            text = torch.cat([one.text_embeds for one in output])
            return output[0].image_embeds, text, model.logit_scale.exp()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        image, text = (
            model.encode_image(images, normalize=True),
            model.encode_text(tokens, normalize=True),
        )
        return image, text, model.logit_scale.exp()


@each_family
def test_the_teacher_gives_the_librarys_similarities(family: str, tmp_path: Path):
    theirs, images = FAMILIES[family](tmp_path), torch.randn(4, 3, SIDE, SIDE)
    teacher = named_teacher(config_of(f"{family}:{tmp_path}"), SPEC)
    assert teacher.mode == "as-is"
    assert teacher.texts is not None
    assert teacher.texts.class_names == SPEC.class_names
    texts = [f"a photo of a {name}." for name in SPEC.class_names]
    image, text, scale = features_of(family, theirs, tmp_path, images, texts)
    logits = teacher.model.eval()(images)
    torch.testing.assert_close(logits, scale * image @ text.mT, rtol=1e-4, atol=1e-4)
    assert logits.std(1).min() > 1e-3
    tap = ProxyTap(teacher.model, 3)
    teacher.model(images)
    torch.testing.assert_close(tap.take(), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tap.class_proxies_KD, text, rtol=1e-4, atol=1e-5)
    assert tap.size == 12


@each_family
def test_names_and_prompts_may_be_given_and_a_saved_teacher_needs_no_texts(
    family: str, tmp_path: Path
):
    theirs, images = FAMILIES[family](tmp_path / "model"), torch.randn(4, 3, SIDE, SIDE)
    (tmp_path / "names.txt").write_text("owl\ncat\ndog\n")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    config = config_of(
        f"{family}:{tmp_path / 'model'}",
        class_names=str(tmp_path / "names.txt"),
        prompts=str(tmp_path / "prompts.txt"),
    )
    check_texts(config)
    teacher = named_teacher(config, SPEC)
    texts = [prompt.format(name) for name in ("owl", "cat", "dog") for prompt in PROMPTS]
    image, text, scale = features_of(family, theirs, tmp_path / "model", images, texts)
    expected = []
    for one in image:
        scores = (scale * text.unflatten(0, (3, 3)) @ one).tolist()
        columns = [list(column) for column in zip(*scores, strict=True)]
        weights = [max(map(math.exp, c)) / sum(map(math.exp, c)) for c in columns]
        expected.append([sum(w * s for w, s in zip(weights, row)) / sum(weights) for row in scores])
    logits = teacher.model.eval()(images)
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-3, atol=1e-3)
    path = tmp_path / "teacher.pt"
    save_model_file(path, untrained_teacher_file(config, SPEC, teacher))
    file = load_model_file(path)
    assert not any("text_model" in key or "transformer.text" in key for key in file.state_dict)
    (tmp_path / "names.txt").unlink()
    (tmp_path / "prompts.txt").unlink()
    assert torch.equal(build_from_file(file).eval()(images), logits)
    assert file.weights["sha256"]


@each_family
def test_classes_of_a_saved_teacher_are_selected_by_name(family: str, tmp_path: Path):
    FAMILIES[family](tmp_path)
    config, images = config_of(f"{family}:{tmp_path}"), torch.randn(4, 3, SIDE, SIDE)
    file = untrained_teacher_file(config, SPEC, named_teacher(config, SPEC))
    fewer = build_from_file(with_classes(file, (2, 0), ("owl", "cat"))).eval()
    logits = build_from_file(file).eval()(images)
    torch.testing.assert_close(fewer(images), logits[:, [2, 0]])


@each_family
def test_levels_are_the_maps_of_blocks(family: str, tmp_path: Path):
    FAMILIES[family](tmp_path)
    teacher = named_teacher(config_of(f"{family}:{tmp_path}", teacher_mode="features"), SPEC)
    model = teacher.model
    with FeatureTap(model, list(stage_modules(model))) as tap:
        _, features = tap(torch.randn(2, 3, SIDE, SIDE))
    shapes = {level: tuple(maps.shape) for level, maps in features.items()}
    assert shapes == dict.fromkeys((1, 2, 3, 4), (2, 16, 4, 4))
    assert teacher.texts is None


@each_family
def test_other_image_sizes_are_taken(family: str, tmp_path: Path):
    FAMILIES[family](tmp_path)
    spec = dataclasses.replace(SPEC, image_size=(48, 48))
    teacher = named_teacher(config_of(f"{family}:{tmp_path}"), spec)
    assert teacher.model(torch.randn(2, 3, 48, 48)).shape == (2, 3)


def test_random_weights_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    opened(tmp_path)
    caplog.clear()
    build_model(f"open_clip:{tmp_path}", 3, (SIDE, SIDE))
    assert not caplog.records


def test_the_input_is_that_of_the_folder(tmp_path: Path):
    opened(tmp_path)
    wanted = model_input(f"open_clip:{tmp_path}")
    assert wanted.size == (SIDE, SIDE)
    assert (wanted.mean, wanted.std) == ((0.5, 0.25, 0.5), (0.5, 0.5, 0.25))
    assert wanted.interpolation == "bilinear"


def test_a_file_of_weights_follows_the_name(tmp_path: Path):
    theirs, images = opened(tmp_path / "model"), torch.randn(2, 3, SIDE, SIDE)
    (tmp_path / "tiny-test.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(tmp_path)
    file = tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), file)
    folder = named_teacher(config_of(f"open_clip:{tmp_path / 'model'}"), SPEC).model.eval()
    for settings in (
        {"name": f"open_clip:tiny-test:{file}"},
        {"name": "open_clip:tiny-test", "teacher_weights": str(file)},
    ):
        teacher = named_teacher(config_of(**settings), SPEC)
        assert teacher.mode == "as-is"
        assert torch.equal(teacher.model.eval()(images), folder(images))
    file.write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"weights\.pt does not fit OpenCLIP's tiny-test: "):
        named_teacher(config_of(f"open_clip:tiny-test:{file}"), SPEC)
    with pytest.raises(UserError, match=r"the weights of tiny-test are random|cannot be trained"):
        named_teacher(config_of("open_clip:tiny-test"), SPEC)


def test_a_clip_model_that_is_trained_keeps_its_own_classifier(tmp_path: Path):
    hugging_face(tmp_path)
    name = f"hf:{tmp_path}"
    assert with_text_teacher(config_of(name)).model.teacher == f"hf-clip:{tmp_path}"
    probed = config_of(name, teacher_mode="probe")
    assert with_text_teacher(probed) == probed
    trained = build_model(name, 3, (SIDE, SIDE))
    assert type(trained).__name__ == "HuggingFaceModel"
    assert len(stage_modules(trained)) == 4
    with pytest.raises(
        ConfigError, match=r"^--prompts p\.txt: hf:.* is not an image-text model, or"
    ):
        check_texts(config_of(name, teacher_mode="probe", prompts="p.txt"))


def test_average_over_prompts_by_hand():
    # one image along the first axis: prompt 0 is sure of class 0, prompt 1 says nothing
    images = torch.tensor([[1.0, 0.0]])
    texts = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [0.6, 0.8]]])
    sure = 1 / (1 + math.exp(-2.0))
    total = sure + 0.5
    expected = [[(sure * 2 + 0.5 * 1.2) / total, 0.5 * 1.2 / total]]
    value = prompted_logits(images, texts, torch.tensor(2.0))
    torch.testing.assert_close(value, torch.tensor(expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no prompt; write one per line, as in 'a photo of a \{\}\.'"),
        ("a photo\n", r"'a photo' must have \{\} once, for the name of a class"),
        ("{} and {}\n", r"'\{\} and \{\}' must have \{\} once"),
    ],
)
def test_wrong_prompts_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(str(path))
    with pytest.raises(DataError, match=r"^cannot read .*none\.txt: No such file"):
        read_prompts(str(tmp_path / "none.txt"))


def test_texts_are_refused_where_they_do_not_apply(tmp_path: Path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    names = str(tmp_path / "names.txt")
    with pytest.raises(ConfigError, match=r"^--class-names .*: resnet20 is not an image-text mod"):
        check_texts(config_of("resnet20", class_names=names))
    hugging_face(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^--class-names .*2 class names, but .* 3 classes"):
        named_teacher(config_of(f"hf:{tmp_path / 'model'}", class_names=names), SPEC)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-23", "unknown open_clip classifier 'ViT-B-23'; did you mean 'ViT-B-32'"),
        ("open_clip:ViT-B-32.laion", r"no weights 'laion'; did you mean"),
        ("open_clip:ViT-B-32:none.pt", r"there is no file none\.pt"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_model_name(name)
