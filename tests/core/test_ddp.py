"""Two ranks under DDP: real processes, real gloo.

One pair of processes runs every scenario, because starting one takes seconds; each test looks at
what the ranks found.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_detections import SCENES, Oracle, detection_training, prepare_scenes
from small_runs import (
    TIMES,
    TensorStream,
    curve,
    make_training,
    random_batch,
    random_stream,
    same,
    weights,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from raygkd.data.parquet import ImageTable, open_table
from raygkd.engine import (
    Training,
    check_terms,
    evaluate,
    read_checkpoint,
    restore,
    run_epoch,
    save_checkpoint,
    training_step,
)
from raygkd.engine.step import optimiser_step
from raygkd.errors import ConfigError, DataError, Diverged, Stopped
from raygkd.losses import SPECTRAL_MODES

RANKS = 2
OTHER_LOSSES = ("trg", "prg", "graph-metrics", "graph+metrics")
TIMEOUT = timedelta(seconds=60)
Result = dict[str, Any]


# What the ranks run


def updates(training: Training, *batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the change of every parameter by one step with fixed normalisation statistics."""
    before = {name: p.detach().clone() for name, p in training.objective.named_parameters()}
    training.objective.eval()
    optimiser_step(training, batches)
    return {name: p.detach() - before[name] for name, p in training.objective.named_parameters()}


