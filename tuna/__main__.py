"""`python -m tuna` is the `tuna` command."""

from tuna.cli import main

if __name__ == "__main__":
    main()
