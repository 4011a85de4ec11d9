"""Atomically written files, journals, and object stores."""
