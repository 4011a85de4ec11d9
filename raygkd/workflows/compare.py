"""Compare methods on the same images and seeds: ``raygkd compare``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from scipy import stats

from raygkd.assembly.compatibility import check_settings
from raygkd.assembly.derived_configs import student_alone
from raygkd.assembly.matched_levels import level_shapes
from raygkd.assembly.methods import uses_teacher
from raygkd.assembly.student_objective import build_objective
from raygkd.assembly.unlabelled_runs import check_share, check_without_labels
from raygkd.config import (
    LARGEST_SEED,
    Config,
    given_of_entries,
    option_settings,
    to_mapping,
    to_yaml,
    with_settings,
)
from raygkd.data.run_images import Images
from raygkd.errors import ConfigError, UserError
from raygkd.metrics.ranking import rank
from raygkd.metrics.verdict import verdict_metrics
from raygkd.models import ModelFile, save_model_file
from raygkd.rayrun.search_history import Trial
from raygkd.rayrun.step_costs import Costs, costs_of_steps
from raygkd.rayrun.tune_search import TrialResult
from raygkd.report.console import progress
from raygkd.report.seed_figures import draw_seeds
from raygkd.report.tables import comparison_markdown
from raygkd.tracking.tags import DESCRIPTION_TAG
from raygkd.workflows.ablation import Settings, is_baseline, variants
from raygkd.workflows.pair_checks import check_names, check_student, show_pair, teacher_model
from raygkd.workflows.results import (
    model_rows,
    pair_name,
    places,
    test_images,
    test_scores,
    verdict_of,
)
from raygkd.workflows.resume import MODEL
from raygkd.workflows.run_tags import run_tags
from raygkd.workflows.seed_trials import (
    Seeded,
    SeedProgress,
    row,
    scores_of_seeds,
    spread,
    students,
    train_with_seeds,
)
from raygkd.workflows.session import Session, open_session, write_result
from raygkd.workflows.teachers import get_teacher, teacher_facts
from raygkd.workflows.trial_progress import require_a_score

PARENT = "comparison"
RULE = "best mean validation score over the seeds, and its seed with the best score"
# what a run of a comparison has as parameters, so that the UI can set all of them side by side
_SHOWN = [
    *(name for name, (section, _, _) in option_settings().items() if section == "method"),
    "lr",
]


class ComparisonProgress(SeedProgress):
    """Logs the runs of a comparison, each as a child of the run of its method."""

    role = "training"

    def name(self, trial: Trial) -> str:
        """Return the method and the seed of a run."""
        seed, name = self._seeded[trial.number]
        return f"{name} seed {seed}"

    def parent(self, trial: Trial) -> str:
        """Return the tracker's key of the method's run."""
        return method_key(self._seeded[trial.number][1])

    def params(self, trial: Trial) -> Mapping[str, Any]:
        """Return the method's settings, the same names for all."""
        return shown_params(with_settings(self._session.config, trial.params)) | {
            "seed": trial.params["seed"]
        }


def method_key(name: str) -> str:
    """Return the tracker's key of a method's run."""
    return f"method {name}"


def shown_params(config: Config) -> dict[str, Any]:
    """Return the settings by which the runs of a comparison differ."""
    tree = to_mapping(config)
    shown = {name: tree[option_settings()[name][0]][name] for name in _SHOWN}
    return shown | given_of_entries(config)


def compare(config: Config, *, console: Console, resume: Any = None) -> dict[str, Any]:
    """Train methods side by side (``raygkd compare``); return what ``--json`` prints.

    All methods share teacher, images, splits, epochs, optimiser and seeds. Each model is scored
    once on the test split, after all are trained.
    """
    started = time.monotonic()
    check_without_labels(config, PARENT)
    check_names(config)
    compared: dict[str, Settings] = {}

    def check(images: Images) -> dict[str, Any]:
        nonlocal compared
        compared = checked_variants(config, images, console)
        return teacher_facts(config)

    with open_session(config, PARENT, console, resume, check) as session:
        teacher = _begin(session, compared)
        seeds = range(config.optim.seed, config.optim.seed + config.compare.seeds)
        trials = train_with_seeds(
            session, teacher, compared, seeds, session.folder, ComparisonProgress
        )
        require_a_score(trials.values(), ComparisonProgress.role)
        tested = scores_of_seeds(session, trials, ComparisonProgress)
        scores = {seeded: of["score"] for seeded, of in tested.items()}
        costs = step_costs(session, compared, teacher)
        comparison = summary(compared, seeds, trials, scores, costs, session.images.spec.score)
        found = comparison_verdict(session, comparison, tested)
        result = _conclude(session, comparison, trials, teacher, found)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(result, PARENT)
    return result


