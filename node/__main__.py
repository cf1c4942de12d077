"""``python -m node``: the same as ``seedwire node``."""

from node.cli import main

if __name__ == "__main__":
    main()
