"""The data sets of ``--dataset``, one per file."""
