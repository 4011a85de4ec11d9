"""Report of a finished run, as one page: ``raygkd report``.

Shapes: B images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import datetime
import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from raygkd.assembly.methods import scores_teacher, uses_teacher
from raygkd.assembly.student_objective import build_objective
from raygkd.assembly.training import file_normaliser
from raygkd.assembly.unlabelled_runs import student_class_names
from raygkd.data.plan import shuffled
from raygkd.data.run_images import Images, open_images
from raygkd.data.windows import Arrays, load_window
from raygkd.engine.tasks import pixels
from raygkd.errors import ConfigError, DataError, ResourceError, StorageError
from raygkd.graph import attention_masks
from raygkd.metrics.latency import hardware, latencies
from raygkd.models import ModelFile, build_from_file
from raygkd.report.attention_maps import attention_section
from raygkd.report.console import progress
from raygkd.report.examples import Example, Prediction, detections_section, examples_section
from raygkd.report.graph_numbers import graph_views
from raygkd.report.graphs import graphs_section
from raygkd.report.loss_curves import losses_section
from raygkd.report.page import Section, page
from raygkd.report.search_figures import search_section
from raygkd.report.search_numbers import read_dimensions
from raygkd.report.seed_figures import comparison_section, repeat_section
from raygkd.report.sizes import ScoredModel, sizes_section
from raygkd.report.students import students_blocks
from raygkd.report.summary import summary_section
from raygkd.report.tables import champion_note
from raygkd.storage.atomic_files import Place, local_copy, make_folder, place, whole_file
from raygkd.storage.temporary import temporary_folder
from raygkd.workflows.channel_graphs import CPU, MatchedMaps, matched_maps
from raygkd.workflows.finished_run import COMPARISON, FinishedRun, open_finished
from raygkd.workflows.input_sizes import default_side
from raygkd.workflows.results import ALONE, TEACHER, val_score

PAGE = "index.html"
# images that the graphs are the means of, that the masks are shown on, that the models are timed
# with, and among which the right and wrong ones are looked for
GRAPH_IMAGES, MASK_IMAGES, TIMED_IMAGES, EXAMPLES = 16, 6, 8, 256
BATCH = 32
# a section, or why there is none
Made = Section | str


def write_report(given: str, html: str | None, *, console: Console) -> dict[str, Any]:
    """Write a finished run's report (``raygkd report``); return what ``--json`` prints.

    Page and pictures are moved into place at the end, so none is ever incomplete.

    Args:
        given: the folder of a run, or an output folder for its newest finished run.
        html: of the page; None for ``report/index.html`` in the run's folder. Pictures are stored
            next to it; next to a named page, they are prefixed with its name.
        console: for progress.

    Raises:
        ConfigError: there is no such run, it is not finished, or the path of the page is invalid.
        DataError: its files or its images have changed.
        ResourceError: the page cannot be written.
    """
    started = time.monotonic()
    run = open_finished(given)
    target = _target(run, html)
    with temporary_folder("report") as temporary:
        sections, left_out = _sections(_open(run, temporary, console), console)
        text = page(_title(run), _subtitle(run), sections, left_out)
        pictures = [picture.path for section in sections for picture in section.pictures]
        written = _put(target, text, pictures, prefix="" if html is None else f"{_stem(target)}-")
    return {
        "run": str(run.folder),
        "html": str(target),
        "pictures": written,
        "left_out": left_out,
        "numbers": {section.anchor: section.numbers for section in sections},
        "seconds": round(time.monotonic() - started, 1),
    }


def _target(run: FinishedRun, html: str | None) -> Place:
    """Return the path of the page."""
    if html is None:
        return run.folder / "report" / PAGE
    try:
        target = place(html)
    except ConfigError as error:
        raise ConfigError(f"--html {error}") from error
    if target.is_dir():
        raise ConfigError(f"--html {html}: is a folder; pass the name of a file, such as {PAGE}")
    return target


def _stem(target: Place) -> str:
    return os.path.splitext(target.name)[0]


def _put(target: Place, text: str, pictures: Sequence[Path], *, prefix: str) -> list[str]:
    """Write the page and the pictures; return the paths of the pictures."""
    written = [target.parent / f"{prefix}{path.name}" for path in pictures]
    try:
        make_folder(target.parent)
        for path, copy in zip(pictures, written, strict=True):
            with whole_file(copy) as temporary:
                shutil.copyfile(path, temporary)
        with whole_file(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ResourceError(
            f"{target}: cannot be written ({reason}); choose another place with --html"
        ) from error
    return [str(path) for path in written]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Opened:
    """A run with its images and models.

    Attributes:
        run: the finished run.
        images: of it; None if it has no model.
        models: role -> model file.
        folder: for the pictures.
    """

    run: FinishedRun
    images: Images | None
    models: dict[str, ModelFile]
    folder: Path

    def sample(self, split: str, number: int) -> Arrays:
        """Return random images of a split, the same every time; see ``Window.arrays``.

        Raises:
            DataError: none of them can be decoded.
        """
        images = self.images
        assert images is not None
        rows = shuffled(images.rows[split], images.table.units.first, seed=0)[:number]
        window = load_window(
            images.table,
            rows,
            images.transform(split),
            seed=0,
            epoch=0,
            skip_bad=True,
            exact=False,
        )
        if not len(window.arrays["row"]):
            raise DataError(
                f"none of {len(rows)} {split} images of {images.table.path} can be read"
            )
        return window.arrays

    @functools.cached_property
    def maps(self) -> dict[int, MatchedMaps] | str:
        """Level -> maps of ``GRAPH_IMAGES`` validation images, or why there are none."""
        run, images = self.run, self.images
        if images is None or run.trained is None:
            return "the run did not train a single model"
        matching = run.matching
        if matching is None:
            return f"the run's method, {run.settings.method.method}, does not match graphs"
        checkpoint = matching.checkpoint()
        if checkpoint is None:
            return "the checkpoint with the student's adapters no longer exists"
        sample_BCHW = _float_images(self.sample("val", GRAPH_IMAGES))
        return matched_maps(
            matching.config,
            images.spec.of_trial(matching.params),
            self.models[TEACHER],
            checkpoint,
            sample_BCHW,
        )


def _open(run: FinishedRun, folder: Path, console: Console) -> _Opened:
    """Open a run's images and models.

    Raises:
        DataError: they have changed.
    """
    if run.trained is None:
        return _Opened(run=run, images=None, models={}, folder=folder)
    with progress(console, "preparing images") as advance:
        images = open_images(
            run.config.data,
            seed=run.config.optim.seed,
            output=run.output,
            progress=advance,
            default_side=default_side(run.config),
            class_names=student_class_names(run.config),
        )
    if run.facts["data set, fingerprint of images and splits"] != images.identity:
        raise DataError(
            f"{images.table.path}: the images have changed since the run in {run.folder}; restore "
            "them"
        )
    if run.winner is not None:
        images = replace(images, spec=images.spec.of_trial(run.winner.params))
    return _Opened(run=run, images=images, models=run.models(images), folder=folder)


def _sections(opened: _Opened, console: Console) -> tuple[list[Section], list[str]]:
    """Return the sections, and a line for each omitted one."""
    parts: dict[str, Callable[[_Opened, Callable[[str], None]], Made]] = {
        "Summary": _summary,
        "Methods compared": _comparison,
        "The search": _search,
        "Accuracy, size and speed": _sizes,
        "Other seeds": _seeds,
        "Channel graphs": _graphs,
        "Where the teacher looks": _attention,
        "Loss terms": _losses,
        "Right and wrong": _examples,
    }
    sections, left_out = [], []
    with progress(console, "report") as advance:
        for number, (title, make) in enumerate(parts.items()):

            def tell(note: str, number: int = number) -> None:
                advance(number, len(parts), note)

            tell(title)
            made = make(opened, tell)
            if isinstance(made, Section):
                sections.append(made)
            else:
                left_out.append(f"{title}: {made}.")
        advance(len(parts), len(parts))
    return sections, left_out


def _title(run: FinishedRun) -> str:
    config = run.config
    data = config.data.dataset
    if data == "parquet" and config.data.data_dir:
        data = _stem(place(config.data.data_dir))
    rows = run.rows()
    if run.trained is None:
        return f"Comparison on {data}"
    student = rows[run.trained]["model"]
    if TEACHER in rows and run.trained != TEACHER:
        return f"{rows[TEACHER]['model']} → {student} on {data}"
    return f"{student} on {data}"


def _subtitle(run: FinishedRun) -> str:
    return f"raygkd {run.command}, {_date(run)}"


def _date(run: FinishedRun) -> str:
    moment = datetime.datetime.fromtimestamp(run.finished)
    return f"{moment.day} {moment:%B %Y, %H:%M}"


def _summary(opened: _Opened, tell: Callable[[str], None]) -> Made:
    run, images = opened.run, opened.images
    names = images.spec.class_names if images else tuple(run.facts.get("data set, classes", ()))
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    counts = {
        split: run.facts.get(f"data set, {split} images")
        for split in ("train", "unlabelled", "val", "test")
    }
    known = [f"{split} {count:,}" for split, count in counts.items() if count]
    facts = [("data set", run.config.data.dataset)]
    facts += [("images", ", ".join(known))] if known else []
    facts += [("classes", f"{len(names)} ({shown})")] if names else []
    if images is not None:
        facts.append(("model input", "{}x{} pixels".format(*images.spec.image_size)))
    if run.trained != TEACHER:
        facts.append(("method", run.settings.method.method))
    if run.trials:
        failed = sum(trial.status in ("diverged", "failed") for trial in run.trials)
        facts.append(("trials", f"{len(run.trials)} ({failed} without a score at the end)"))
    facts += [("finished", _date(run)), ("took", f"{run.result['seconds']:,.0f} s")]
    facts.append(("versions", ", ".join(f"{n} {v}" for n, v in run.versions().items()) or "-"))
    facts.append(("folder", str(run.folder)))
    repeat = run.result.get("repeat")
    return summary_section(
        command=run.command,
        config=run.config,
        models=run.rows(),
        params=run.winner.params if run.winner else None,
        facts=facts,
        score=images.spec.score if images else "",
        seeds=len(repeat["seeds"]) if repeat else 0,
        notes=_notes(run),
    )


def _notes(run: FinishedRun) -> list[str]:
    """Return the verdict, and who the champion is if not a distilled student."""
    # neither is in the results of earlier versions
    verdict, champion = (run.result.get(name) for name in ("verdict", "champion"))
    notes = [verdict["line"]] if verdict else []
    if champion and (note := champion_note(champion)):
        notes.append(note)
    return notes


def _comparison(opened: _Opened, tell: Callable[[str], None]) -> Made:
    comparison = opened.run.result.get(COMPARISON)
    if comparison is None:
        return "the run did not compare methods"
    return comparison_section(opened.folder, comparison)


def _search(opened: _Opened, tell: Callable[[str], None]) -> Made:
    run = opened.run
    if not run.trials or run.winner is None:
        return f"'raygkd {run.command}' does not search settings"
    score = opened.images.spec.score if opened.images else ""
    # a model file that was not written by a run has no score
    others = {
        role: known
        for role in (TEACHER, ALONE)
        if role in opened.models and (known := val_score(opened.models[role], score)) is not None
    }
    space = read_dimensions(run.facts)
    rows = run.result.get("students")
    students = []
    if rows:
        students = students_blocks(
            opened.folder, rows, run.config.search, score, others.get(TEACHER)
        )
    return search_section(opened.folder, run.config, run.trials, space, others, students)


def _seeds(opened: _Opened, tell: Callable[[str], None]) -> Made:
    repeat = opened.run.result.get("repeat")
    if repeat is None:
        return "the run was not repeated with other seeds (--repeat)"
    return repeat_section(opened.folder, repeat, opened.images.spec.score if opened.images else "")


def _sizes(opened: _Opened, tell: Callable[[str], None]) -> Made:
    if opened.images is None:
        return "the run did not train a single model"
    sample_BCHW = _float_images(opened.sample("val", TIMED_IMAGES))
    timed = latencies(
        {
            role: (
                build_from_file(file),
                file_normaliser(file, CPU)(sample_BCHW),
            )
            for role, file in opened.models.items()
        },
        lambda done, total: tell(f"latency, {done} of at most {total} runs"),
    )
    models = {
        role: ScoredModel(
            parameters=row["parameters"],
            test_score=row["test_score"],
            latency=timed[role],
        )
        for role, row in opened.run.rows().items()
    }
    height, width = opened.images.spec.image_size
    return sizes_section(
        opened.folder, models, f"validation image of {height}x{width} pixels", hardware()
    )


def _graphs(opened: _Opened, tell: Callable[[str], None]) -> Made:
    maps, matching = opened.maps, opened.run.matching
    if isinstance(maps, str) or matching is None:
        return str(maps)
    method = matching.config.method
    views = {}
    for level, of in maps.items():
        tell(f"channel graphs, level {level}")
        others = {"before": of.before_BCHW, "after": of.after_BCHW}
        views[level] = graph_views(of.teacher_BCHW, others, dim=method.dim, weights=method.weights)
    return graphs_section(
        opened.folder,
        views,
        images=len(of.teacher_BCHW),
        centred=method.centre,
        dim=method.dim,
        whose=matching.student,
    )


def _attention(opened: _Opened, tell: Callable[[str], None]) -> Made:
    maps, images, matching = opened.maps, opened.images, opened.run.matching
    if isinstance(maps, str) or images is None or matching is None:
        return str(maps)
    method = matching.config.method
    temperature, relative = method.temperature, method.weights_unit == "gradient"
    masks: dict[int, NDArray[np.float32]] = {
        level: attention_masks(of.teacher_BCHW[:MASK_IMAGES], temperature, relative=relative)[0][
            :, 0
        ].numpy()
        for level, of in maps.items()
    }
    sample = opened.sample("val", GRAPH_IMAGES)
    pictures = [image_CHW.transpose(1, 2, 0) for image_CHW in sample["image"][:MASK_IMAGES]]
    names = images.spec.class_names
    if "label" in sample:
        titles = [
            names[label] if label >= 0 else "no label" for label in sample["label"][:MASK_IMAGES]
        ]
    else:
        titles = [f"{(classes >= 0).sum()} object(s)" for classes in sample["classes"]]
    return attention_section(opened.folder, pictures, titles[:MASK_IMAGES], masks, temperature)


def _losses(opened: _Opened, tell: Callable[[str], None]) -> Made:
    run = opened.run
    epochs = run.epochs()
    if opened.images is None or not epochs:
        return "the run has no training metrics"
    teacher = build_from_file(opened.models[TEACHER]) if uses_teacher(run.settings) else None
    objective = build_objective(run.settings, opened.images.spec, teacher)
    factors = {
        name: epochs[-1].get(f"factor_{name}", weight)
        for name, weight in objective.term_weights.items()
    }
    return losses_section(opened.folder, epochs, factors, f"the {run.trained}")


def _examples(opened: _Opened, tell: Callable[[str], None]) -> Made:
    run, images = opened.run, opened.images
    if images is None or run.trained is None:
        return "the run did not train a single model"
    if images.spec.task == "detection":
        return _detections(opened)
    if not images.spec.has_labels:
        return "the images have no labels"
    if not opened.models[run.trained].class_names:
        return "the student has no classes"
    sample = opened.sample("test", EXAMPLES)
    wanted = (TEACHER, run.trained) if scores_teacher(run.config) else (run.trained,)
    roles = list(dict.fromkeys(role for role in wanted if role in opened.models))
    said = {}
    for role in roles:
        tell(f"predictions of the {role}")
        said[role] = _predictions(opened.models[role], _float_images(sample))
    examples = [
        Example(
            image=image_CHW.transpose(1, 2, 0),
            label=int(label),
            said={role: said[role][number] for role in roles},
        )
        for number, (image_CHW, label) in enumerate(zip(sample["image"], sample["label"]))
    ]
    return examples_section(opened.folder, examples, images.spec.class_names, roles)


@torch.no_grad()
def _predictions(file: ModelFile, images_BCHW: Tensor) -> list[Prediction]:
    model = build_from_file(file)
    normalise = file_normaliser(file, CPU)
    logits_BK = torch.cat([model(normalise(part)) for part in images_BCHW.split(BATCH)])
    best_B, label_B = logits_BK.softmax(1).max(1)
    return [
        Prediction(label=int(label), probability=float(best))
        for label, best in zip(label_B, best_B)
    ]


def _detections(opened: _Opened) -> Made:
    """Return the section with the detection pictures of the run."""
    copies = []
    for name in ("detections.png", "per_class.png"):
        path = opened.run.folder / name
        if not path.exists():
            return f"the run has no {name}"
        with local_copy(path) as local:
            copies.append(Path(shutil.copyfile(local, opened.folder / name)))
    return detections_section(*copies)


def _float_images(sample: Arrays) -> Tensor:
    """Return a sample's images as float (B, C, H, W) in 0..1."""
    return pixels({"image": torch.from_numpy(sample["image"])}, CPU)
