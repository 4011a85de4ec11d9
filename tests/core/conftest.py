from __future__ import annotations

import pytest
import torch
from small_nets import Net
from small_runs import prepare_digits
from torch import Tensor

from raygkd.data.parquet import ImageTable


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    """Return scikit-learn's digits as a table."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(8, 3, 8, 8)


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(8) % 5


@pytest.fixture
def pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(10), Net(6)
