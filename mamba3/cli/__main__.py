"""`python -m mamba3.cli`."""

from mamba3.cli.app import main

main()
