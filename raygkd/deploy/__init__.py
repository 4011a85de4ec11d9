"""Models in use: loading them, running them, and writing them in other formats."""
