"""The program that runs untrusted Python code: takes from itself what the code must not have, then runs it.

Linux without any privilege, and as root alike. Landlock (https://docs.kernel.org/userspace-api/landlock.html) leaves it
Python's own libraries to read and one folder to write files into. A seccomp filter allows the system calls of a program
that computes: no sockets, no new processes, no signals to others, no change of owners, modes, mounts or limits. As it
can start no process, killing it ends all of it. Standard library only; `python -I jail.py JOB_FD RESULTS_FD`.
"""

import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
import types

# x86_64 and aarch64 numbers. https://github.com/torvalds/linux/blob/master/arch/x86/entry/syscalls/syscall_64.tbl
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "umask": (95, 166), "statfs": (137, 43),
    "fstatfs": (138, 44), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "fadvise64": (221, 223), "sendfile": (40, 71), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "recvfrom": (45, 207),
    "sendto": (44, 206), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "pause": (34, None), "alarm": (37, None),
    "setitimer": (38, 103), "getitimer": (36, 102), "restart_syscall": (219, 128), "exit": (60, 93),
    "exit_group": (231, 94), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "rseq": (334, 293), "arch_prctl": (158, None), "futex": (202, 98),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getrlimit": (97, 163), "getrusage": (98, 165),
    "times": (100, 153), "sysinfo": (99, 179), "uname": (63, 160), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "time": (201, None), "getrandom": (318, 278), "membarrier": (324, 283),
}  # fmt: skip
# Allowed with some arguments alone; see filter_program.
GUARDED = {
    "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29), "clone": (56, 220), "kill": (62, 129),
    "tgkill": (234, 131), "prlimit64": (302, 261), "socketpair": (53, 199),
}  # fmt: skip
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
FIRST_RECENT = 424  # calls from here on are new to some C libraries, which fall back to older ones at ENOSYS

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # on every architecture
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights on files an ABI knows; the last also for later ones
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
LARGEST_FILE, OPEN_FILES = 8 << 20, 64
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    job_fd, results_fd = map(int, sys.argv[1:3])
    with os.fdopen(job_fd, "rb") as file:
        job = json.load(file)
    nonce = job["nonce"]

    def tell(line: str) -> None:
        os.write(results_fd, f"{nonce} {line}\n".encode())

    try:
        set_limits(job)
        if job["isolate"]:
            isolate(job["folder"])
    except Exception as error:
        tell(f"failed {error}")
        os._exit(3)
    tell("ready")
    if job["tests"] is None:
        os.close(results_fd)
        run_program(job["code"])
        return
    try:
        for index in run_tests(job["code"], job["tests"]):
            tell(f"passed {index}")
    finally:
        os._exit(0)  # no thread or exit handler of the code keeps it alive


def run_program(code: str) -> None:
    """Run the code as `python solution.py` would."""
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), _module("__main__"))


def run_tests(code: str, tests: list[str]):
    """Yield the index of each test that raises nothing. Code that ends the process passes no further test."""
    names = _module("solution")
    try:
        exec(compile(code, "solution.py", "exec"), names)
    except BaseException:
        return
    for index, test in enumerate(tests):
        try:
            exec(compile(test, "test.py", "exec"), names)
        except BaseException:
            continue
        yield index


def _module(name: str) -> dict:
    module = types.ModuleType(name)
    sys.modules[name] = module  # where pickle and dataclasses look
    return module.__dict__


def set_limits(job: dict) -> None:
    """Limit memory, processor time and files, and die together with the trainer."""
    cpu_s = math.ceil(job["seconds"]) + 1
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"], resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_FSIZE: LARGEST_FILE,
        resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))
    if sys.platform == "linux":
        _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
        if os.getppid() != job["parent"]:
            raise OSError("the trainer is gone")


