"""`python -m lowmem_grpo.benchmarks` is `lowmem-grpo bench`."""

import sys

from lowmem_grpo.benchmarks.suite import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
