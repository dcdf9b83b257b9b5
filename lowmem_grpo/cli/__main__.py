"""python -m lowmem_grpo.cli, which torchrun and others start."""

import os
import sys

from lowmem_grpo.cli import main
from lowmem_grpo.torchrun import num_started

if __name__ == "__main__":
    status = main()
    distributed = sys.modules.get("lowmem_grpo.distributed")
    if num_started() > 1 and distributed is not None and distributed.is_stranded():
        sys.stderr.flush()
        os._exit(status)  # else the process waits for one that hangs
    sys.exit(status)
