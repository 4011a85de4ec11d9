import copy
import os
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raygkd.assembly.models import new_model
from raygkd.data.spec import ImageSpec
from raygkd.errors import ConfigError, DataError, StorageError
from raygkd.models import (
    FeatureTap,
    ModelFile,
    build_classifier,
    build_from_file,
    check_levels,
    classifier_names,
    count_parameters,
    feature_shapes,
    load_model_file,
    save_model_file,
    stage_modules,
)

NAMES = [
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("resnet8x4", "resnet32x4", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13"),
]

# With 100 classes. resnet20, 56, 110: the CIFAR-100 table of the imgclsmob repository's README.
# resnet32x4, wrn_16_2, wrn_40_2: reports of public projects that train CRD's pairs on CIFAR-100.
# wrn_40_1: 563,930 with 10 classes in a public project, and 65 for each of 90 more. The paper of
# WRN (arXiv 1605.07146) has 0.6 M for 40-1 and 2.2 M for 40-2.
PUBLISHED = {
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
}


def conv(kernel, inputs, outputs):
    return kernel * kernel * inputs * outputs


def resnet_parameters(depth, widths, classes):
    """Arithmetic of arXiv 1512.03385 with projection shortcuts: each convolution has a norm."""
    pairs = (depth - 2) // 6
    total = conv(3, 3, widths[0]) + 2 * widths[0] + (widths[-1] + 1) * classes
    for a, b in pairwise(widths):
        total += conv(3, a, b) + (2 * pairs - 1) * conv(3, b, b) + 2 * pairs * 2 * b
        total += (conv(1, a, b) + 2 * b) if a != b else 0
    return total


def wrn_parameters(depth, widening, classes):
    """Arithmetic of arXiv 1605.07146: a norm before each 3x3 convolution, and one at the end."""
    pairs = (depth - 4) // 6
    widths = [16, 16 * widening, 32 * widening, 64 * widening]
    total = conv(3, 3, 16) + 2 * widths[-1] + (widths[-1] + 1) * classes
    for a, b in pairwise(widths):
        total += conv(3, a, b) + (2 * pairs - 1) * conv(3, b, b)
        total += 2 * a + (2 * pairs - 1) * 2 * b
        total += conv(1, a, b) if a != b else 0
    return total


def vgg_parameters(widths, classes):
    """Arithmetic of VGG with a bias and a norm at each convolution and one linear layer."""
    total = (widths[-1] + 1) * classes
    for a, b in zip([3, *widths], widths):
        total += conv(3, a, b) + 3 * b
    return total


COMPUTED = (
    {f"resnet{d}": resnet_parameters(d, (16, 16, 32, 64), 100) for d in (8, 14, 20, 32, 44, 56)}
    | {"resnet110": resnet_parameters(110, (16, 16, 32, 64), 100)}
    | {f"resnet{d}x4": resnet_parameters(d, (32, 64, 128, 256), 100) for d in (8, 32)}
    | {f"wrn_{d}_{w}": wrn_parameters(d, w, 100) for d, w in ((16, 2), (40, 1), (40, 2))}
    | {"vgg8": vgg_parameters([64, 128, 256, 512, 512], 100)}
    | {"vgg11": vgg_parameters([64, 128, *[256] * 2, *[512] * 4], 100)}
    | {"vgg13": vgg_parameters([*[64] * 2, *[128] * 2, *[256] * 2, *[512] * 4], 100)}
)


def on_meta(name, num_classes=10):
    with torch.device("meta"):
        return build_classifier(name, num_classes)


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# names and weights


def test_names_are_those_of_the_literature():
    # other tests register small models of their own, after these
    assert classifier_names()[: len(NAMES)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_is_that_of_the_architecture_and_the_published_one(name):
    count = count_parameters(on_meta(name, 100))
    assert count == COMPUTED[name]
    assert count == PUBLISHED.get(name, count)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_at_32_pixels(name):
    torch.manual_seed(0)
    model = build_classifier(name, 7)
    levels = list(stage_modules(model))
    logits_BK, features = FeatureTap(model, levels)(torch.randn(2, 3, 32, 32))
    assert logits_BK.shape == (2, 7)
    shapes = {level: tuple(feature.shape[1:]) for level, feature in features.items()}
    assert shapes == feature_shapes(model, levels, (32, 32))
    assert levels == list(range(1, len(levels) + 1))
    for shallow, deep in pairwise(levels):
        assert shapes[shallow][0] <= shapes[deep][0]
        assert shapes[shallow][1] >= shapes[deep][1]
    assert all((feature >= 0).all() and (feature > 0).any() for feature in features.values())
    F.cross_entropy(logits_BK, torch.tensor([0, 6])).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize(
    ("name", "image_size", "sides"),
    [
        ("resnet8", (8, 8), [8, 4, 2]),
        ("resnet8", (64, 64), [64, 32, 16]),
        ("wrn_16_2", (8, 8), [8, 4, 2]),
        ("vgg8", (8, 8), [8, 4, 4, 4, 4]),
        ("vgg8", (32, 32), [32, 16, 8, 4, 4]),
        ("vgg8", (64, 64), [64, 32, 16, 8, 4]),
    ],
)
def test_small_and_larger_images_pass(name, image_size, sides):
    model = build_classifier(name, 10)
    shapes = feature_shapes(model, list(stage_modules(model)), image_size)
    assert [height for _, height, _ in shapes.values()] == sides
    assert model.eval()(torch.randn(1, 3, *image_size)).shape == (1, 10)


@pytest.mark.parametrize("stage", [1, 2])
def test_residual_block_without_its_residual_is_its_activated_shortcut(stage):
    model = build_classifier("resnet8", 10)
    block = model.get_submodule(f"stage{stage}")[0]
    nn.init.zeros_(block.residual[-1].weight)
    features_BCHW = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(features_BCHW), block.shortcut(features_BCHW).relu())
    assert isinstance(block.shortcut, nn.Identity) == (stage == 1)


@pytest.mark.parametrize("name", ["wrn_16_2", "wrn_40_1"])
def test_wide_resnet_is_the_pre_activation_network_of_the_paper(name):
    torch.manual_seed(0)
    model = build_classifier(name, 10).double()
    images_BCHW = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features_BCHW, opening = model.stem(images_BCHW), None
    for stage in (model.stage1, model.stage2, model.stage3):
        *blocks, closing = stage
        for block in blocks:
            activated_BCHW = (opening or block.activation)(features_BCHW)
            shortcut = block.projection(activated_BCHW) if block.projection else features_BCHW
            features_BCHW = shortcut + block.residual(activated_BCHW)
            opening = None
        opening = closing
    expected_BK = model.classifier(opening(features_BCHW).mean((2, 3)))
    torch.testing.assert_close(model(images_BCHW), expected_BK, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "torchvision:mobilenet_v3_small"])
