"""``python -m labeleff``."""

from labeleff.cli import main

if __name__ == "__main__":
    main()
