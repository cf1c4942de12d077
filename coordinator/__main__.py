"""``python -m coordinator``: the same as ``seedwire coordinator``."""

from coordinator.cli import main

if __name__ == "__main__":
    main()
