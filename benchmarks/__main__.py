"""`python -m lowmem_grpo.benchmarks` is `lowmem-grpo bench`."""

import sys

from lowmem_grpo.benchmarks.suite import main

if __name__ == "__main__":
    sys.exit(main())
