"""Which tests look at the scenes of tests/rayrun, and so run in the process that plays them."""

from __future__ import annotations

# scene -> the files whose tests look at its outcome; the longest first
SCENES = {
    "spread": {"test_nodes"},
    "kill": {"test_survival"},
    "keep": {"test_object_storage"},
    "fill": {"test_storage"},
    "hang": {"test_server"},
    "undisturbed": {"test_survival", "test_storage", "test_object_storage"},
}
FILES = set().union(*SCENES.values())
