"""The settings of searches and comparisons, and of what a training is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from raygkd.registry import METHODS, option

PRESETS = ("ablation",)
# cost of a student, of which less is better -> the setting that limits it
COSTS = {
    "params": "max_params",
    "mb": "max_mb",
    "mflops": "max_mflops",
    "memory": "max_memory_mb",
    "latency": "max_latency_ms",
}
# cost -> that of the model in 8 bits, which --budget-of int8 counts instead
INT8_COSTS = {"mb": "int8_mb", "latency": "int8_latency"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What one training starts from and is compared with (used by ``raygkd train``)."""

    control: bool = option(
        False,
        "also train the same student without the teacher, and report whether distillation "
        "improves it",
    )
    start_from: str | None = option(
        None,
        "a finished run of train, tune or compare, whose student is distilled again in 8 bits, "
        "with the run's settings and teacher, a tenth of its epochs and a tenth of its learning "
        "rate, unless options say otherwise; needs --quantize",
    )
    quantize: str | None = option(
        None,
        "train the student of --start-from with its weights and activations rounded to 8 bits, as "
        "'raygkd export --quantize int8' then writes them; for classifiers; needs the extra export",
        choices=("int8",),
    )


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search over students and settings (used by ``raygkd tune``)."""

    trials: int = option(8, "number of trials", minimum=1)
    max_concurrent: int | None = option(
        None, "maximum number of trials at a time [default: as many as fit]", minimum=1
    )
    searcher: str = option(
        "random",
        "how settings are drawn: at random, or from the scores of earlier trials, and their costs "
        "if --objective has some (tpe: Optuna's tree-structured Parzen estimator)",
        choices=("random", "tpe"),
    )
    scheduler: str = option(
        "asha",
        "early stopping of trials; asha: stop those that are behind at a rung; hyperband: the same "
        "with several grace periods, each for a share of the trials; none: stop no trial",
        choices=("asha", "hyperband", "none"),
    )
    grace_period: int = option(
        1, "epochs that every trial trains before it can be stopped", minimum=1
    )
    reduction_factor: int = option(3, "one in this many trials continues past each rung", minimum=2)
    space: str | None = option(
        None,
        "YAML file that replaces the search space; an entry is 'lr: {loguniform: [0.02, 0.2]}'",
    )
    students: tuple[str, ...] | None = option(
        None,
        "students to choose from, as in --student; a trial is stopped early only if it is behind "
        "others of the same student [default: --student alone]",
    )
    objective: tuple[str, ...] = option(
        ("score",),
        f"aims by which --students are compared: score, which always counts, and costs "
        f"({', '.join(COSTS)}); the search marks the students that no other one beats in all aims",
        choices=("score", *COSTS),
    )
    max_params: int | None = option(
        None, "maximum number of parameters of a student; larger ones are not trained", minimum=1
    )
    max_mb: float | None = option(
        None, "maximum size of a student's float32 weights, in MB", above=0.0
    )
    max_mflops: float | None = option(
        None,
        "maximum number of floating-point operations of a student for one image, in millions",
        above=0.0,
    )
    max_memory_mb: float | None = option(
        None,
        "maximum memory of a student for one image, in MB: its float32 weights and the peak of its "
        "activations, computed operation by operation",
        above=0.0,
    )
    max_latency_ms: float | None = option(
        None,
        "maximum latency of a student for one image in ONNX Runtime on this machine's CPU, in "
        "milliseconds (median; needs the extra export)",
        above=0.0,
    )
    budget_of: str = option(
        "float",
        "model whose size and latency --max-mb, --max-latency-ms and --objective mean: the student "
        "in float, or the file that 'raygkd export --quantize int8' writes (needs the extra "
        "export); tables have both",
        choices=("float", "int8"),
    )
    latency_threads: int = option(
        1, "threads with which the latency of students is measured", minimum=1
    )
    time_budget: str | None = option(
        None,
        "end the trials this long after the start of the command, such as 90s, 30m or 2h; then the "
        "student alone is trained, and the models are scored [default: no limit]",
    )
    warm_start: str | None = option(
        None,
        "an earlier search: the folder of its run, or an output folder for its newest search; its "
        "three best trials come first [default: the default settings and kd come first]",
    )
    repeat: int = option(
        0,
        "number of other seeds with which to retrain the best settings, the student alone and "
        "logit distillation; mean and standard deviation on the test split are reported",
        minimum=0,
    )

    def counted(self, cost: str) -> str:
        """Return the cost that limits and aims mean by a name of ``COSTS``."""
        return INT8_COSTS.get(cost, cost) if self.budget_of == "int8" else cost

    @property
    def limits(self) -> dict[str, tuple[str, float]]:
        """The limits that are given: cost -> the setting, and its value."""
        given = {cost: (name, getattr(self, name)) for cost, name in COSTS.items()}
        return {self.counted(cost): of for cost, of in given.items() if of[1] is not None}

    @property
    def aims(self) -> tuple[str, ...]:
        """The costs among the aims."""
        return tuple(self.counted(aim) for aim in self.objective if aim != "score")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The methods to compare (used by ``raygkd compare``), or to search (``raygkd tune``)."""

    methods: tuple[str, ...] | None = option(
        None,
        "methods to compare, or for tune to choose from, as in --method [default: all that suit "
        "the images; for tune --method alone]",
        choices=METHODS.names,
    )
    preset: str | None = option(
        None,
        "a predefined list, instead of --methods; ablation: parts and settings of the graph "
        "method, one by one",
        choices=PRESETS,
    )
    seeds: int = option(3, "seeds per method, starting at --seed", minimum=1)
