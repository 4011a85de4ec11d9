"""The teacher of a run: the given one, or one that is trained and cached."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from raygkd.assembly.derived_configs import teacher_training
from raygkd.assembly.given_teacher import named_teacher, ready_teacher_file
from raygkd.assembly.models import is_model_file
from raygkd.config import Config, fingerprint, to_mapping
from raygkd.data.run_images import Images
from raygkd.models import ModelFile, load_model_file, save_model_file, short_name
from raygkd.storage.atomic_files import Place, make_folder, place
from raygkd.workflows.results import MODEL
from raygkd.workflows.session import Session
from raygkd.workflows.train_one import train_one


def teacher_facts(config: Config) -> dict[str, Any]:
    """Return the fact that identifies a given teacher, even if its file is replaced."""
    name = config.model.teacher
    if not is_model_file(name):
        return {}
    digest = hashlib.sha256(place(name).read_bytes()).hexdigest()
    return {"teacher, fingerprint of the file": digest[:16]}


def get_teacher(session: Session, parent: str | None = None) -> tuple[ModelFile, Place]:
    """Return the teacher and its file: the given one, or one trained for these images.

    A trained teacher is cached under the hash of its configuration and images, so that later runs
    reuse it. One whose weights have these classes is used as it is.
    """
    config = session.config
    if is_model_file(config.model.teacher):
        path = place(config.model.teacher)
        return load_model_file(path), path
    spec = session.images.spec.of_teacher()
    named = named_teacher(config, spec)
    if named.is_ready:
        folder = ready_teacher_folder(session)
        teacher = ready_teacher_file(config, spec, named)
        make_folder(folder)
        save_model_file(folder / MODEL, teacher)
        return teacher, folder / MODEL
    wanted = teacher_training(config)
    folder = teacher_folder(config, session.images, session.output)
    if (folder / MODEL).exists():
        session.console.print(f"teacher {config.model.teacher}: reused from an earlier run")
    teacher = train_one(session, wanted, role="teacher", folder=folder, teacher=None, parent=parent)
    return teacher, folder / MODEL


def ready_teacher_folder(session: Session) -> Place:
    """Return the folder of a teacher that is used as it is, by its weights and the images."""
    name, weights = session.config.model.teacher, session.weights["teacher"]
    side = session.images.spec.of_teacher().image_size[0]
    key = fingerprint([name, weights.sha256, session.images.identity, side])
    return session.output / "teachers" / f"{_folder_name(name)}-{key}"


def _folder_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", short_name(model))


def teacher_folder(config: Config, images: Images, output: Place) -> Place:
    """Return the folder of the teacher trained for a run's images.

    Args:
        config: of the run.
        images: of the run.
        output: the output folder.
    """
    tree = to_mapping(teacher_training(config))
    started_from = [tree["model"][name] for name in ("student", "student_weights")]
    side = images.spec.of_teacher().image_size[0]
    key = fingerprint([*started_from, tree["optim"], images.augment, images.identity, side])
    return output / "teachers" / f"{_folder_name(config.model.teacher)}-{key}"
