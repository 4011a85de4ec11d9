"""An interrupt that a library lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from raygkd.rayrun.stop_signal import StopFolder
from raygkd.workflows.interrupts import Interrupts


class Loses:
    """Gets a Ctrl-C where Python ignores exceptions, as in callbacks of compiled libraries."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_lost_is_raised_again(tmp_path: Path) -> None:
    interrupts = Interrupts(StopFolder(tmp_path / "stop"), print)
    with interrupts.handled():
        interrupts.raise_lost()
        one = Loses()
        del one
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_lost()
