"""Files of weights as training scripts and libraries write them."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from raygkd.errors import ConfigError, DataError
from raygkd.models import ModelFile, build_classifier, load_classifier, save_model_file
from raygkd.models.checkpoints import KEYS, load_file, load_state, read_state

State = dict[str, Tensor]
PREFIXES = ("", "module.", "model.", "backbone.", "_orig_mod.", "module._orig_mod.")


def trained(classes: int = 4, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return build_classifier("resnet8", classes).eval()


def assert_loaded(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor) != name.startswith(but or ("\0",)), name


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".safetensors"])
def test_a_state_dict_of_any_suffix_is_loaded(tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"weights{suffix}", trained().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = build_classifier("resnet8", 4)
    weights = load_file(model, path, 4)
    assert_loaded(model, state)
    assert weights.is_whole
    assert (weights.source, len(weights.sha256)) == (path.name, 64)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", KEYS)
def test_weights_are_found_under_the_names_of_training_scripts(
    tmp_path: Path, key: str, prefix: str
) -> None:
    path, state = tmp_path / "checkpoint.pth", trained().state_dict()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, key: wrapped, "optimizer": {"lr": 0.1, "state": {}}}, path)
    model = build_classifier("resnet8", 4)
    load_file(model, path, 4)
    assert_loaded(model, state)


def test_numpy_scalars_beside_the_weights_are_read(tmp_path: Path) -> None:
    path, state = tmp_path / "model.th", trained().state_dict()
    scalars = [np.float64(93.2), np.float32(0.5), np.int64(3), np.bool_(True)]
    torch.save({"state_dict": state, "best_prec1": scalars}, path)
    assert read_state(path).keys() == state.keys()


def test_files_without_counts_of_batches_are_loaded() -> None:
    state = trained().state_dict()
    old = {name: part for name, part in state.items() if "num_batches" not in name}
    assert load_state(build_classifier("resnet8", 4), old, 4, "old.pth") == []


def test_a_model_file_of_raygkd_is_loaded(tmp_path: Path) -> None:
    state = trained().state_dict()
    file = ModelFile(
        name="resnet8",
        class_names=("a", "b", "c", "d"),
        image_size=(8, 8),
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
        state_dict=state,
        scores={},
        config="",
    )
    save_model_file(tmp_path / "model.pt", file)
    model = build_classifier("resnet8", 4)
    weights = load_classifier(model, "resnet8", 4, str(tmp_path / "model.pt"))
    assert weights is not None
    assert weights.is_whole
    assert_loaded(model, state)


def test_another_number_of_classes_leaves_the_last_layer_alone(tmp_path: Path) -> None:
    path = tmp_path / "imagenet.pth"
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, path)
    model = build_classifier("torchvision:resnet18", 7)
    head = model.fc.weight.detach().clone()
    weights = load_classifier(model, "torchvision:resnet18", 7, str(path))
    assert weights is not None
    assert weights.new_layers == ("fc",)
    assert "fc starts at random for this number of classes" in str(weights)
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_a_backbone_without_a_last_layer_gets_a_new_one() -> None:
    state = {n: t for n, t in trained().state_dict().items() if not n.startswith("classifier.")}
    assert load_state(build_classifier("resnet8", 9), state, 9, "dino.pth") == ["classifier"]


def test_old_names_and_auxiliary_heads_of_torchvision_are_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.densenet121(num_classes=3).state_dict()
    new = r"(denselayer\d+\.(?:norm|conv))([12])\."
    old = {re.sub(new, r"\1.\2.", name): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet.pth")
    model = build_classifier("torchvision:densenet121", 3)
    load_classifier(model, "torchvision:densenet121", 3, str(tmp_path / "densenet.pth"))
    assert_loaded(model, state)
    whole = torchvision.models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    torch.save(whole.state_dict(), tmp_path / "googlenet.pth")
    model = build_classifier("torchvision:googlenet", 3)
    load_classifier(model, "torchvision:googlenet", 3, str(tmp_path / "googlenet.pth"))
    assert torch.equal(model.fc.weight, whole.fc.weight)


def test_weights_of_another_model_are_refused_with_counts_and_names() -> None:
    torch.manual_seed(0)
    other = build_classifier("resnet14", 4).state_dict()
    own = build_classifier("resnet8", 4)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    found = len(other.keys() - before.keys())
    with pytest.raises(DataError) as caught:
        load_state(own, other, 4, "r14.pth")
    assert f"{found} unexpected (stage1.1." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_loaded(own, before)
    wide = build_classifier("resnet8x4", 4).state_dict()
    with pytest.raises(DataError, match=r"of another shape \(classifier\.weight, stage1\."):
        load_state(own, wide, 4, "wide.pth")
    part = {"stem.0.weight": before["stem.0.weight"]}
    with pytest.raises(DataError, match=r"\d+ missing \(classifier\.bias"):
        load_state(own, part, 4, "part.pth")


class Runs:
    """What creates a file when it is unpickled."""

    def __init__(self, witness: Path):
        self._witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._witness}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_does_not_run(tmp_path: Path, is_zip: bool) -> None:
    witness, path = tmp_path / "ran", tmp_path / "evil.pth"
    contents = {"state_dict": trained().state_dict(), "extra": Runs(witness)}
    torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        DataError, match=r"contains posix\.system, which is not loaded because it could"
    ):
        read_state(path)
    assert not witness.exists()
    path.write_bytes(pickle.dumps(Runs(witness)))
    with pytest.raises(DataError):
        read_state(path)
    assert not witness.exists()
    # the file does run code where it is trusted
    pickle.loads(path.read_bytes())
    assert witness.exists()


def test_settings_of_a_script_beside_the_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": trained().state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(DataError) as caught:
        read_state(path)
    assert "contains argparse.Namespace" in str(caught.value)
    assert "save only its weights: torch.save(torch.load(FILE" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"weights{suffix}", trained().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content, middle = path.read_bytes(), path.stat().st_size // 2
    damaged = [content[:middle], b"", b"no weights"]
    if suffix == ".pth":  # the other has no checksums
        flipped = bytes([content[middle] ^ 255])
        damaged.append(content[:middle] + flipped + content[middle + 1 :])
    for part in damaged:
        path.write_bytes(part)
        with pytest.raises(DataError, match="is damaged, or not a weights file"):
            read_state(path)
    with pytest.raises(DataError, match=r"cannot read .*: no such file; pass a weights file"):
        read_state(tmp_path / f"missing{suffix}")


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch.pth"
    torch.save({"epoch": 3, "loss": 0.5}, path)
    with pytest.raises(DataError, match=r"contains no weights \(epoch, loss\); save them with"):
        read_state(path)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (lambda part: part * float("nan"), "is not finite"),
        (lambda part: part.to(torch.int8), "is of type int8"),
        (lambda part: part.to(torch.complex64), "is of type complex64"),
        (lambda part: part.to_sparse(), "is quantised, sparse, or has no values"),
        (lambda part: part.to("meta"), "is quantised, sparse, or has no values"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(
    tmp_path: Path, broken: Callable[[Tensor], Tensor], problem: str
) -> None:
    state = trained().state_dict()
    state["classifier.weight"] = broken(state["classifier.weight"])
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=f"weights.pth: classifier.weight {problem}"):
        read_state(tmp_path / "weights.pth")


def test_half_precision_is_read(tmp_path: Path) -> None:
    state = trained().state_dict()
    torch.save({name: part.half() for name, part in state.items()}, tmp_path / "weights.pth")
    model = build_classifier("resnet8", 4)
    load_file(model, tmp_path / "weights.pth", 4)
    weight = model.state_dict()["classifier.weight"]
    assert torch.equal(weight, state["classifier.weight"].half().float())


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    contents: dict[str, Any] = {}
    contents["model"] = contents
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"contains no weights \(model\)"):
        read_state(tmp_path / "weights.pth")


def test_names_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    torch.save({"a\nb": 1}, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"contains no weights \('a\\nb'\)"):
        read_state(tmp_path / "weights.pth")


def test_a_file_that_is_cut_off_early_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(trained().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="is damaged, or not a weights file"):
        read_state(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    pipe = tmp_path / f"pipe{suffix}"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=r"cannot read .*: not a regular file; pass"):
        read_state(pipe)
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory; pass"):
        read_state(folder)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    for path in (str(loop), "~no-such-user/weights.pth"):
        with pytest.raises(ConfigError, match=r"is not a usable path: "):
            read_state(path)
