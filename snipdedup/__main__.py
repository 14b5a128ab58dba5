"""``python -m snipdedup`` is ``snip``."""

from snipdedup.cli import main

if __name__ == "__main__":
    main()
