"""Bytes from outside: what every reader refuses, in one line and in little time and memory."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from raygkd.config import from_yaml, read_run_config, recorded_settings
from raygkd.config.search_space import read_space
from raygkd.deploy.facts import Facts
from raygkd.errors import LONGEST_VALUE, ConfigError, DataError, UserError, brief, to_paste
from raygkd.models import load_model_file, read_class_names
from raygkd.models.files import FORMAT
from raygkd.storage.atomic_files import local_path, place
from raygkd.storage.journal import read_entries
from raygkd.storage.reading import (
    check_type,
    parse_json,
    parse_yaml,
    read_bytes,
    read_text,
)
from raygkd.tracking.journal_entries import read_journal
from raygkd.workflows.run_files import read_facts, read_result

pytestmark = pytest.mark.unit

# lists of nine names, nine times inside each other: 9**8 values in 400 bytes
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than 1,000,000 values, counted for each alias"),
        ("a: &a [*a]", "nested more than 50 deep, or a value that holds itself"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is there twice"),
        ("a: {b: 1, b: 1}", "line 1, column 11: the key 'b' is there twice"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: !!int abc", "invalid literal for int"),
        ("a: " + "9" * 5000, "Exceeds the limit (4300 digits)"),
        ("{[1]: 2}", "line 1, column 2: found unhashable key"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("\0", "unacceptable character"),
        (b"\xff", "unacceptable character"),
    ],
)
def test_yaml_that_is_refused(text: str | bytes, told: str):
    with pytest.raises(ValueError, match=re.escape(told)) as raised:
        parse_yaml(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 2 * LONGEST_VALUE


def test_yaml_merges_and_aliases_that_are_taken():
    text = "a: &a {b: 1, c: 1:2}\nd: {<<: *a, b: 2}\ne: {<<: *a}"
    first = {"b": 1, "c": "1:2"}
    assert parse_yaml(text) == {"a": first, "d": {"b": 2, "c": "1:2"}, "e": first}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("[" * 99_999, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff", "not UTF-8"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_refused(text: str | bytes, told: str):
    with pytest.raises(ValueError, match=told):
        parse_json(text)


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (pipe, "not a regular file"),
        (lambda folder: Path("/dev/zero"), "not a regular file"),
        (lambda folder: folder, "Is a directory"),
        (lambda folder: folder / "gone", "No such file"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        read_bytes,
        read_text,
        lambda path: read_space(str(path)),
        lambda path: read_class_names(str(path)),
        load_model_file,
        read_result,
        read_run_config,
    ],
)
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, read: Any, make: Any, told: str):
    with pytest.raises((UserError, OSError), match=told):
        read(make(tmp_path))


def test_a_large_file_is_not_read_whole(tmp_path: Path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 4 MiB"):
        read_bytes(path, most=4 << 20)
    with pytest.raises(ConfigError, match="cannot be read: larger than 4 MiB"):
        read_space(str(path))


def test_text_that_is_not_utf_8(tmp_path: Path):
    (tmp_path / "text").write_bytes(b"a\nb\xff")
    with pytest.raises(OSError, match=r"not UTF-8 text \(line 2\)"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "a is missing"),
        ({"a": "x"}, "a must be a valid integer, not 'x'"),
        ({"a": True}, "a must be a valid integer, not True"),
        ({"a": 1, "b": {"c": [1] * 10**6}}, "b.c must be a valid string, not [1, 1, 1, 1, ...]"),
        ([], "the value must be a valid dictionary, not []"),
    ],
)
def test_values_of_another_type(value: Any, told: str):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        check_type(value, {"a": int, "b?": {"c": str}})


@pytest.mark.parametrize(
    "make",
    [
        lambda: 10**10000,
        lambda: "x" * 10**6,
        lambda: ["x"] * 10**6,
        lambda: {"a": {"b": {"c": {}}}},
        lambda: "a\nb",
        object,
        lambda: b"x" * 999,
    ],
)
def test_a_foreign_value_is_shown_in_part_and_in_one_line(make: Any):
    value = make()
    assert len(brief(value)) <= LONGEST_VALUE
    assert "\n" not in brief(value) + brief(value, quoted=False)


# files of a run


@pytest.mark.parametrize("text", ["", "# nothing", "null", "[]", "optim: 3", "optim: {lr: [1]}"])
def test_a_damaged_configuration_of_a_run(tmp_path: Path, text: str):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_run_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("value", ["9" * 4000, "1" + "0" * 400, ".nan", "[[[[1]]]]", "{a: {b: 1}}"])
def test_values_of_settings_that_no_number_holds(value: str):
    for name in ("lr", "epochs"):
        with pytest.raises(ConfigError) as raised:
            from_yaml(f"optim: {{{name}: {value}}}", where="run.yaml")
        assert all(len(line) < 2 * LONGEST_VALUE for line in str(raised.value).splitlines())


GOOD = (
    '{"seconds": 1.0, "mlflow": {"tracking_uri": "sqlite:///x", "run_id": "1"}, "models": '
    '{"teacher": {"model": "resnet8", "parameters": 3, "test_score": null}}}'
)


def test_a_result_that_is_whole(tmp_path: Path):
    (tmp_path / "result.json").write_text(GOOD)
    assert read_result(tmp_path / "result.json")["seconds"] == 1.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1.0", '"x"'),
        ('"mlflow"', '"mlfow"'),
        ('"sqlite:///x"', "3"),
        ('{"teacher"', '[{"teacher"'),
        ('"resnet8"', "null"),
        ("3", "[]"),
        ("null", '"best"'),
        ('"seconds": 1.0', '"seconds": 1.0, "trials": [3]'),
        ('"seconds": 1.0', '"seconds": 1.0, "trials": [{"number": 1}]'),
        ('"seconds": 1.0', '"seconds": 1.0, "students": [{}]'),
        ('"seconds": 1.0', '"seconds": 1.0, "verdict": []'),
        ('"seconds": 1.0', '"seconds": 1.0, "repeat": {"seeds": 1}'),
        ('"seconds": 1.0', '"seconds": 1.0, "comparison": {"methods": [1]}'),
        ('"seconds": 1.0', '"seconds": 1.0, "best": 7'),
    ],
)
def test_a_result_of_another_shape(tmp_path: Path, before: str, after: str):
    (tmp_path / "result.json").write_text(GOOD.replace(before, after, 1))
    with pytest.raises(DataError, match=r"result\.json is damaged"):
        read_result(tmp_path / "result.json")


def test_facts_of_another_shape(tmp_path: Path):
    for text in ("[]", '{"data set, classes": 3}', "\x00", '{"a": 1, "a": 2}'):
        (tmp_path / "facts.json").write_text(text)
        with pytest.raises(DataError, match=r"facts\.json is damaged"):
            read_facts(tmp_path / "facts.json")


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "{}",
        '{"op": 3}',
        '{"op": "metrics", "key": "a"}',
        '{"op": "tags", "key": "a", "sequence": 1, "time": 1, "tags": {"a": 1}}',
        '{"sent": "x"}',
        '{"run_id": 3, "key": "a"}',
        '{"model": {}, "key": "a"}',
        "[" * 60 + "]" * 60,
    ],
)
def test_a_line_of_the_trackers_journal_of_another_shape(tmp_path: Path, line: str):
    path = tmp_path / "tracking.jsonl"
    path.write_text(f'{{"sent": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"tracking\.jsonl line 2 is damaged \(.*delete the line"):
        read_journal(path)


def test_a_journal_that_is_not_text(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="cannot be read: not UTF-8"):
        read_entries(tmp_path / "metrics.jsonl", dict[str, float])


# model files


def contents(**changed: Any) -> dict[str, Any]:
    model = {
        "format": FORMAT,
        "name": "resnet8",
        "class_names": ("a", "b"),
        "image_size": (8, 8),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "state_dict": {"x": torch.zeros(2)},
        "scores": {"val_score": 0.5},
        "config": "",
    }
    return model | changed


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": 3}, "name must be a valid string"),
        ({"class_names": 7}, "class_names"),
        ({"class_names": ("a", "a")}, "must be different"),
        ({"class_names": ("a", " ")}, "must be different, and not empty"),
        ({"image_size": (8,)}, "image_size"),
        ({"image_size": (8, 10**9)}, "two sides up to 4096"),
        ({"image_size": (0, 8)}, "two sides up to 4096"),
        ({"mean": (float("nan"),) * 3}, "mean .* three finite numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "std .* three finite numbers above 0"),
        ({"std": "x"}, "std"),
        ({"state_dict": [1]}, "state_dict must be a valid dictionary"),
        ({"state_dict": {"x": 1}}, "state_dict.x"),
        ({"state_dict": {"x": torch.tensor([1.0, float("nan")])}}, "weights x are not finite"),
        ({"state_dict": {"x": torch.tensor([float("-inf")])}}, "weights x are not finite"),
        ({"state_dict": {"x": torch.zeros(1, dtype=torch.complex64)}}, "weights x are complex"),
        ({"scores": {"val_score": "x"}}, "scores.val_score"),
        ({"config": None}, "config must be a valid string"),
        ({"weights": []}, "weights must be a valid dictionary"),
    ],
)
def test_a_model_file_with_edited_fields(tmp_path: Path, changed: dict[str, Any], told: str):
    torch.save(contents(**changed), tmp_path / "model.pt")
    with pytest.raises(DataError, match=rf"model\.pt is damaged: .*{told}"):
        load_model_file(tmp_path / "model.pt")


def test_the_recorded_settings_of_a_model_file():
    assert recorded_settings("", where="x") == {}
    for text in ("data: 3", "data: [1]", "3", "a: {"):
        with pytest.raises(ConfigError):
            recorded_settings(text, where="x")


FACTS = {
    "model": "resnet8",
    "task": "classification",
    "class_names": ["a", "b"],
    "image_size": 8,
    "resize": "stretch",
}


@pytest.mark.parametrize(
    "changed",
    [
        {"task": "x"}, {"task": 3}, {"class_names": 7}, {"class_names": ["a", "a"]},
        {"class_names": []}, {"class_names": [1]}, {"image_size": "8"}, {"image_size": 10**9},
        {"image_size": 0}, {"resize": "canvas"}, {"resize": None}, {"model": []},
    ],
)  # fmt: skip
def test_edited_metadata_of_an_exported_file(changed: dict[str, Any]):
    text = {"raygkd": json.dumps(FACTS | changed)}
    with pytest.raises(DataError, match="damaged metadata"):
        Facts.from_metadata(text, Path("model.onnx"))


# paths


@pytest.mark.parametrize("make", [place, local_path])
@pytest.mark.parametrize(
    "text", ["", "~nobody-here/x", "x" * 256, "x" * 256 + "/x", "x/" * 4000, "a\0b"]
)
def test_texts_that_name_no_path(make: Any, text: str):
    with pytest.raises(ConfigError, match="is not a usable path: ") as raised:
        make(text)
    assert len(str(raised.value)) < 300


def test_a_loop_of_links(tmp_path: Path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="is not a usable path"):
        place(tmp_path / "loop" / "x")


def test_commands_to_paste_are_quoted():
    assert to_paste("tune", "--resume", "my runs/$x") == "raygkd tune --resume 'my runs/$x'"
