"""``python -m adaptinfer`` is the command ``adaptinfer``."""

from adaptinfer.cli import main

if __name__ == "__main__":
    main()
