"""Which settings have an effect, by the method, schedule, data set and search of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from raygkd.assembly.methods import reads_setting
from raygkd.config import INT8_COSTS, Config, flag, given, settings
from raygkd.config.search_space import Dimension
from raygkd.errors import ConfigError
from raygkd.registry import DATASETS, either, entry_name

Needs = tuple[str, Callable[[Config], bool]]


def _of_dataset(names: Sequence[str]) -> Needs:
    return f"--dataset {either(names)}", lambda config: entry_name(config.data.dataset) in names


_MULTISTEP: Needs = ("--schedule multistep", lambda config: config.optim.schedule == "multistep")
_STOPPED: Needs = ("a --scheduler", lambda config: config.search.scheduler != "none")
_PER_IMAGE: Needs = ("--graphs image", lambda config: config.method.graphs == "image")
# setting -> what it needs, in words and as a test
NEEDS: Mapping[str, Needs] = {
    "milestones": _MULTISTEP,
    "lr_decay": _MULTISTEP,
    "years": _of_dataset(["voc"]),
    "download": _of_dataset(DATASETS.names_with("can_fetch")),
    "grace_period": _STOPPED,
    "reduction_factor": _STOPPED,
    "spectral_mode": _PER_IMAGE,
    "attention": _PER_IMAGE,
    "weights": _PER_IMAGE,
    "budget_of": (
        "--max-mb, --max-latency-ms, or mb or latency in --objective",
        lambda config: bool(
            set(INT8_COSTS.values()) & {*config.search.limits, *config.search.aims}
        ),
    ),
    "latency_threads": (
        "--max-latency-ms, or latency in --objective",
        lambda config: (
            config.search.max_latency_ms is not None or "latency" in config.search.objective
        ),
    ),
}


def check_applies(command: str, config: Config, space: Sequence[Dimension] = ()) -> None:
    """Refuse settings that would change nothing.

    Settings that have their default value pass, wherever they were given.

    Args:
        command: name of the command.
        config: its settings.
        space: of a search.

    Raises:
        ConfigError: names every such setting, one per line, and what it needs.
    """
    searched = {dimension.name: dimension for dimension in space}
    methods = _methods(command, config, searched)
    known = settings()
    problems = []
    for name in [name for name in known if name in given(config) or name in searched]:
        section, owner = known[name][0], name.rpartition(".")[0]
        where = f"search space: {name}" if name in searched else flag(name)
        if section == "method" and methods and not any(reads_setting(m, name) for m in methods):
            problems.append(f"{where}: has no effect on --method {', '.join(methods)}; omit it")
        elif section == "data" and owner and owner != entry_name(config.data.dataset):
            problems.append(f"{where}: has no effect on --dataset {config.data.dataset}; omit it")
        elif name in NEEDS and not {"schedule", "graphs"} & searched.keys():
            words, holds = NEEDS[name]
            if not holds(config):
                problems.append(f"{where}: has no effect without {words}; omit it")
    if problems:
        raise ConfigError("\n".join(problems))


def _methods(command: str, config: Config, searched: Mapping[str, Dimension]) -> tuple[str, ...]:
    """Return the methods of a command's trainings; () if those follow from the images."""
    if command == "teacher":
        return ()
    if "method" in searched:
        return searched["method"].values
    if config.compare.methods is not None:
        return config.compare.methods
    return () if command == "compare" else (config.method.method,)
