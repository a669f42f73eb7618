"""``python -m fxopt``: the command line."""

from __future__ import annotations

from fxopt.cli import main

if __name__ == "__main__":
    main()
