"""Running on Ray: the cluster, the data stream, training workers and the search."""
