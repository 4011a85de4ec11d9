"""Speed and memory, measured side by side: ``raygkd bench``, ``python -m raygkd.bench core``."""
