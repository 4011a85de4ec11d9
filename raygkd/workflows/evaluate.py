"""Scoring finished models on prepared images: ``raygkd evaluate``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from raygkd import config as configuration
from raygkd.assembly.compatibility import check_classes, check_kind
from raygkd.assembly.models import is_model_name
from raygkd.assembly.named_model import named_model_file
from raygkd.config import Config, from_mapping, recorded_settings, with_settings
from raygkd.data.run_images import Images, open_images
from raygkd.deploy.exporters.formats import format_of
from raygkd.deploy.facts import CENTRE, Facts
from raygkd.deploy.model import files_of, load_model
from raygkd.errors import ConfigError, DataError, TrackingError, UserError
from raygkd.models import load_model_file, model_input, save_model_file, short_name
from raygkd.rayrun import image_stream
from raygkd.rayrun.cluster import cluster_if
from raygkd.rayrun.evaluation import evaluate_models
from raygkd.report.console import progress
from raygkd.report.detection_pictures import MODEL_COLOURS, draw_per_class
from raygkd.report.evaluation_figures import draw_confusion, draw_reliability
from raygkd.storage.atomic_files import Place, place
from raygkd.storage.temporary import temporary_folder
from raygkd.tracking.evaluation_runs import Origin, record_evaluation
from raygkd.tracking.redaction import shown
from raygkd.tracking.tags import IMAGES_TAG
from raygkd.workflows.model_locator import find_model, new_folder, origin_of
from raygkd.workflows.preflight import output_folder
from raygkd.workflows.resume import MODEL


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model to evaluate: its file, what that is called, its facts, and its run in MLflow."""

    path: Place
    shown: str
    facts: Facts
    origin: Origin | None


def evaluate(
    config: Config,
    models: Sequence[str],
    split: str,
    *,
    own_data: bool,
    out: str | None,
    weights: str | None,
    console: Console,
) -> dict[str, Any]:
    """Score models on a split, and measure them (``raygkd evaluate``).

    Returns what ``--json`` prints.

    Args:
        config: the data, and how it is read.
        models: as for ``find_model``, exported files, or the name of a classifier; all of the same
            input size.
        split: "train", "val" or "test".
        own_data: take the data, and the seed of its splits, from the first model that names them.
        out: folder for pictures; None for none.
        weights: of the model that is a name: "pretrained" or a file.
        console: for progress and for errors of MLflow.

    Raises:
        UserError: models and images that are not compatible.
    """
    started = time.monotonic()
    folder = None if out is None else new_folder("--out", out)
    named = _only_name(models, weights)
    subjects = {given: _subject(given, config) for given in models if given != named}
    config = _with_own_data(config, subjects) if own_data else config
    images = _images(config, subjects, named, console)
    count = len(images.rows[split])
    if not count:
        raise DataError(f"--split {split}: the data has no images in this split")
    with contextlib.ExitStack() as stack:
        if named is not None:
            temporary = stack.enter_context(temporary_folder("files"))
            subject = _named_subject(config, named, weights, images, temporary)
            subjects = {given: subjects.get(given, subject) for given in models}
            console.print(f"MODEL {named}: {subject.shown}", soft_wrap=True)
        gpus = min(1.0, config.cluster.gpus_per_worker)
        is_streamed = not image_stream.fits_in_memory(images, config.data.cache_mb)
        needs_ray = is_streamed or gpus > 0
        stack.enter_context(cluster_if(needs_ray, config.cluster.address, gpus=gpus))
        with progress(console, "decoding images") as advance:
            shared = image_stream.share(images, config.data.cache_mb, advance)
        with progress(console, "scoring") as advance:
            found = evaluate_models(
                {given: subject.path for given, subject in subjects.items()},
                shared,
                split,
                count=count,
                batch_size=config.optim.batch_size,
                gpus=gpus,
                progress=advance,
            )
        sizes = {
            given: sum(len(one.read_bytes()) for one in files_of(subject.path))
            for given, subject in subjects.items()
        }
    result: dict[str, Any] = {
        "split": split,
        "images": count,
        "data": images.table.path,
        "measure": images.spec.score,
        "class_names": list(images.spec.class_names),
        "models": {
            given: {
                "model": short_name(subject.facts.model),
                "path": subject.shown,
                "bytes": sizes[given],
                **found[given],
            }
            for given, subject in subjects.items()
        },
    }
    drawing: contextlib.AbstractContextManager[list[Path]] = contextlib.nullcontext([])
    # nobody would see them otherwise
    if folder is not None or any(subject.origin for subject in subjects.values()):
        drawing = _drawn(result, folder)
    with drawing as pictures:
        result["pictures"] = [str(path) for path in pictures] if folder else []
        for number, (given, subject) in enumerate(subjects.items(), start=1):
            # those of all models, and its own
            own = [path for path in pictures if path.stem in (_CONFUSION.format(number), *_JOINT)]
            result["models"][given]["mlflow"] = _recorded(
                subject, given, result, images.identity, own, console
            )
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _subject(given: str, config: Config) -> _Subject:
    uri, output = config.output.tracking_uri, config.output.output
    path = find_model(given, tracking_uri=uri, output=output)
    origin = origin_of(given, path, tracking_uri=uri, output=output)
    return _Subject(path=path, shown=str(path), facts=load_model(path)[0], origin=origin)