def checked_variants(config: Config, images: Images, console: Console) -> dict[str, Settings]:
    """Return the variants to compare, name -> settings; print the matched levels.

    Raises:
        ConfigError: variants that cannot be trained; all problems at once.
    """
    if config.optim.seed + config.compare.seeds - 1 > LARGEST_SEED:
        raise ConfigError(
            f"--seeds {config.compare.seeds}: start at --seed {config.optim.seed}, and the "
            f"largest is {LARGEST_SEED}: lower one of them"
        )
    check_student(config, images)
    teacher = teacher_model(config, images.spec)
    shapes = level_shapes(config, teacher, images.spec)
    compared = variants(
        config,
        images.spec.task,
        {level: shape[0] for level, shape in shapes.items()},
        has_unlabelled=images.spec.unlabelled > 0,
    )
    problems = []
    for name, changes in compared.items():
        try:
            one = with_settings(config, changes)
            check_settings(one, images.spec.task)
            check_share(one, images.spec)
            build_objective(one, images.spec, teacher if uses_teacher(one) else None)
        except UserError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    show_pair(config, images.spec, teacher, console)
    return compared


def _begin(session: Session, compared: Mapping[str, Settings]) -> ModelFile | None:
    """Open the runs of the comparison and its methods; return the teacher if one is needed."""
    config, tracker = session.config, session.tracker
    tracker.start(
        PARENT,
        f"comparison {pair_name(config)}",
        tags=run_tags(session, PARENT),
        texts={"config.yaml": to_yaml(config)},
    )
    each = {name: with_settings(config, changes) for name, changes in compared.items()}
    wanted = any(uses_teacher(one) for one in each.values())
    teacher = get_teacher(session, PARENT)[0] if wanted else None
    for name, one in each.items():
        tracker.start(
            method_key(name),
            name,
            parent=PARENT,
            params=shown_params(one),
            tags=run_tags(session, "method"),
        )
    return teacher


def step_costs(
    session: Session, compared: Mapping[str, Settings], teacher: ModelFile | None
) -> Costs:
    """Return name -> cost of a step, absolute and relative to the student alone."""
    config = session.config
    configs = {name: with_settings(config, changes) for name, changes in compared.items()}
    alone = [name for name, one in configs.items() if not uses_teacher(one)]
    reference = alone[0] if alone else "student alone"
    configs.setdefault(reference, student_alone(config, {}))
    gpus = min(1.0, config.cluster.gpus_per_worker)
    with progress(session.console, "measuring steps side by side") as advance:
        advance(0, len(configs))
        costs = costs_of_steps(configs, reference, session.shared, teacher, gpus=gpus)
        advance(len(configs), len(configs))
    return {name: costs[name] for name in compared}


def summary(
    compared: Mapping[str, Settings],
    seeds: Sequence[int],
    trials: Mapping[Seeded, TrialResult],
    scores: Mapping[Seeded, float],
    costs: Mapping[str, Mapping[str, float]],
    metric: str,
) -> dict[str, Any]:
    """Return the ranked comparison.

    Args:
        compared: name -> settings.
        seeds: that each was trained with.
        trials: how each training went.
        scores: on the test split, of those that came to their end.
        costs: name -> what a step costs, see ``costs_of_steps``.
        metric: what the scores are.

    Returns:
        "metric"; "seeds"; "reference", the best baseline (or the first of all where there is none),
        which "p_value" is against: of a paired t-test over the seeds, two-sided, None for the
        reference itself and where there are fewer than two seeds; "methods", best mean first, with
        "scores", "mean" and "std" on the test split, "val_mean", and what a step costs.
    """
    rows: list[dict[str, Any]] = []
    for name, changes in compared.items():
        of_test = [scores.get((seed, name)) for seed in seeds]
        of_val = [trials[seed, name].val_score for seed in seeds]
        rows.append(
            {
                "method": name,
                "settings": dict(changes),
                "scores": of_test,
                **spread(of_test),
                "val_mean": spread(of_val)["mean"],
                **costs[name],
            }
        )
    rows.sort(key=lambda row: _standing(row["mean"], metric), reverse=True)
    baselines = [row for row in rows if is_baseline(row["settings"]) and row["mean"] is not None]
    first = next(row for row in rows if row["method"] == next(iter(compared)))
    reference = baselines[0] if baselines else first
    for one in rows:
        one["p_value"] = p_value(one["scores"], reference["scores"]) if one != reference else None
    return {
        "metric": metric,
        "seeds": list(seeds),
        "reference": reference["method"],
        "methods": rows,
    }


def _standing(mean: float | None, score: str) -> tuple[bool, float]:
    """Return what methods are ordered by: those without a mean come last."""
    return mean is not None, 0.0 if mean is None else rank(mean, score)


