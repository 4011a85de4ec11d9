"""Files that appear whole or not at all, journals, and object stores."""
