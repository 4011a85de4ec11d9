"""Seconds side by side and bytes at their peak."""

from __future__ import annotations

import time

import torch
from small_runs import CPU, make_training, random_batch, random_stream
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from raygkd.engine import training_step
from raygkd.engine.measure import Function, Timings, interleaved, peak_bytes, state_bytes

FLOAT = 4


def allocated_at_peak(function: Function) -> int:
    """Return what ``peak_bytes`` does, as the allocator reports it to torch's profiler."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
        with record_function("measured"):
            function()
    kineto = profiled.profiler
    assert kineto is not None
    events = sorted(kineto.kineto_results.events(), key=lambda event: event.start_ns())
    alive = before = peak = 0
    for event in events:
        alive += event.nbytes() if event.name() == "[memory]" else 0
        if event.name() == "measured":
            before = peak = alive
        peak = max(peak, alive)
    return peak - before


def test_functions_take_turns_and_every_other_round_is_the_other_way_round():
    calls: list[str] = []
    timings = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(rounds) for name, rounds in timings.seconds.items()} == {"a": 3, "b": 3}


def test_short_functions_are_called_as_often_as_their_time_needs_and_counted_by_the_call():
    calls = {"fast": 0, "slow": 0}

    def work(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    timings = interleaved(
        {"fast": lambda: work("fast", 0.002), "slow": lambda: work("slow", 0.3)},
        2,
        min_seconds=0.2,
    )
    assert calls["slow"] == 3
    # two hundred on a quiet machine, fewer where a short sleep takes long
    assert calls["fast"] > 7
    assert 0.002 <= timings.medians["fast"] < 0.2
    assert timings.ratio("slow", to="fast") > 1.5


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_either_side():
    timings = Timings({"a": [2.0, 9.0, 40.0], "b": [1.0, 3.0, 10.0]})
    assert timings.medians == {"a": 9.0, "b": 3.0}
    assert timings.ratios("a", to="b") == [2.0, 3.0, 4.0]
    assert Timings({"a": [2.0, 90.0, 30.0], "b": [1.0, 30.0, 10.0]}).ratio("a", to="b") == 3.0


def test_peak_is_what_lives_at_the_same_time():
    kept: list[torch.Tensor] = []

    def work() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        # a view is no memory of its own
        third = second.view(10, 100).mul(2)
        kept[:] = [third[:, :50]]

    # what was kept of the call before is alive until the end
    assert peak_bytes(work, CPU) == 2 * 1000 * FLOAT


def test_what_a_call_frees_of_the_call_before_is_subtracted():
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.clear()
        kept.append(torch.ones(1000))

    assert peak_bytes(work, CPU) == 0


def test_memory_of_backward_is_counted():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(4)))
    images = torch.ones(1000, 100)

    def step() -> None:
        model.zero_grad()
        model(images).square().mean().backward()

    reference = allocated_at_peak(step)
    assert reference > 4 * 1000 * 100 * FLOAT
    assert abs(peak_bytes(step, CPU) - reference) < 0.01 * reference


def test_peak_of_a_training_step_is_that_of_the_allocator():
    for method in ("graph", "kd"):
        training, batch = make_training(random_stream(), method=method), random_batch()
        training_step(training, batch)

        def step(training=training, batch=batch) -> None:
            training_step(training, batch)

        reference = allocated_at_peak(step)
        # the allocator also knows what an operator needs inside, which depends on the processor
        assert 0.8 * reference < peak_bytes(step, CPU) <= reference


def test_state_is_parameters_gradients_buffers_and_the_optimisers():
    training = make_training(random_stream(), method="kd")
    assert training.teacher is not None
    student = sum(p.numel() * FLOAT for p in training.objective.parameters())
    buffers = sum(b.nbytes for b in training.objective.buffers())
    teacher = sum(t.nbytes for t in training.teacher.model.state_dict().values())
    assert state_bytes(training) == student + buffers + teacher
    training_step(training, random_batch())
    # gradients and momentum
    assert state_bytes(training) == 3 * student + buffers + teacher
