"""`python -m glimt` is `glimt`, for torchrun and where the command is not on the path."""

from glimt.cli import main

if __name__ == "__main__":
    main()
