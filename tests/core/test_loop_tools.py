"""``raygkd.Matching`` with mixed precision, compilers, checkpointing, DDP and Lightning."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import LEVELS, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import raygkd
from raygkd.errors import ConfigError

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_automatic_mixed_precision(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    teacher, student = pair
    matching = raygkd.Matching(teacher, student, images, levels=LEVELS, gamma=1.0)
    optimizer = torch.optim.SGD([*student.parameters(), *matching.parameters()], 0.05)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=256.0)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype):
            outputs, loss = matching(images)
            total = F.cross_entropy(outputs, labels) + loss
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert losses[-1] < losses[0]


KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("of_teacher", "of_student"), [*itertools.product(KINDS, KINDS)])
def test_models_of_any_precision(
    pair: tuple[Net, Net], images: Tensor, of_teacher: torch.dtype, of_student: torch.dtype
) -> None:
    class Cast(nn.Module):
        def __init__(self, model: nn.Module, dtype: torch.dtype):
            super().__init__()
            self.model, self.dtype = model.to(dtype), dtype

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images.to(self.dtype))

    teacher, student = Cast(pair[0], of_teacher), Cast(pair[1], of_student)
    levels = {"model.body.2": "model.body.3"}
    matching = raygkd.Matching(teacher, student, images, levels=levels, beta=1.0, gamma=1.0)
    matching(images)[1].backward()
    assert student.model.body[0].weight.grad.dtype == of_student
    assert student.model.body[0].weight.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_adapters_are_where_the_images_are(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = (one.cuda() for one in pair)
    matching = raygkd.Matching(teacher, student, images.cuda(), levels=LEVELS)
    assert all(one.is_cuda for one in matching.parameters())
    matching(images.cuda())[1].backward()


def test_compiled_models(pair: tuple[Net, Net], images: Tensor) -> None:
    teacher, student = (one.eval() for one in pair)
    plain = raygkd.Matching(teacher, student, images, levels=LEVELS).eval()
    expected = plain(images)[1].item()
    plain.close()
    torch.compiler.reset()
    compiled = [torch.compile(one, backend="eager") for one in pair]
    matching = raygkd.Matching(*compiled, images, levels=LEVELS).eval()
    for _ in range(2):
        loss = matching(images)[1]
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.body[0].weight.grad.norm() > 0
    matching.close()


def test_a_model_that_was_compiled_and_used_before_is_told(
    pair: tuple[Net, Net], images: Tensor
) -> None:
    torch.compiler.reset()
    teacher, student = pair[0], torch.compile(pair[1].eval(), backend="eager")
    with torch.no_grad():
        student(images)
    told = "compiled and used before its levels were chosen; compile it afterwards, or call torch"
    with pytest.raises(ConfigError, match=told):
        raygkd.Matching(teacher, student, images, levels=LEVELS)
    torch.compiler.reset()
    assert raygkd.Matching(teacher, student, images, levels=LEVELS)(images)[1] > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(
    pair: tuple[Net, Net], images: Tensor, labels: Tensor, use_reentrant: bool
) -> None:
    class Thrifty(Net):
        def forward(self, images: Tensor) -> Tensor:
            found = checkpoint(self.body, images.requires_grad_(), use_reentrant=use_reentrant)
            return self.head(found.mean((2, 3)))

    teacher, student = pair[0], Thrifty()
    matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
    if use_reentrant:
        with pytest.raises(ConfigError, match=r"or run in re-entrant checkpointing; .*use_reent"):
            matching(images)
        return
    expected = copy.deepcopy(student)
    matching(images)[1].backward()
    matching.close()
    plain = Net()
    plain.load_state_dict(expected.state_dict())
    other = raygkd.Matching(teacher, plain, images, levels=LEVELS)
    other(images)[1].backward()
    torch.testing.assert_close(student.body[0].weight.grad, plain.body[0].weight.grad)


WAYS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
sys.path.insert(0, sys.argv[3])
import raygkd
from raygkd.errors import ConfigError
from small_nets import LEVELS, Net

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(5)
images = torch.rand(8, 3, 8, 8)[4 * rank :][:4]


def models():
    torch.manual_seed(0)
    return Net(10), Net(6)


class Pair(nn.Module):
    def __init__(self, student, matching):
        super().__init__()
        self.student, self.matching = student, matching

    def forward(self, images):
        return self.matching(images)


def told(call):
    try:
        call()
    except ConfigError as error:
        assert "\\n" not in str(error) and "class Pair(nn.Module)" in str(error), error
        return
    raise AssertionError("nothing was told")


teacher, student = models()
told(lambda: raygkd.Matching(teacher, DDP(student), images, levels=LEVELS))

teacher, student = models()
beside = DDP(student)
matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
told(lambda: matching(images))

teacher, student = models()
matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
alone = DDP(matching)
told(lambda: alone(images))

teacher, student = models()
pair = Pair(student, raygkd.Matching(teacher, student, images, levels=LEVELS))
wrapped = DDP(pair)
told(lambda: pair(images))
outputs, loss = wrapped(images)
(outputs.square().mean() + loss).backward()
for parameter in pair.parameters():
    both = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
    dist.all_gather(both, parameter.grad)
    assert torch.equal(*both)
    assert both[0].isfinite().all()
del wrapped, alone, beside

# shared by hand
teacher, student = models()
matching = raygkd.Matching(teacher, student, images, levels=LEVELS)
import gc
gc.collect()
matching(images)[1].backward()
dist.barrier()
dist.destroy_process_group()
"""


def test_data_parallel_loops_share_all_gradients_or_are_told(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", WAYS, str(rank)),
                *(str(tmp_path / "store"), str(Path(__file__).parent)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told


def test_lightning(pair: tuple[Net, Net], images: Tensor, labels: Tensor) -> None:
    lightning = pytest.importorskip("lightning")
    losses: list[float] = []

    class Distilled(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            # part of this module, so that Lightning puts it into train mode
            self.teacher, self.student = pair
            self.matching = raygkd.Matching(*pair, images, levels=LEVELS)

        def training_step(self, batch: Any, index: int) -> Tensor:
            outputs, loss = self.matching(batch[0])
            losses.append(loss.item())
            return F.cross_entropy(outputs, batch[1]) + loss

        def validation_step(self, batch: Any, index: int) -> None:
            assert self.matching(batch[0])[1] > 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = [*self.student.parameters(), *self.matching.parameters()]
            return torch.optim.SGD(parameters, 0.05)

    before = copy.deepcopy(pair[0].state_dict())
    loader = torch.utils.data.DataLoader(TensorDataset(images, labels), 8)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=5, log_every_n_steps=1, accumulate_grad_batches=1, **quiet
    )
    trainer.fit(Distilled(), loader, loader)
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    for name, tensor in pair[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name
