"""A teacher's last layer, trained on features that its frozen backbone gives once.

Shapes: B batch, N images, D features, K classes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raygkd.errors import DataError
from raygkd.models import ModelFile, build_from_file
from raygkd.models.heads import inputs_of, last_linear
from raygkd.rayrun import references
from raygkd.rayrun.finished_models import here_or_on_gpu, model_on_images
from raygkd.rayrun.image_stream import SharedImages

# inverse strengths of the L2 penalty that are tried, for standardised features
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
MOST_ITERATIONS = 300
# logit of a class without a training image, below those of the others
ABSENT_BIAS = -20.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Features:
    """What a last layer reads, of every image of a split.

    Attributes:
        inputs_ND: float32.
        labels_N: int64.
    """

    inputs_ND: NDArray[np.float32]
    labels_N: NDArray[np.int64]


def probed(
    model_file: ModelFile,
    images: SharedImages,
    *,
    batch_size: int,
    gpus: float,
    progress: Progress,
) -> ModelFile:
    """Return a model file whose last layer fits the training images; the rest is as it was.

    Args:
        model_file: of a classifier.
        images: the shared images; every one is seen once, without random changes.
        batch_size: images at a time.
        gpus: of the task that works the features out, where this process has no GPU.
        progress: is called with the splits done and their number.

    Raises:
        ConfigError: the model's last layer is not linear.
    """
    model = build_from_file(model_file)
    path, head = last_linear(model, len(model_file.class_names))
    plain = _without_changes(images)
    found = {}
    for done, split in enumerate(("train", "val")):
        progress(done, 2)
        found[split] = here_or_on_gpu(features, gpus)(model_file, plain, split, batch_size)()
    weight_KD, bias_K, score = fit(found["train"], found["val"], len(model_file.class_names))
    progress(2, 2)
    state = dict(model_file.state_dict)
    state[f"{path}.weight"] = torch.from_numpy(weight_KD).to(head.weight.dtype)
    if head.bias is not None:
        state[f"{path}.bias"] = torch.from_numpy(bias_K).to(head.weight.dtype)
    return dataclasses.replace(
        model_file, state_dict=state, scores={"val_score": score, "val_accuracy": score}
    )


def _without_changes(images: SharedImages) -> SharedImages:
    """Return the same images, the training images transformed as for evaluation."""
    plain = dataclasses.replace(references.get(images.images), evaluates=True)
    return dataclasses.replace(images, images=references.put(plain))


@torch.inference_mode()
def features(model_file: ModelFile, images: SharedImages, split: str, batch_size: int) -> Features:
    """Return what a classifier's last layer reads of a split's images, in this process."""
    found, labels = [], []
    with (
        model_on_images(model_file, images, batch_size) as (model, stream, inputs),
        inputs_of(last_linear(model, len(model_file.class_names))[1]) as seen,
    ):
        for batch in stream.eval_batches(split):
            model(inputs(batch))
            found.append(seen.pop().flatten(1).float().cpu().numpy())
            labels.append(batch["label"].numpy())
    inputs_ND, labels_N = np.concatenate(found), np.concatenate(labels)
    known_N = labels_N >= 0
    return Features(inputs_ND[known_N], labels_N[known_N])


def fit(
    train: Features, val: Features, num_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Return weight (K, D) and bias (K,) of multinomial logistic regression, and its score.

    The strength of the L2 penalty is the one with the best accuracy on the validation images, which
    is the score; among equal ones the strongest.

    Raises:
        DataError: training images of fewer than two classes, no validation image, or features that
            are not finite.
    """
    if len(np.unique(train.labels_N)) < 2 or len(val.labels_N) == 0:
        raise DataError(
            "--teacher-mode probe: it needs training images of two classes or more, and validation "
            "images; add labelled images, or choose --teacher-mode finetune"
        )
    if not all(np.isfinite(split.inputs_ND).all() for split in (train, val)):
        raise DataError(
            "--teacher-mode probe: the teacher's features are not finite; choose other "
            "--teacher-weights"
        )
    # takes a second to import
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean_D = train.inputs_ND.mean(0)
    scale_D = train.inputs_ND.std(0) + 1e-6
    best_score, best = -1.0, None
    for inverse in INVERSE_PENALTIES:
        regression = LogisticRegression(C=inverse, max_iter=MOST_ITERATIONS)
        with warnings.catch_warnings():
            # an unfinished fit is judged by its score like the others
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit((train.inputs_ND - mean_D) / scale_D, train.labels_N)
        score = float(regression.score((val.inputs_ND - mean_D) / scale_D, val.labels_N))
        if score > best_score:
            best_score, best = score, regression
    assert best is not None
    weight, bias = best.coef_, best.intercept_
    if len(best.classes_) == 2:
        # of two classes scikit-learn has the difference of the logits
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight_KD = np.zeros((num_classes, len(mean_D)), np.float32)
    bias_K = np.full(num_classes, ABSENT_BIAS, np.float32)
    weight_KD[best.classes_] = weight / scale_D
    bias_K[best.classes_] = bias - (weight / scale_D) @ mean_D
    return weight_KD, bias_K, best_score
