"""`python -m mamba3.cli`."""

from mamba3.cli.app import main

if __name__ == "__main__":  # and not in the processes that tokenise, which import this
    main()
