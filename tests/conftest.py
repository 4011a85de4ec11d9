"""For all tests: raygkd's settings of Ray hold wherever a test imports ray first."""

import raygkd.rayrun  # noqa: F401
