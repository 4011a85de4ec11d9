"""Benchmarks of speed and memory: ``raygkd bench``, ``python -m raygkd.bench core``."""