def comparison_verdict(
    session: Session,
    comparison: Mapping[str, Any],
    tested: Mapping[Seeded, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Return how the method that validation ranks first compares with the student alone.

    Args:
        session: the open run.
        comparison: see ``summary``.
        tested: scores on the test split of every training that finished.

    Returns:
        See ``verdict``, and "method" and "line"; None if either has no score with some seed.
    """
    config, score = session.config, comparison["metric"]
    whole = [one for one in comparison["methods"] if one["mean"] is not None]
    distilled: list[Mapping[str, Any]] = []
    alone: list[Mapping[str, Any]] = []
    for one in whole:
        taught = uses_teacher(with_settings(config, one["settings"]))
        (distilled if taught else alone).append(one)
    if not distilled or not alone:
        return None
    best = max(distilled, key=lambda one: rank(one["val_mean"], score))["method"]
    of_best, of_alone = (
        [tested[seed, name] for seed in comparison["seeds"]] for name in (best, alone[0]["method"])
    )
    return verdict_of(session, of_best, of_alone) | {"method": best}


def p_value(scores: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """Return the two-sided p-value of a paired t-test over the seeds.

    None where a score is missing, where there are fewer than two pairs, and where all differences
    are equal, so that their deviation is 0.
    """
    pairs = [(a, b) for a, b in zip(scores, others, strict=True) if a is not None and b is not None]
    differences = {a - b for a, b in pairs}
    if len(pairs) < len(scores) or len(differences) < 2:
        return None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def _conclude(
    session: Session,
    comparison: dict[str, Any],
    trials: Mapping[Seeded, TrialResult],
    teacher: ModelFile | None,
    found: dict[str, Any] | None,
) -> dict[str, Any]:
    """Log the comparison and its verdict, save the best student, return the result."""
    tracker = session.tracker
    models = {"teacher": teacher} if teacher is not None else {}
    chosen = best_of(comparison, trials)
    if chosen is not None:
        models["best"] = students(session, {chosen: trials[chosen]})[chosen]
        save_model_file(session.folder / MODEL, models["best"])
    scores = test_scores(session, models)
    for one in comparison["methods"]:
        key = method_key(one["method"])
        tracker.metrics(key, method_metrics(one), step=0)
        tracker.end(key)
    if "teacher" in scores:
        tracker.metrics(PARENT, {"teacher_test_score": scores["teacher"]["score"]}, step=0)
    path = session.folder / "comparison.png"
    draw_seeds(
        path,
        {one["method"]: one["scores"] for one in comparison["methods"]},
        f"{comparison['metric']} on the test split",
    )
    tracker.figure(PARENT, path)
    description = comparison_markdown(comparison)
    if found is not None:
        description += f"\n\n{found['line']}"
        tracker.metrics(PARENT, verdict_metrics(found), step=0)
        tracker.tags(PARENT, {"verdict": found["line"]})
    tracker.tags(PARENT, {DESCRIPTION_TAG: description})
    return {
        "comparison": comparison,
        "verdict": found,
        "models": model_rows(models, scores),
        "test_images": test_images(session),
        "selection": {"rule": RULE, "split": "val", **_choice(chosen, trials)},
        "trainings": [row(session, one, trials[one], ComparisonProgress) for one in trials],
        **places(session, PARENT, "parent_run_id"),
    }


def _choice(chosen: Seeded | None, trials: Mapping[Seeded, TrialResult]) -> dict[str, Any]:
    """Return the seed, the method and the number of the training whose student was chosen."""
    if chosen is None:
        return {"seed": None, "method": None, "number": None}
    return {"seed": chosen[0], "method": chosen[1], "number": trials[chosen].number}


def best_of(comparison: Mapping[str, Any], trials: Mapping[Seeded, TrialResult]) -> Seeded | None:
    """Return seed and method of the best student on validation; None if no method is complete."""
    whole = [one for one in comparison["methods"] if one["mean"] is not None]
    if not whole:
        return None
    score = comparison["metric"]
    name = max(whole, key=lambda one: rank(one["val_mean"], score))["method"]

    def standing(seeded: Seeded) -> tuple[bool, float]:
        return _standing(trials[seeded].val_score, score)

    return max((seeded for seeded in trials if seeded[1] == name), key=standing)


def method_metrics(one: Mapping[str, Any]) -> dict[str, float]:
    """Return the known metrics of a method's run in MLflow."""
    named = {
        "test_score": one["mean"],
        "test_score_std": one["std"],
        "val_score": one["val_mean"],
        "p_value": one["p_value"],
        "seconds_per_step": one["seconds_per_step"],
        "step_ratio": one["step_ratio"],
        "peak_mb": one["peak_mb"],
    }
    return {name: value for name, value in named.items() if value is not None}