def _only_name(models: Sequence[str], weights: str | None) -> str | None:
    """Return which of the models is the name of one, and no file.

    Raises:
        ConfigError: several are, or none is and there are weights.
    """
    names = [given for given in models if is_model_name(given) and not place(given).exists()]
    if len(names) > 1:
        raise ConfigError(
            f"MODEL: {' and '.join(names)} are names of models; evaluate them one by one"
        )
    if weights is not None and not names:
        raise ConfigError(
            f"--weights {weights}: no MODEL is the name of a model, such as timm:resnet18; omit it"
        )
    return names[0] if names else None


def _named_subject(
    config: Config, name: str, weights: str | None, images: Images, folder: Path
) -> _Subject:
    """Return a model that is a name with weights; its file is written to a folder."""
    try:
        model_file, loaded = named_model_file(config, name, weights, images.spec)
    except UserError as error:
        raise type(error)(f"MODEL {name}: {error}") from error
    path = folder / MODEL
    save_model_file(path, model_file)
    return _Subject(path=path, shown=str(loaded), facts=load_model(path)[0], origin=None)


def _with_own_data(config: Config, subjects: Mapping[str, _Subject]) -> Config:
    """Return the settings with the training data of the first model that names it.

    Settings that were given take precedence.

    Raises:
        ConfigError: no model names its data.
    """
    for subject in subjects.values():
        if format_of(subject.path.name) is not None:
            continue
        tree = recorded_settings(load_model_file(subject.path).config, where=str(subject.path))
        if tree:
            own = from_mapping(tree)
            changes = {**vars(own.data), **own.data.own, "seed": own.optim.seed}
            del changes["own"]
            if place(own.output.output).is_dir():
                # its shards are there
                changes["output"] = own.output.output
            asked = configuration.given(config)
            return with_settings(config, {n: v for n, v in changes.items() if n not in asked})
    raise ConfigError("MODEL: no model file records its training data; pass --dataset")


