"""`python -m qwen_fast` is the `qwen-fast` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
