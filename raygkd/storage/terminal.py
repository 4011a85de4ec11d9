"""Output to a terminal that was closed."""

from __future__ import annotations

import errno
import os


def leave_closed_terminal() -> None:
    """Send standard output and error nowhere, where they were a terminal that is closed now.

    What is written there would fail, also the lines that a stop prints.
    """
    for file in (1, 2):
        is_closed = False
        try:
            # of nothing, so that it changes nothing
            os.write(file, b"")
        except OSError as error:
            is_closed = error.errno == errno.EIO
        if is_closed:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)