def _images(
    config: Config, subjects: Mapping[str, _Subject], named: str | None, console: Console
) -> Images:
    """Return the images as the models' input.

    Raises:
        ConfigError: models with different inputs, or models that do not suit these images.
    """
    inputs = {(one.facts.image_size, one.facts.resize) for one in subjects.values()}
    if len(inputs) > 1:
        shown = ", ".join(
            f"{given} {one.facts.image_size}, {one.facts.resize}" for given, one in subjects.items()
        )
        raise ConfigError(
            f"MODEL: the models take images of different sizes ({shown}); evaluate them one by one"
        )
    if inputs:
        [(side, resize)] = inputs
        # predictions depend on how images are resized to the model's input
        augment = "resized-crop" if resize == CENTRE else "none"
        # exported models take images of this size only, whatever the size of the teacher's was
        size_of_run = {"image_size": side, "teacher_image_size": None}
        config = with_settings(config, {**size_of_run, "augment": augment})
    elif named is not None and (size := model_input(named).size) is not None:
        config = with_settings(config, {"image_size": size[0]})
    if config.data.score == "knn":
        # it ranks students while they are trained
        config = with_settings(config, {"score": "auto"})
    output = output_folder(config.output.output)
    with progress(console, "preparing images") as advance:
        images = open_images(config.data, seed=config.optim.seed, output=output, progress=advance)
    for given, one in subjects.items():
        try:
            check_kind(one.facts.model, images.spec.task)
            advice = "pass the data that it was trained for (--dataset, --data-dir)"
            check_classes(one.facts.class_names, images.spec, advice)
        except UserError as error:
            raise type(error)(f"MODEL {given}: {error}") from error
    return images


# names of pictures: of one model, and of all
_CONFUSION = "confusion-{}"
_JOINT = ("per-class", "reliability")


@contextlib.contextmanager
def _drawn(result: Mapping[str, Any], folder: Path | None) -> Iterator[list[Path]]:
    """Draw the pictures; yield their paths. Without a folder they are deleted after the block."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(temporary_folder("files"))
        models, names = result["models"], result["class_names"]
        detection = next(iter(models.values()))["confusion"] is None
        per_class = folder / f"{_JOINT[0]}.png"
        measure = "per_class50" if detection else "per_class"
        shown = dict(list(models.items())[: len(MODEL_COLOURS)])
        draw_per_class(
            per_class,
            names,
            {given: one["scores"][measure] for given, one in shown.items()},
            measure="average precision at IoU 0.5" if detection else "recall",
        )
        pictures = [per_class]
        reliability = folder / f"{_JOINT[1]}.png"
        draw_reliability(reliability, {given: one["calibration"] for given, one in models.items()})
        pictures.append(reliability)
        for number, (given, one) in enumerate(models.items(), start=1):
            if one["confusion"] is not None:
                path = folder / f"{_CONFUSION.format(number)}.png"
                draw_confusion(path, names, one["confusion"], title=given)
                pictures.append(path)
        yield pictures


def _recorded(
    subject: _Subject,
    given: str,
    result: Mapping[str, Any],
    identity: str,
    pictures: Sequence[Path],
    console: Console,
) -> dict[str, str] | None:
    """Log a model's evaluation next to the run it came from; None if there is no such run."""
    if subject.origin is None:
        return None
    one, split = result["models"][given], result["split"]
    scores = {name: value for name, value in one["scores"].items() if isinstance(value, float)}
    numbers = {f"{split}_{name}": value for name, value in scores.items()}
    numbers |= {f"{split}_ece": one["calibration"]["ece"], "bytes": float(one["bytes"])}
    for name in ("parameters", "flops"):
        numbers[name] = one[name]
    for size, timed in one["latency_ms"].items():
        numbers |= {f"latency_ms_{size}_{name}": timed[name] for name in ("median", "p95")}
    for size, peak in (one["memory_mb"] or {}).items():
        numbers[f"memory_mb_{size}"] = peak
    tags = {
        IMAGES_TAG: identity,
        "raygkd.role": "evaluation",
        "raygkd.model": subject.shown,
        "raygkd.split": f"{split} {result['images']}",
        "raygkd.hardware": one["hardware"],
    }
    try:
        run_id = record_evaluation(
            subject.origin,
            name=f"evaluation {subject.facts.model}",
            metrics={name: float(value) for name, value in numbers.items() if value is not None},
            tags=tags,
            figures=pictures,
        )
    except TrackingError as error:
        console.print(f"MODEL {given}: not logged to MLflow: {error}", soft_wrap=True)
        return None
    uri = shown(subject.origin.uri)
    return {"tracking_uri": uri, "run_id": run_id, "of_run": subject.origin.run_id}
