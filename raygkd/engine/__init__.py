"""Training: one step, the loop over epochs, and the state from which it can be resumed."""

from raygkd.engine.epoch import evaluate, run_epoch
from raygkd.engine.loop import Training
from raygkd.engine.objective import (
    BaselineTerm,
    ClassifierObjective,
    DetectorObjective,
    Objective,
    Teacher,
    TeacherOutput,
)
from raygkd.engine.state import read_checkpoint, restore, save_checkpoint
from raygkd.engine.step import check_terms, gradient_norms, measure_shares, training_step
from raygkd.engine.tasks import Classification, Detection, Task
from raygkd.engine.teacher_lookup import TeacherLookup, TeacherStore

__all__ = [
    "BaselineTerm",
    "Classification",
    "ClassifierObjective",
    "Detection",
    "DetectorObjective",
    "Objective",
    "Task",
    "Teacher",
    "TeacherLookup",
    "TeacherOutput",
    "TeacherStore",
    "Training",
    "check_terms",
    "evaluate",
    "gradient_norms",
    "measure_shares",
    "read_checkpoint",
    "restore",
    "run_epoch",
    "save_checkpoint",
    "training_step",
]