def test_weights_depend_on_the_seed_alone(name):
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(build_classifier(name, 10))
    assert_same_state(models[1], models[0].state_dict())
    assert not torch.equal(next(models[0].parameters()), next(models[2].parameters()))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet9", "'resnet8'"),
        ("resnet18", "'torchvision:resnet18'"),
        ("torchvision:resnet19", "'resnet18'"),
        ("torchvision:fasterrcnn_resnet50_fpn", "known: alexnet"),
    ],
)
def test_unknown_name_is_refused_with_near_ones(name, hint):
    with pytest.raises(ConfigError, match="unknown") as caught:
        build_classifier(name, 10)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_of_a_single_class_are_refused():
    with pytest.raises(ConfigError, match="a class or more, got 0"):
        build_classifier("resnet8", 0)
    alone = ImageSpec(class_names=("cat",), image_size=(8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(
        ConfigError, match="at least 2 classes, but the images have only the class 'cat'"
    ):
        new_model("resnet8", alone)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_come_without_them(name):
    model = on_meta(f"torchvision:{name}")
    logits_BK = model(torch.empty(2, 3, 96, 96, device="meta"))
    assert logits_BK.shape == (2, 10)
    assert not any(path.startswith(("aux", "AuxLogits")) for path, _ in model.named_parameters())


# levels


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v3_small", ["features.1", "features.3", "features.8", "features.12"]),
        ("efficientnet_b0", [f"features.{n}" for n in (1, 2, 3, 5, 8)]),
        (
            "densenet121",
            [f"features.{n}" for n in ("denseblock1", "denseblock2", "denseblock3", "norm5")],
        ),
        ("convnext_tiny", ["features.1", "features.3", "features.5", "features.7"]),
        ("vgg11_bn", [f"features.{n}" for n in (2, 6, 13, 20, 27)]),
        ("vgg13_bn", [f"features.{n}" for n in (5, 12, 19, 26, 33)]),
        ("shufflenet_v2_x0_5", ["stage2", "stage3", "conv5"]),
        ("squeezenet1_1", ["features.4", "features.7", "features.12"]),
        ("googlenet", ["conv3", "inception3b", "inception4e", "inception5b"]),
        ("maxvit_t", ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    ],
)
def test_stages_of_torchvision_models_are_found(name, paths):
    model = on_meta(f"torchvision:{name}")
    assert stage_modules(model) == dict(enumerate(paths, start=1))
    assert not hooks_of(model)


class Unmapped(nn.Sequential):
    """No part of it gives a map."""


def test_model_without_maps_is_refused_and_what_works_is_named():
    model = Unmapped(nn.Flatten(), nn.Linear(3 * 224 * 224, 10))
    with pytest.raises(ConfigError, match=r"no stages and no blocks .* such as kd"):
        stage_modules(model)


class Looped(nn.Module):
    """Calls the children of a list one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])
        self.head = nn.Linear(8, 10)

    def forward(self, features_BCHW):
        for block in self.blocks:
            features_BCHW = block(features_BCHW)
        return self.head(features_BCHW.mean((2, 3)))


def test_stage_inside_a_module_list_is_found():
    assert stage_modules(Looped()) == {1: "blocks.1"}


@pytest.mark.parametrize("level", [0, 4, "2"])
def test_unknown_level_is_refused_with_the_allowed_ones(level):
    with pytest.raises(ConfigError, match=r"student resnet8 has no level .* \(allowed: 1, 2, 3\)"):
        check_levels([1, level], build_classifier("resnet8", 10), "student resnet8")


def test_level_given_twice_is_refused():
    with pytest.raises(ConfigError, match="level 2 of teacher is given more than once"):
        check_levels([2, 2], build_classifier("resnet8", 10), "teacher")


def test_no_level_is_allowed_for_a_model_without_stages():
    assert check_levels([], Unmapped(nn.Flatten()), "teacher") == {}


@pytest.mark.parametrize("name", ["resnet8", "torchvision:mobilenet_v3_small"])
def test_asking_for_shapes_leaves_the_model_as_it_was(name):
    model = build_classifier(name, 10)
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    state = state_of(model)
    random = torch.get_rng_state()
    feature_shapes(model, list(stage_modules(model)), (64, 64))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, state)
    assert not hooks_of(model)


def test_shapes_of_a_model_in_training_are_known_down_to_a_single_position():
    model = on_meta("torchvision:resnet18").train()
    assert feature_shapes(model, [1, 4], (32, 32)) == {1: (64, 8, 8), 4: (512, 1, 1)}


def test_images_too_small_for_a_model_are_refused_and_leave_it_as_it_was():
    model = on_meta("torchvision:vgg11_bn")
    with pytest.raises(ConfigError, match="cannot take images of 8 x 8 pixels") as caught:
        feature_shapes(model, [1], (8, 8))
    assert "\n" not in str(caught.value)
    assert model.training
    assert not hooks_of(model)


# taps


def test_tap_gives_the_outputs_of_the_stages_and_of_the_model():
    model = build_classifier("resnet8", 10).eval()
    images_BCHW = torch.randn(2, 3, 8, 8)
    with FeatureTap(model, [3, 1]) as tap:
        logits_BK, features = tap(images_BCHW)
    assert list(features) == [3, 1]
    first_BCHW = model.stage1(model.stem(images_BCHW))
    assert torch.equal(features[1], first_BCHW)
    assert torch.equal(features[3], model.stage3(model.stage2(first_BCHW)))
    assert torch.equal(logits_BK, model(images_BCHW))


def test_tap_of_a_torchvision_model_gives_the_shapes_foretold():
    model = build_classifier("torchvision:densenet121", 10)
    levels = list(stage_modules(model))
    logits_BK, features = FeatureTap(model, levels)(torch.randn(2, 3, 64, 64))
    shapes = {level: tuple(feature.shape[1:]) for level, feature in features.items()}
    assert shapes == feature_shapes(model, levels, (64, 64))
    sum(feature.square().mean() for feature in features.values()).backward()
    assert logits_BK.shape == (2, 10)


def test_removed_tap_leaves_nothing_behind_and_cannot_be_called():
    model = build_classifier("resnet8", 10).eval()
    state = state_of(model)
    with FeatureTap(model, [1, 2, 3]) as tap:
        assert len(hooks_of(model)) == 3
        tap(torch.zeros(1, 3, 8, 8))
    assert not hooks_of(model)
    assert_same_state(model, state)
    with pytest.raises(RuntimeError, match="removed"):
        tap(torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_calls_beside_the_tap_keep_no_features_even_after_a_failed_one():
    model = build_classifier("resnet8", 10)
    tap = FeatureTap(model, [1])
    with pytest.raises(RuntimeError):
        tap(torch.zeros(1, 4, 8, 8))
    maps = []
    model.stage1.register_forward_hook(lambda _, __, output: maps.append(weakref.ref(output)))
    model(torch.zeros(2, 3, 8, 8))
    assert [kept() for kept in maps] == [None]


def test_tap_without_levels_works_for_models_without_stages():
    model = on_meta("torchvision:vit_b_16")
    logits_BK, features = FeatureTap(model, [])(torch.empty(1, 3, 224, 224, device="meta"))
    assert logits_BK.shape == (1, 10)
    assert features == {}


class Parent(nn.Module):
    """Holds a model and its tap, as a distillation objective does."""

    def __init__(self):
        super().__init__()
        self.student = build_classifier("resnet8", 10)
        self.tap = FeatureTap(self.student, [1, 3])

    def forward(self, images_BCHW):
        logits_BK, features = self.tap(images_BCHW)
        return logits_BK.square().mean() + sum(f.square().mean() for f in features.values())


def test_copy_of_a_tapped_model_has_a_tap_of_its_own():
    parent = Parent()
    twin = copy.deepcopy(parent)
    nn.init.zeros_(parent.student.stage1[0].residual[0].weight)
    images_BCHW = torch.randn(2, 3, 8, 8)
    features, twin_features = (module.tap(images_BCHW)[1] for module in (parent, twin))
    assert not torch.equal(features[1], twin_features[1])
    assert torch.equal(twin_features[1], twin.student.stage1(twin.student.stem(images_BCHW)))


def test_tap_works_inside_a_module_wrapped_in_ddp():
    parent = Parent()
    names = [f"student.{name}" for name, _ in parent.student.named_parameters()]
    assert [name for name, _ in parent.named_parameters()] == names
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(parent)
        for _ in range(2):
            wrapped(torch.randn(2, 3, 8, 8)).backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in parent.parameters())


@pytest.mark.parametrize("whole", [True, False], ids=["function", "model"])
def test_tap_works_compiled(whole):
    parent = Parent().eval()
    images_BCHW = torch.randn(2, 3, 8, 8)
    expected = parent(images_BCHW)
    if whole:
        function = torch.compile(parent, backend="eager", fullgraph=True)
    else:
        parent.student.compile(backend="eager")
        function = parent
    for _ in range(2):
        torch.testing.assert_close(function(images_BCHW), expected)
        parent.student(images_BCHW)


def test_models_compiled_one_after_the_other_have_features_of_their_own():
    for levels in ([2, 3], [1, 2, 3], [], [1]):
        model = build_classifier("resnet8", 10).eval()
        tap = FeatureTap(model, levels)
        images_BCHW = torch.randn(2, 3, 8, 8)
        expected = tap(images_BCHW)
        model.compile(backend="eager")
        torch.testing.assert_close(tap(images_BCHW), expected)


# model files


def example_file(**changes):
    """Return a model and its file, with some of the file's fields changed."""
    model = build_classifier("resnet8", 3)
    contents = {
        "name": "resnet8",
        "class_names": ("cat", "dog", "eel"),
        "image_size": (8, 8),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "state_dict": model.state_dict(),
        "scores": {"val_score": 0.5},
        "config": "seed: 0\n",
    }
    return model, ModelFile(**(contents | changes))


def test_model_file_gives_back_the_model_and_what_is_known_of_it(tmp_path):
    model, model_file = example_file()
    model(torch.randn(4, 3, 8, 8))
    save_model_file(tmp_path / "student.pt", model_file)
    loaded = load_model_file(tmp_path / "student.pt")
    for field in ("name", "class_names", "image_size", "mean", "std", "scores", "config"):
        assert getattr(loaded, field) == getattr(model_file, field)
    rebuilt = build_from_file(loaded)
    assert not rebuilt.training
    assert_same_state(rebuilt, model.state_dict())
    assert os.listdir(tmp_path) == ["student.pt"]


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "student.pt"
    save_model_file(path, example_file()[1])
    old = path.read_bytes()
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_model_file(path, example_file(config=lambda: None)[1])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["student.pt"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_file_that_cannot_be_written_is_reported(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=rf"cannot write .*{folder}/student.pt: N"):
        save_model_file(tmp_path / folder / "student.pt", example_file()[1])


def write_truncated(path):
    save_model_file(path, example_file()[1])
    path.write_bytes(path.read_bytes()[:5000])


def write_flipped(path):
    """Change one byte in the middle of the weights."""
    save_model_file(path, example_file()[1])
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    path.write_bytes(contents)


def write_incomplete(path):
    torch.save({"format": "raygkd model 1", "name": "resnet8"}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot read model file .*No such file"),
        (lambda path: path.mkdir(), "cannot read model file .*Is a directory"),
        (lambda path: path.write_bytes(b""), "is damaged, or not a model file"),
        (lambda path: path.write_text("name: resnet8\n" * 9), "is damaged, or not a model file"),
        (lambda path: path.write_bytes(pickle.dumps(os.getcwd)), "is damaged, or not a model file"),
        (lambda path: torch.save([1], path), "is not a model file of this version"),
        (lambda path: torch.save(nn.Linear(1, 1), path), "is damaged, or not a model file"),
        (lambda path: torch.save({"state_dict": {}}, path), "is not a model file of this version"),
        (write_truncated, "is damaged, or not a model file"),
        (write_flipped, "is damaged, or not a model file"),
        (write_incomplete, "lacks class_names, image_size"),
    ],
)
def test_wrong_files_give_one_line_that_names_them(tmp_path, write, message):
    path = tmp_path / "wrong.pt"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        load_model_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"name": "resnet14"}, {"class_names": ("cat", "dog")}])
def test_weights_of_another_model_are_refused(change):
    with pytest.raises(DataError, match="do not fit"):
        build_from_file(example_file(**change)[1])


def test_file_with_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="unknown classifier 'resnet9'"):
        build_from_file(example_file(name="resnet9")[1])
