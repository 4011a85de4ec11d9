from __future__ import annotations

import pytest
from small_runs import prepare_digits

from raygkd.data.parquet import ImageTable


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """Return scikit-learn's digits as a table."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")
