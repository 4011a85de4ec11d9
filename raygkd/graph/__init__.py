"""The channels relational graph of a feature map and its properties (arXiv 2405.08547)."""

from raygkd.graph.adjacency import adjacency, centred, normalised_channels
from raygkd.graph.attention import (
    ATTENTION_MODES,
    attention_masks,
    foreground_weights,
    relational_attention,
    softmax_masks,
)
from raygkd.graph.checks import (
    choice_problem,
    dimension_problem,
    require,
    shape_problem,
    share_problem,
    temperature_problem,
    weight_problems,
)
from raygkd.graph.operators import PLAIN, Operators
from raygkd.graph.precision import full_precision
from raygkd.graph.spectral import (
    WEIGHTS,
    ChannelGraphs,
    deflated_factor,
    nontrivial_pairs,
    normalised_factor,
    spectral_embedding,
)
from raygkd.graph.teacher_graph import TeacherGraph

__all__ = [
    "ATTENTION_MODES",
    "PLAIN",
    "WEIGHTS",
    "ChannelGraphs",
    "Operators",
    "TeacherGraph",
    "adjacency",
    "attention_masks",
    "centred",
    "choice_problem",
    "deflated_factor",
    "dimension_problem",
    "foreground_weights",
    "full_precision",
    "nontrivial_pairs",
    "normalised_channels",
    "normalised_factor",
    "relational_attention",
    "require",
    "shape_problem",
    "share_problem",
    "softmax_masks",
    "spectral_embedding",
    "temperature_problem",
    "weight_problems",
]
