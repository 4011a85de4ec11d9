"""``python -m raygkd`` is the command line."""

from raygkd.cli.main import main

main()