def step_of_mode(mode: str, batch: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return the updates of one step of graph+kd in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return updates(make_training(random_stream(), spectral_mode=mode, **options), batch)
    finally:
        torch.set_default_dtype(torch.float32)


def ddp_training(rank: int, digits: ImageTable, **settings: Any) -> Training:
    """Return a run of one of the ranks on the digits."""
    return make_training(
        digits, rank=rank, world_size=RANKS, parallel=DistributedDataParallel, **settings
    )


def scenario_step(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Each rank steps on its half of a batch."""
    half = {name: tensor[rank::RANKS] for name, tensor in random_batch().items()}
    return {
        mode: step_of_mode(mode, half, rank=rank, parallel=DistributedDataParallel)
        for mode in SPECTRAL_MODES
    }


def scenario_accumulation(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Each rank steps on two quarters of a batch; the gradients are exchanged once."""
    exchanged: list[int] = []

    def parallel(module: nn.Module) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(module)
        wrapped.register_comm_hook(
            None,
            lambda _, bucket: (
                exchanged.append(bucket.index()) or default_hooks.allreduce_hook(None, bucket)
            ),
        )
        return wrapped

    torch.set_default_dtype(torch.float64)
    try:
        training = make_training(random_stream(), rank=rank, parallel=parallel)
        batch = random_batch()
        quarters = [
            {name: tensor[part :: 2 * RANKS] for name, tensor in batch.items()}
            for part in (rank, rank + RANKS)
        ]
        return {"updates": updates(training, *quarters), "exchanged": exchanged}
    finally:
        torch.set_default_dtype(torch.float32)


def scenario_recipe(rank: int, digits: ImageTable, folder: Path) -> Result:
    """All parts of a recipe, interrupted in the second epoch and resumed."""
    settings = {"method": "dkd", "batch_size": 32, "mixup": 0.4, "cutmix": 1.0, "ema": 0.8}
    settings |= {"accumulate": 2, "patience": 2, "label_smoothing": 0.1}
    whole = ddp_training(rank, digits, **settings)
    expected = curve(whole)
    stopped = ddp_training(rank, digits, **settings)
    run_epoch(stopped)
    with contextlib.suppress(Stopped):
        run_epoch(stopped, lambda: True)
    assert stopped.part is not None
    save_checkpoint(folder / "recipe.pt", stopped)
    dist.barrier()
    resumed = ddp_training(rank, digits, **settings)
    restore(resumed, read_checkpoint(folder / "recipe.pt"))
    return {
        "metrics": expected[1:],
        "weights": weights(whole.model),
        "resumed_metrics": curve(resumed),
        "resumed_weights": weights(resumed.model),
    }


def scenario_epochs(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Two epochs, and the same with a break after the first."""
    whole = ddp_training(rank, digits)
    metrics = curve(whole)
    broken_off = ddp_training(rank, digits)
    run_epoch(broken_off)
    save_checkpoint(folder / "checkpoint.pt", broken_off)
    dist.barrier()
    torch.manual_seed(1000 + rank)
    resumed = ddp_training(rank, digits)
    restore(resumed, read_checkpoint(folder / "checkpoint.pt"))
    rng = torch.get_rng_state()
    return {
        "metrics": metrics,
        "weights": weights(whole.objective),
        "restored_rng": rng,
        "resumed_metrics": curve(resumed),
        "resumed_weights": weights(resumed.objective),
    }


def scenario_stop(rank: int, digits: ImageTable, folder: Path) -> Result:
    """One rank is asked to stop after its first step; then all go on from the checkpoint."""
    whole = ddp_training(rank, digits)
    expected = curve(whole)
    stopped = ddp_training(rank, digits)
    with contextlib.suppress(Stopped):
        run_epoch(stopped, lambda: rank == 1)
    assert stopped.part is not None
    save_checkpoint(folder / "stopped.pt", stopped)
    dist.barrier()
    resumed = ddp_training(rank, digits)
    restore(resumed, read_checkpoint(folder / "stopped.pt"))
    return {
        "steps": stopped.part.steps,
        "metrics": expected,
        "weights": weights(whole.objective),
        "resumed_metrics": curve(resumed),
        "resumed_weights": weights(resumed.objective),
    }


def scenario_evaluation(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Train on different images, so that statistics differ, and score the validation split."""
    training = ddp_training(rank, digits, method="none")
    for batch in training.stream.train_batches(0):
        training_step(training, batch)
    before = weights(training.objective.student)
    scores = evaluate(training, "val")
    save_checkpoint(folder / "evaluated.pt", training)
    rows = [batch["row"] for batch in training.stream.eval_batches("val")]
    return {"before": before, "scores": scores, "rows": torch.cat(rows)}


class BrokenEpoch(TensorStream):
    """A stream whose last batch of one epoch is not finite."""

    def __init__(self, epoch: int):
        super().__init__([random_batch(seed, rows=16) for seed in range(2)])
        self.epoch = epoch

    def train_batches(self, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        first, last = self.batches
        if epoch == self.epoch:
            last = {**last, "image": torch.full_like(last["image"].float(), math.nan)}
        yield from (first, last)


def scenario_divergence(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Rank 1 alone meets an image that is not finite, in the last step of the second epoch."""
    stream = BrokenEpoch(epoch=1) if rank == 1 else random_stream(2)
    training = make_training(stream, rank=rank, parallel=DistributedDataParallel, method="none")
    try:
        curve(training)
    except Diverged as error:
        return {"error": str(error), "epoch": training.epoch}
    return {"error": None, "epoch": training.epoch}


def scenario_check(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Rank 1 alone starts with a batch that is not finite."""
    training = make_training(random_stream(), rank=rank, parallel=DistributedDataParallel)
    norms = check_terms(training, random_batch(rank))
    batch = random_batch()
    if rank == 1:
        batch["image"] = torch.full_like(batch["image"].float(), math.nan)
    try:
        check_terms(training, batch)
    except ConfigError as error:
        return {"norms": norms, "error": str(error)}
    return {"norms": norms, "error": None}


def noisy_scores(training: Training) -> dict[str, Any]:
    """Return the scores of boxes that are nearly right."""
    batches = training.stream.eval_batches("val")
    return training.task.score(Oracle(noise=2.0), batches, lambda batch: batch)


def scenario_detection(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Train a detector on different scenes, on some ranks without any box, and score it."""
    table = open_table(str(folder / "scenes"))
    training = detection_training(
        table, rank=rank, world_size=RANKS, parallel=DistributedDataParallel
    )
    batch = next(iter(training.stream.train_batches(0)))
    if rank == 1:
        batch = {**batch, "classes": torch.full_like(batch["classes"], -1)}
    training_step(training, batch)
    run_epoch(training)
    save_checkpoint(folder / "detector.pt", training)
    return {
        "weights": weights(training.objective),
        "scores": evaluate(training, "val"),
        "noisy": noisy_scores(training),
        "images": sum(len(batch["row"]) for batch in training.stream.eval_batches("val")),
    }


def scenario_losses(rank: int, digits: ImageTable, folder: Path) -> Result:
    """Each rank steps on images of its own, with losses that have parts outside the student."""
    found = {}
    for method in OTHER_LOSSES:
        training = make_training(
            random_stream(1), rank=rank, parallel=DistributedDataParallel, method=method
        )
        training_step(training, random_batch(rank))
        training_step(training, random_batch(RANKS + rank))
        found[method] = weights(training.objective)
    return found


SCENARIOS = {
    "step": scenario_step,
    "accumulation": scenario_accumulation,
    "recipe": scenario_recipe,
    "epochs": scenario_epochs,
    "stop": scenario_stop,
    "evaluation": scenario_evaluation,
    "divergence": scenario_divergence,
    "check": scenario_check,
    "detection": scenario_detection,
    "losses": scenario_losses,
}


def run_rank(rank: int, digits: ImageTable, folder: Path) -> None:
    """Run all scenarios as one rank; the results are left in a file."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=RANKS,
        timeout=TIMEOUT,
    )
    results = {name: scenario(rank, digits, folder) for name, scenario in SCENARIOS.items()}
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


# What they must find


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(digits: ImageTable, folder: Path) -> list[Result]:
    """Return the results of both ranks."""
    prepare_scenes(folder / "scenes")
    mp.spawn(run_rank, (digits, folder), nprocs=RANKS)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("mode", SPECTRAL_MODES)
def test_step_over_two_halves_equals_step_over_the_whole_batch(ranks: list[Result], mode: str):
    """To 1e-6 of each parameter's change: float64, but for the cross-entropy in float32."""
    whole = step_of_mode(mode, random_batch())
    assert any(name.startswith("graph.adapters") for name in whole)
    for rank in range(RANKS):
        parts = ranks[rank]["step"][mode]
        assert parts.keys() == whole.keys()
        for name, change in whole.items():
            assert change.any(), name
            assert (parts[name] - change).norm() < 1e-6 * change.norm(), name


def test_step_over_four_quarters_equals_step_over_the_whole_batch(ranks: list[Result]):
    whole = step_of_mode(SPECTRAL_MODES[0], random_batch())
    for rank in range(RANKS):
        parts = ranks[rank]["accumulation"]["updates"]
        for name, change in whole.items():
            assert (parts[name] - change).norm() < 1e-6 * change.norm(), name
        exchanged = ranks[rank]["accumulation"]["exchanged"]
        assert len(exchanged) == len(set(exchanged)) > 0


def test_ranks_with_all_parts_of_a_recipe_go_on_as_without_a_break(ranks: list[Result]):
    for result in ranks:
        recipe = result["recipe"]
        assert recipe["resumed_metrics"] == recipe["metrics"]
    first = ranks[0]["recipe"]
    assert same(first["resumed_weights"], first["weights"])


def test_ranks_hold_equal_weights_after_several_steps(ranks: list[Result]):
    first, second = (result["epochs"]["weights"] for result in ranks)
    assert same(first, second)
    untrained = weights(make_training(random_stream()).objective)
    assert not any(torch.equal(first[name], untrained[name]) for name in untrained)


@pytest.mark.parametrize("method", OTHER_LOSSES)
def test_ranks_hold_equal_weights_of_every_part_of_a_loss(ranks: list[Result], method: str):
    first, second = (
        {name: tensor for name, tensor in rank["losses"][method].items() if "running" not in name}
        for rank in ranks
    )
    assert same(first, second)
    assert any(not name.startswith("student.") for name in first) == (method != "trg")


def test_metrics_of_an_epoch_are_equal_on_all_ranks(ranks: list[Result]):
    first, second = (result["epochs"]["metrics"] for result in ranks)
    assert first == second
    assert [metrics["epoch"] for metrics in first] == [1, 2]
    assert not set(TIMES) & first[0].keys()


def test_resumed_ranks_go_on_as_without_a_break(ranks: list[Result]):
    for result in ranks:
        epochs = result["epochs"]
        assert epochs["resumed_metrics"] == epochs["metrics"][1:]
        assert same(epochs["resumed_weights"], epochs["weights"])


def test_ranks_stop_after_the_same_step_and_go_on_as_without_a_break(ranks: list[Result]):
    stops = [result["stop"] for result in ranks]
    # what one rank is asked after its first step, all know after the second
    assert [stop["steps"] for stop in stops] == [2] * RANKS
    for stop in stops:
        assert stop["resumed_metrics"] == stop["metrics"]
        assert same(stop["resumed_weights"], stop["weights"])


def test_part_of_an_epoch_is_refused_by_another_number_of_ranks(
    ranks: list[Result], digits: ImageTable, folder: Path
):
    alone = make_training(digits)
    with pytest.raises(DataError, match=r"in the middle of an epoch by 2 worker.* not 1$"):
        restore(alone, read_checkpoint(folder / "stopped.pt"))


def test_checkpoint_holds_the_random_state_of_every_rank(ranks: list[Result], folder: Path):
    saved = read_checkpoint(folder / "checkpoint.pt")["rng"]
    assert len(saved) == RANKS
    assert not torch.equal(saved[0]["cpu"], saved[1]["cpu"])
    for rank in range(RANKS):
        assert torch.equal(ranks[rank]["epochs"]["restored_rng"], saved[rank]["cpu"])


def test_ranks_score_every_image_once_with_one_model(
    ranks: list[Result], digits: ImageTable, folder: Path
):
    first, second = (result["evaluation"] for result in ranks)
    assert not same(first["before"], second["before"])
    assert first["scores"] == second["scores"]

    alone = make_training(digits, method="none")
    restore(alone, read_checkpoint(folder / "evaluated.pt"))
    expected = torch.cat([batch["row"] for batch in alone.stream.eval_batches("val")])
    rows = torch.cat([first["rows"], second["rows"]])
    assert torch.equal(rows.sort().values, expected)
    assert first["scores"] == pytest.approx(evaluate(alone, "val"), rel=1e-6)


def test_ranks_score_a_detector_as_one_process_does(ranks: list[Result], folder: Path):
    first, second = (result["detection"] for result in ranks)
    assert same(first["weights"], second["weights"])
    assert {first["images"], second["images"]} == {SCENES["val"] // 2, SCENES["val"] // 2 + 1}
    assert first["scores"] == second["scores"]
    assert first["noisy"] == second["noisy"]
    assert 0.1 < first["noisy"]["map"] < 0.9

    alone = detection_training(open_table(str(folder / "scenes")))
    restore(alone, read_checkpoint(folder / "detector.pt"))
    assert first["scores"] == pytest.approx(evaluate(alone, "val"), rel=1e-6)
    assert first["noisy"] == noisy_scores(alone)


def test_divergence_of_one_rank_is_raised_on_all(ranks: list[Result]):
    for result in ranks:
        assert result["divergence"]["error"].startswith("loss 'task' is not finite in epoch 2")
        assert result["divergence"]["epoch"] == 1


def test_check_of_terms_comes_to_one_end_on_all_ranks(ranks: list[Result]):
    first, second = (result["check"] for result in ranks)
    assert first == second
    assert first["error"].startswith("loss term 'task' is nan")


def test_gradient_norms_are_averaged_over_ranks(ranks: list[Result]):
    training = make_training(random_stream())
    parts = [check_terms(training, random_batch(rank)) for rank in range(RANKS)]
    means = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert ranks[0]["check"]["norms"] == pytest.approx(means, rel=1e-6)
