"""`python -m gorgon_common.cli` is `gorgon`."""

from gorgon_common.cli import main

main()
