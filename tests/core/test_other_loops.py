"""``raygkd.Matching`` in the training loops that people have: what its gradients and modes are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_nets import LEVELS, Net, step
from torch import Tensor, nn

import raygkd
from raygkd.errors import ConfigError
from raygkd.models import FeatureTap, NamedLevels

torch.set_num_threads(1)


def test_the_teacher_stays_in_eval_mode_whatever_is_done_around_it(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    teacher, student = pair
    holder = nn.ModuleDict({"teacher": teacher, "student": student})
    holder["matching"] = matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
    before = copy.deepcopy(teacher.state_dict())
    holder.train()
    assert teacher.training
    losses = {float(matching(images)[1].detach()) for _ in range(3)}
    assert not teacher.training
    assert len(losses) == 1, "dropout is on"
    holder.train()
    step(matching, student, images, labels)
    assert student.training
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_map_is_what_its_module_returned_although_it_is_changed_in_place(
    images: Tensor, is_training: bool, is_compiled: bool
) -> None:
    levels = {"body.0": "body.0", "body.3": "body.3"}
    losses = []
    for inplace in (False, True):
        torch.manual_seed(0)
        teacher, student = Net(10, inplace).eval(), Net(6, inplace).train(is_training)
        matching = raygkd.Matching(teacher, student, images, levels=levels)
        if is_compiled:
            student.compile(backend="eager")
        for _ in range(3):
            torch.manual_seed(2)
            student.zero_grad()
            loss = matching(images)[1]
            loss.backward()
            losses.append((float(loss.detach()), float(student.body[0].weight.grad.norm())))
    for plain, changed in zip(losses[:3], losses[3:], strict=True):
        assert plain == pytest.approx(changed, rel=1e-6)


def test_a_residual_sum_in_place_changes_no_map(images: Tensor) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    wide = F.interpolate(images, 64)
    found = []
    tapped = FeatureTap(NamedLevels(model, ["layer1.0.bn2"], "m"), [1])
    model.layer1[0].bn2.register_forward_hook(lambda _, __, out: found.append(out.clone()))
    for _ in range(2):
        with torch.no_grad():
            features = tapped(wide)[1]
        assert torch.equal(features[1], found[-1])


def test_the_scale_of_the_teachers_maps_does_not_matter(images: Tensor, labels: Tensor) -> None:
    curves = []
    for scale in (1.0, 2.0**-9, 2.0**9):
        torch.manual_seed(0)
        teacher, student = Net(10), Net(6)
        with torch.no_grad():
            teacher.body[3].weight.mul_(scale)
            teacher.body[3].bias.mul_(scale)
        matching = raygkd.Matching(teacher, student, images, levels=LEVELS, beta=1.0, gamma=1.0)
        torch.manual_seed(3)
        curves.append([float(step(matching, student, images, labels)) for _ in range(20)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0] == pytest.approx(curves[2], rel=1e-3)
    assert curves[0][-1] < curves[0][0]


def test_gradients_are_accumulated_over_batches(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    teacher, student = pair
    matching = raygkd.Matching(teacher, student.eval(), images, levels=LEVELS)
    matching.eval()
    parameters = [*student.parameters(), *matching.parameters()]

    def gradients() -> list[Tensor]:
        found = [one.grad.clone() for one in parameters if one.grad is not None]
        for one in parameters:
            one.grad = None
        return found

    matching(images)[1].backward()
    whole = gradients()
    for part in (images[:4], images[4:]):
        (matching(part)[1] / 2).backward()
    torch.testing.assert_close(gradients(), whole, rtol=1e-4, atol=1e-6)


def test_losses_of_several_batches_have_one_backward_pass(
    pair: tuple[Net, Net], images: Tensor
) -> None:
    teacher, student = pair
    found = []
    for accelerated in (True, False):
        matching = raygkd.Matching(
            teacher, student.eval(), images, levels=LEVELS, accelerated=accelerated
        ).eval()
        losses = [matching(part)[1] for part in (images[:4], images[4:])]
        torch.stack(losses).mean().backward()
        found.append(student.body[0].weight.grad)
        student.zero_grad()
        matching.close()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_terms_have_gradients_of_their_own(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = pair
    student.eval()
    settings: dict[str, Any] = {"levels": LEVELS, "beta": 2.0, "gamma": 3.0}
    whole = raygkd.Matching(teacher, student, images, **settings)
    _, loss = whole(images)
    loss.backward()
    weight = student.body[0].weight
    expected, weight.grad = weight.grad, None
    whole.close()
    matching = raygkd.Matching(teacher, student, images, return_terms=True, **settings)
    _, terms = matching(images)
    assert set(terms) == {"vertex", "edge", "spectral"}
    # as GradNorm does
    norms = {
        name: torch.autograd.grad(term, weight, retain_graph=True)[0].norm()
        for name, term in terms.items()
    }
    assert all(norm > 0 for norm in norms.values())
    total = 40.0 * terms["vertex"] + 2.0 * terms["edge"] + 3.0 * terms["spectral"]
    assert total.item() == pytest.approx(loss.item(), rel=1e-5)
    total.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-6)
    total.backward()
    matching.close()


def test_the_plain_path_has_second_derivatives(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = pair
    matching = raygkd.Matching(teacher, student.eval(), images, levels=LEVELS, accelerated=False)
    loss = matching(images)[1]
    weight = student.body[0].weight
    [gradient] = torch.autograd.grad(loss, weight, create_graph=True)
    [second] = torch.autograd.grad(gradient.square().sum(), weight)
    assert second.norm() > 0
    fast = raygkd.Matching(teacher, student, images, levels=LEVELS)
    [gradient] = torch.autograd.grad(fast(images)[1], weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.square().sum().backward()


def test_an_average_of_the_student_is_no_part_of_the_matching(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    teacher, student = pair
    matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
    average = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    first = step(matching, student, images, labels)
    average.update_parameters(student)
    average(images)
    assert step(matching, student, images, labels) != first
    average.update_parameters(student)
    assert len(list(matching.parameters())) == 3


def test_a_frozen_backbone_below_a_level_is_told_and_above_it_trains(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor
) -> None:
    teacher, student = pair
    student.body[:2].requires_grad_(False)
    matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
    before = student.body[2].weight.clone()
    step(matching, student, images, labels)
    assert not torch.equal(student.body[2].weight, before)
    matching.close()
    told = "levels: no gradient reaches the student through 'body.0': its layers are frozen"
    matching = raygkd.Matching(teacher, student, images, levels={"body.0": "body.0"})
    with pytest.raises(ConfigError, match=told):
        matching(images)
    with torch.no_grad():
        assert matching(images)[1] > 0


def test_a_model_cannot_teach_a_part_of_itself(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = pair
    student.head = teacher.head = nn.Linear(10, 5)
    told = r"share 2 parameters \(head.weight\), .* frozen in both; pass copy.deepcopy\(teacher\)"
    with pytest.raises(ConfigError, match=told):
        raygkd.Matching(teacher, student, images, levels=LEVELS)
    assert all(one.requires_grad for one in student.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ["body.0", "body.0"]}, "module 'body.0' of the student is given more than"),
        ({"levels": ["0"]}, "the student Net has no module '0'"),
        ({"dim": 2.5}, "^dim: 2.5 must be a whole number or None$"),
        ({"alpha": "1", "gamma": None}, "^alpha: '1' must be a number; gamma: None must be a num"),
        ({"images": torch.rand(0, 3, 8, 8)}, r"^images: must be a batch .* got \(0, 3, 8, 8\)$"),
        ({"images": torch.rand(3, 8, 8)}, r"^images: must be a batch .* got \(3, 8, 8\)$"),
        ({"images": None}, "^images: must be a batch .* got NoneType$"),
        ({"images": torch.rand(2, 4, 8, 8)}, r"the student Net fails on images of shape \(2, 4, 8"),
    ],
)
def test_arguments_that_cannot_be(
    pair: tuple[Net, Net], images: Tensor, changes: dict[str, Any], message: str
) -> None:
    settings = {"images": images, "levels": LEVELS, **changes}
    with pytest.raises(ConfigError, match=message):
        raygkd.Matching(*pair, **settings)
    matching = raygkd.Matching(*pair, images, levels=LEVELS)
    with pytest.raises(ConfigError, match=r"^images: must be a batch"):
        matching(images[:0])
    assert all(parameter.requires_grad for parameter in pair[1].parameters())


def test_maps_with_channels_last_are_read_as_such() -> None:
    swin = torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=5
    )
    images = torch.rand(2, 3, 32, 64)
    matching = raygkd.Matching(swin, Net(), images, levels={"body.2": "features.3"})
    assert matching.graph.teacher_shapes == {1: (24, 4, 8)}
