"""A run with an image-text teacher and without labels, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from outcomes import Ran
from PIL import Image
from small_clips import SIDE, hugging_face

from raygkd.models import load_model_file

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_teacher_that_reads_texts_teaches_without_labels(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    hugging_face(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "prompts.txt").write_text("a photo of the {}.\nthe {}\n")
    run = ("--dataset", "digits", "--epochs", "1", "--limit-train", "128", "--image-size", SIDE)
    pair = ("--teacher", f"hf:{tmp_path / 'clip'}", "--student", "resnet8", "--method", "prg")
    texts = ("--class-names", tmp_path / "names.txt", "--prompts", tmp_path / "prompts.txt")
    ran = raygkd("train", *run, *pair, *texts, "--output", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert "classifies by 2 texts for each class, such as 'a photo of the zero.'" in ran.err
    result = json.loads(ran.out)
    assert load_model_file(Path(result["model"])).name == "resnet8"
    [teacher] = (tmp_path / "out" / "teachers").glob("*/model.pt")
    file = load_model_file(teacher)
    assert file.name == f"hf-clip:{tmp_path / 'clip'}"
    assert file.state_dict["texts_KPD"].shape == (10, 2, 12)


def test_feature_maps_of_a_teacher_that_reads_texts_are_matched(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    hugging_face(tmp_path / "clip")
    run = ("--dataset", "digits", "--epochs", "1", "--limit-train", "128", "--image-size", SIDE)
    pair = ("--teacher", f"hf:{tmp_path / 'clip'}", "--student", "resnet8", "--method", "graph")
    ran = raygkd("train", *run, *pair, "--output", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "Matched levels" in ran.err
    # transformers keeps its notes and progress bars to itself
    assert "Loading weights" not in ran.err
    assert "UNEXPECTED" not in ran.err


def test_class_names_are_those_of_a_student_without_labels(
    raygkd: Callable[..., Ran], tmp_path: Path
) -> None:
    hugging_face(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        Image.new("RGB", (SIDE, SIDE), (16 * number, 0, 255)).save(photos / f"{number}.png")
    run = ("--unlabelled", photos, "--epochs", "1", "--batch-size", "4", "--val-fraction", "0.5")
    pair = ("--teacher", f"hf:{tmp_path / 'clip'}", "--student", "resnet8", "--method", "kd")
    options = (*run, *pair, "--image-size", SIDE, "--output", tmp_path / "out", "--json")
    refused = raygkd("train", *options)
    assert refused.code == 2
    assert "pass --class-names FILE, or choose another method" in refused.err.splitlines()[-1]
    ran = raygkd("train", *options, "--class-names", tmp_path / "names.txt")
    assert ran.code == 0, ran.err
    assert load_model_file(json.loads(ran.out)["model"]).class_names == ("cat", "dog")
