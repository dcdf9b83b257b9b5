"""python -m lowmem_grpo.cli, which torchrun and others start."""

import sys

from lowmem_grpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
