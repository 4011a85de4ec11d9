"""``python -m raygkd`` is the command line."""

from raygkd.cli import main

main()