def isolate(folder: str) -> None:
    """Give up files, sockets and other processes. Raises OSError where this system cannot."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(f"there is no filter for {sys.platform} on {platform.machine()}")
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(libc.capset(header, nothing), "capset")  # root without its capabilities
    restrict_files(folder)
    filter_calls()


def restrict_files(folder: str) -> None:
    """Allow reading Python's and the system's libraries, and reading and writing `folder`; nothing else.

    Metadata are not files: stat() and readlink() still answer for any path.
    """
    abi = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise OSError("the kernel has no Landlock (Linux 5.13 has, where it is switched on)")
    rights = (1 << RIGHTS[min(abi, max(RIGHTS))]) - 1
    # Rights on files; TCP bind and connect, from ABI 4; abstract sockets and signals outside, from ABI 6.
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    _check(ruleset, "landlock_create_ruleset")
    own = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    for path, allowed in {**dict.fromkeys(libraries(), READ_FILE | READ_DIR), folder: own}.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= READ_FILE
        rule = struct.pack("=Qi", allowed & rights, fd)
        _check(libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule for {path}")
        os.close(fd)
    _check(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def libraries() -> list[str]:
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    return [path for path in dict.fromkeys([*python, *system]) if os.path.exists(path)]


def filter_calls() -> None:
    program = filter_program(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, descriptor, 0, 0), "PR_SET_SECCOMP")


def filter_program(machine: str, pid: int) -> bytes:
    """The seccomp filter, in classic BPF: another architecture's calls (32-bit ones) kill, unknown ones fail."""
    column, audit = ARCHITECTURES[machine]
    kill, allow, refuse = (_step(0x06, value) for value in (0x80000000, 0x7FFF0000, 0x50000 | errno.EPERM))

    def low(argument: int) -> bytes:
        return _step(0x20, 16 + 8 * argument)

    def high(argument: int) -> bytes:
        return _step(0x20, 20 + 8 * argument)

    def equal(value: int, no: int) -> bytes:  # go on, or skip the next `no` instructions
        return _step(0x15, value, 0, no)

    to_itself = [low(0), equal(pid, 1), allow, refuse]
    guards = {
        # CLONE_THREAD, CLONE_FILES: threads, no processes, and none with open files of its own that nobody counts
        "clone": [low(0), _step(0x54, 0x10400), equal(0x10400, 1), allow, refuse],
        "kill": to_itself,
        "tgkill": to_itself,
        "prlimit64": [low(2), equal(0, 3), high(2), equal(0, 1), allow, refuse],  # reads limits, sets none
        # FIOCLEX, FIONCLEX and FIONBIO, by which Python sets up its own descriptors; to the rest: not a terminal
        "ioctl": [
            low(1), equal(0x5451, 1), allow, equal(0x5450, 1), allow, equal(0x5421, 1), allow,
            _step(0x06, 0x50000 | errno.ENOTTY),
        ],
        # F_SETOWN, F_SETSIG, F_SETOWN_EX would make the kernel send a signal to any process
        "fcntl": [low(1), equal(8, 1), refuse, equal(10, 1), refuse, equal(15, 1), refuse, allow],
        # reading with O_TRUNC empties a file, which the first two ABIs of Landlock do not see
        "openat": [low(2), _step(0x54, 0x203), equal(0x200, 1), refuse, allow],
        # AF_UNIX streams, connected to each other for good: what an event loop wakes itself by
        "socketpair": [low(0), equal(1, 4), low(1), _step(0x54, ~0x80800 & 0xFFFFFFFF), equal(1, 1), allow, refuse],
    }  # fmt: skip
    steps = [_step(0x20, 4), _step(0x15, audit, 1, 0), kill, _step(0x20, 0)]
    for name, numbers in GUARDED.items():
        steps += [equal(numbers[column], len(guards[name])), *guards[name]]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            steps += [equal(numbers[column], 1), allow]
    # x86's x32 calls have bit 30 set, so they are among the recent ones.
    return b"".join([*steps, _step(0x35, FIRST_RECENT, 0, 1), _step(0x06, 0x50000 | errno.ENOSYS), refuse])


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(f"{what} failed: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
