"""`python -m mamba3`: the `mamba3` command, where its script is not on the path."""

from mamba3.cli import main

if __name__ == "__main__":
    main()
