"""Running on Ray: the cluster, the data stream, training workers and the search."""

import os

# read when ray is imported: a thread that outlives its cluster must fail, not start another one
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
