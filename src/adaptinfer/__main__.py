"""``python -m adaptinfer`` is the command ``adaptinfer``."""

from adaptinfer.cli.app import main

if __name__ == "__main__":
    main()
