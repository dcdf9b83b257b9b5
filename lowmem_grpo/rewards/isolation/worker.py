"""The program that a worker process starts as: it dies with the trainer, and becomes the worker's own program.

`python -P worker.py CONNECTION PARENT PROGRAM`, of which PROGRAM gets the first argument. Standard library only.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread that started it ends: with the pool, or the trainer.

    A worker that is busy in C code, or stopped, notices nothing by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    program = sys.argv[3]
    del sys.argv[2:]
    runpy.run_path(program, run_name="__main__")
