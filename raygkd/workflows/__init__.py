"""What the commands do, from configuration to result."""

from raygkd.workflows.compare import compare
from raygkd.workflows.evaluation import evaluate
from raygkd.workflows.exports import export
from raygkd.workflows.prediction import predict_images
from raygkd.workflows.promotion import promote
from raygkd.workflows.report import write_report
from raygkd.workflows.search import tune
from raygkd.workflows.single import distil, teach

__all__ = [
    "compare",
    "distil",
    "evaluate",
    "export",
    "predict_images",
    "promote",
    "teach",
    "tune",
    "write_report",
]
