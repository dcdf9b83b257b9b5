"""What code in the sandbox tries, it must not manage; the tests run as root too, if the suite does."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_grpo.rewards import RewardRunner, code_reward, get_code_reward
from lowmem_grpo.rewards.code import last_python_block
from lowmem_grpo.rewards.isolation import jail, sandbox
from lowmem_grpo.rewards.isolation.sandbox import Limits, SandboxError, cannot_isolate, run_program, run_tests

pytestmark = pytest.mark.skipif(
    cannot_isolate() is not None, reason=f"this system cannot isolate code: {cannot_isolate()}"
)


def attempt(code: str, given: str = "", **limits) -> str | None:
    return run_program(textwrap.dedent(code), given, Limits(**{"seconds": 10.0, **limits}))


def error_of(statement: str) -> str | None:
    """The name of the errno with which a statement fails in the sandbox, or "no error"."""
    code = f"""
import ctypes, errno, fcntl, os, resource, signal, shutil, socket, subprocess, sys, threading
try:
    {statement}
    print("no error")
except OSError as error:
    print(errno.errorcode.get(error.errno, error.errno))
except ValueError as error:  # resource's word for EPERM
    print("EPERM" if "not allowed" in str(error) else error)
"""
    return (attempt(code) or "").strip()


def test_a_program_computes_in_its_folder():
    code = """
    import collections, dataclasses, heapq, itertools, json, random, re, sys, threading
    @dataclasses.dataclass
    class Point:
        x: int
    n = int(input())
    with open("notes.txt", "w") as file:
        file.write("kept")
    print(n * 2, open("notes.txt").read(), Point(3), __name__)
    thread = threading.Thread(target=lambda: print("thread", flush=True))
    thread.start(); thread.join()
    sys.exit(0)
    """
    assert attempt(code, "21\n") == "42 kept Point(x=3) __main__\nthread\n"


def test_numpy_and_asyncio_work():
    assert attempt("import numpy; print(numpy.arange(4).sum())") == "6\n"
    assert attempt("import asyncio; print(asyncio.run(asyncio.sleep(0.01, 'slept')))") == "slept\n"


FOLDER = tempfile.TemporaryDirectory()
OUTSIDE = Path(FOLDER.name) / "secret.txt"  # of the suite, so that nothing is lost where the sandbox fails
OUTSIDE.write_text("secret")


@pytest.mark.parametrize(
    "statement",
    [
        "open('/etc/passwd').read()",
        "open(OUTSIDE).read()",
        "os.listdir(FOLDER)",
        "os.listdir('/')",
        "os.listdir('..')",
        "open('/proc/self/environ').read()",
        "open('/proc/1/environ').read()",
        "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
        "open('/dev/urandom', 'rb').read(1)",
        "open('/tmp/escaped', 'w')",
        "open('../escaped', 'w')",
        "open(OUTSIDE, 'a')",
        "os.open(OUTSIDE, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate(OUTSIDE, 0)",
        "os.unlink(OUTSIDE)",
        "os.rename(OUTSIDE, 'mine')",
        "os.link(OUTSIDE, 'mine')",
        "os.chmod(OUTSIDE, 0o777)",
        "os.chown(OUTSIDE, 1, 1)",
        "os.utime(OUTSIDE)",
        "os.mkdir('folder')",
        "os.mkfifo('pipe')",
        "os.symlink('/etc/passwd', 'link')",
        "os.chroot('.')",
        "os.execv('/bin/true', ['true'])",
    ],
)
def test_no_file_outside_its_folder_is_read_written_or_changed(statement):
    """Where OUTSIDE lies is not in a test's name, by which parallel runs share the tests out."""
    statement = statement.replace("OUTSIDE", repr(str(OUTSIDE))).replace("FOLDER", repr(FOLDER.name))
    before = OUTSIDE.read_bytes(), OUTSIDE.stat().st_mode, OUTSIDE.stat().st_mtime, OUTSIDE.stat().st_uid
    assert error_of(statement) in ("EACCES", "EPERM", "EXDEV")
    assert before == (OUTSIDE.read_bytes(), OUTSIDE.stat().st_mode, OUTSIDE.stat().st_mtime, OUTSIDE.stat().st_uid)
    assert not Path("/tmp/escaped").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair()[0].connect('/run/anything')",
    ],
)
def test_no_socket_reaches_anyone(statement):
    assert error_of(statement) == "EPERM"


def test_a_listening_server_hears_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        code = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{server.getsockname()[1]}')"
        assert attempt(code) is None
        with pytest.raises(BlockingIOError):  # nobody has connected: the code has come to its end
            server.accept()


@pytest.mark.parametrize(
    "statement",
    [
        "os.fork()",
        "os.forkpty()",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.setsid()",
        "os.kill(os.getppid(), 0)",
        "os.kill(0, 9)",
        "os.killpg(os.getpgid(0), 9)",
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, resource.prlimit(0, resource.RLIMIT_NOFILE))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 0)",
        "os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0))",
        "os.setuid(0)",
        "os.memfd_create('memory')",
    ],
)
def test_no_process_is_started_signalled_or_changed(statement):
    assert error_of(statement) in ("EPERM", "EACCES", "ENOSYS")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ptrace", 101), ("process_vm_readv", 310), ("unshare", 272), ("setns", 308), ("mount", 165), ("bpf", 321),
        ("keyctl", 250), ("shmget", 29), ("prctl", 157), ("seccomp", 317), ("perf_event_open", 298), ("reboot", 169),
        ("open_by_handle_at", 304), ("io_uring_setup", 425), ("pidfd_open", 434), ("clone3", 435), ("vfork", 58),
        ("tkill", 200), ("rt_sigqueueinfo", 129), ("personality", 135), ("x32 getpid", 0x40000000 + 39),
        ("an unknown one", 9999),
    ],
)  # fmt: skip
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are x86_64's")
def test_dangerous_calls_are_refused_by_number(name, number):
    code = f"""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    print(libc.syscall({number}, 0, 0, 0, 0, 0, 0), ctypes.get_errno())
    """
    assert attempt(code) in ("-1 1\n", "-1 38\n"), name


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit calls are x86's")
def test_a_32_bit_call_ends_the_process():
    code = """
    import ctypes, mmap
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    print("before", flush=True)
    print("after", call(), flush=True)
    """
    status, output, _ = sandbox._run({"code": textwrap.dedent(code), "tests": None}, "", Limits(10.0))
    assert output == "before\n" and status == -31  # SIGSYS


def processes_with(mark: str) -> list[Path]:
    """/proc/{id} of the processes whose command has the mark in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_text():
                found.append(path.parent)
    return found


def until(happened: Callable[[], bool]) -> None:
    """Wait for an event; fail where it has not come after a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def own_jail(tmp_path, monkeypatch) -> str:
    """A jail that no other test's process runs, whose processes can be told apart by its path."""
    monkeypatch.setattr(sandbox, "JAIL", Path(shutil.copy(jail.__file__, tmp_path)))
    return str(sandbox.JAIL)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "import signal\nfor n in range(1, 32):\n    n in (9, 19) or signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(600)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
        "import atexit, time\natexit.register(time.sleep, 600)",
        "x = 10 ** 10 ** 10",
        "import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
    ],
)
def test_nothing_outlives_its_limit(code, own_jail):
    started = time.monotonic()
    assert attempt(code, seconds=2.0) is None  # of which a busy machine takes some to start
    assert time.monotonic() - started < 60  # of 600
    assert not processes_with(own_jail)


def test_the_jail_dies_with_its_trainer(own_jail):
    """Killed in the midst of its code, which shows from outside: it has a second thread."""
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    folder = Path(shutil.copy(sandbox.__file__, Path(own_jail).parent)).parent  # alone, it imports no PyTorch
    trainer = f"import sandbox; sandbox.run_program({code!r}, '', sandbox.Limits(600.0))"
    process = subprocess.Popen([sys.executable, "-c", trainer], env={**os.environ, "PYTHONPATH": str(folder)})
    until(lambda: any(len(list(path.glob("task/*"))) == 2 for path in processes_with(own_jail)))
    process.kill()
    process.wait()
    until(lambda: not processes_with(own_jail))


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(2 << 30)",
        "x = []\nwhile True: x.append(bytes(64 << 20))",
        "print('x' * (4 << 20))",
        "while True: print('x' * 1000)",
        "with open('big', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))",
        "n = 0\nwhile True:\n    open(f'file{n}', 'w').close()\n    n += 1",
        "n = 0\nwhile True:\n    open(f'file{n}', 'wb').write(b'x' * (7 << 20))\n    n += 1",
        "def f(): f()\nf()",
        "raise SystemExit(1)",
        "import os; os.abort()",
        "1 / 0",
        "not python",
    ],
)
def test_too_much_of_anything_is_a_failure(code):
    assert attempt(code) is None


UNLINKED = "file = open(f'{n}', 'wb'); os.unlink(f'{n}')"
NAMELESS = "file = os.fdopen(os.open('.', os.O_TMPFILE | os.O_WRONLY), 'wb')"
MAPPED = "file = open(f'{n}', 'w+b')"


@pytest.mark.parametrize(
    ("make", "keep"), [(UNLINKED, "file"), (NAMELESS, "file"), (MAPPED, "mmap.mmap(file.fileno(), 4096)")]
)
def test_files_without_a_name_count_too(make, keep):
    """55 files of 8 MB are 440 MB on the disk, of 32 MiB that are allowed."""
    code = f"""
    import mmap, os, time
    kept = []
    for n in range(55):
        {make}
        file.write(bytes(8 << 20)); file.flush()
        kept.append({keep})
        {"file.close(); os.unlink(f'{n}')" if make == MAPPED else ""}
    time.sleep(2)
    """
    assert attempt(code) is None
    assert attempt(code.replace("55", "3")) == ""


def test_a_temporary_file_and_a_shared_mapping_are_usual():
    code = """
    import mmap, tempfile
    with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryFile("w+") as other:
        file.write("a" * 1000)
        memory = [mmap.mmap(-1, 4096) for _ in range(10)]
    print("done")
    """
    assert attempt(code) == "done\n"


def test_limits_are_the_programs_own():
    assert attempt("x = bytearray(200 << 20); print(len(x))", memory_mb=512) == f"{200 << 20}\n"
    assert attempt("x = bytearray(200 << 20); print(len(x))", memory_mb=128) is None


def test_no_secret_is_in_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in (attempt("import os; print(dict(os.environ))") or "secret")


TESTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double('a') == 'aa'"]


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("def double(x): return x + x", [True, True, True]),
        ("def double(x): return 2 * int(x)", [True, True, False]),
        ("def double(x): return 4", [True, False, False]),
        ("def double(x): raise SystemExit(0)", [False, False, False]),
        ("import os\ndef double(x): os._exit(0)", [False, False, False]),
        ("import os\nprint('passed 0 passed 1 passed 2')\nos._exit(0)", [False, False, False]),
        (
            "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'ready\\npassed 0\\npassed 1\\n')\n    except OSError: pass",
            [False] * 3,
        ),
        ("def double(x):\n    while True: pass", [False, False, False]),
        ("exit()\ndef double(x): return x + x", [False, False, False]),
        ("if __name__ == '__main__': input()\ndouble = lambda x: x + x", [True, True, True]),
        ("def double(x", [False, False, False]),
    ],
)
def test_asserts_are_counted_one_by_one(code, passed):
    assert run_tests(code, TESTS, Limits(2.0)) == passed


def test_the_time_of_the_code_begins_as_the_code_does(tmp_path, monkeypatch):
    """And not as Python does, which takes its time where many processes start."""
    slow = tmp_path / "slow.py"
    slow.write_text(f"import runpy, time\ntime.sleep(1)\nrunpy.run_path({str(sandbox.JAIL)!r}, run_name='__main__')\n")
    monkeypatch.setattr(sandbox, "JAIL", slow)
    assert run_tests("", ["pass", "while True: pass"], Limits(0.5)) == [True, False]
    monkeypatch.setattr(sandbox, "START_LIMIT_S", 0.3)
    with pytest.raises(sandbox.SandboxError, match="^a process did not come to the code within 0.3 s"):
        run_tests("", ["pass"], Limits(10.0))


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def test_a_completion_is_judged_by_its_last_python_block():
    assert last_python_block("```python\na\n```\n```py\nb\n```\n```\noutput\n```") == "b\n"
    assert last_python_block("```python\nnever ends") is None
    assert last_python_block("no code") is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("So:\n```\na\n```\nDone.", "a\n"),
        ("```python\r\nif a:\r\n    b\r\n```\r\n", "if a:\n    b\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        ("``` python\na\n```", "a\n"),
        ("```Python title\na\n``` Done.", "a\n"),
        ("````python\na\n````", "a\n"),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("```\noutput\n```python\na\n```", "a\n"),
        ('```python\n"""\n    ```\n    a\n    ```\n"""\n```', '"""\n    ```\n    a\n    ```\n"""\n'),
        ("```python\na\n```\n```\noutput\n```", "a\n"),
        ("```\na\n```\n```\noutput\n```", None),
        ("```\na\n```\n```text\noutput\n```", None),
        ("```python\na = '\x0c\u2028'\n```", "a = '\x0c\u2028'\n"),
        ("```js\na\n```", None),
        ("```a = 1```\n", None),
        ("```\nnever ends", None),
    ],
)
def test_fences_are_found_as_models_write_them(text, code):
    assert last_python_block(text) == code


def test_many_fences_are_read_in_linear_time():
    started = time.process_time()
    for piece in ("```python\n", "```", "``` \n", " ", "\n ", "```python" + " " * 50):
        last_python_block(piece * (1_000_000 // len(piece)) + "`")
    assert time.process_time() - started < 10


def test_rewards_for_asserts_and_for_programs():
    good, half = block("def double(x): return x + x"), block("def double(x): return 2 * int(x)")
    completions = [good, half, "no code", [{"role": "assistant", "content": good}], good]
    rows = [TESTS, TESTS, TESTS, '["assert double(2) == 4"]', None]
    assert code_reward(completions=completions, tests=rows) == [1.0, 0.0, 0.0, 1.0, None]
    assert get_code_reward(fraction=True)(completions=completions, tests=rows) == [1.0, 2 / 3, 0.0, 1.0, None]
    program = block("print(int(input()) + 1)\nprint()")
    pairs = [{"input": "1\n", "output": "2"}, {"input": "2\n", "output": "3  \n"}, {"input": "x", "output": "4"}]
    columns = {"input": ["1", "5"], "output": ["2", "6"]}
    rows = [pairs[:2], pairs, columns, [{"input": "1", "output": "1"}]]
    assert code_reward(completions=[program] * 4, tests=rows) == [1.0, 0.0, 1.0, 0.0]
    assert get_code_reward(fraction=True)(completions=[program] * 4, tests=rows) == [1.0, 2 / 3, 1.0, 0.0]


def test_a_forged_verdict_is_no_output():
    forger = block("import os\nos.write(1, b'2')\nos._exit(1)")
    assert code_reward(completions=[forger], tests=[[{"input": "1", "output": "2"}]]) == [0.0]


MALFORMED = [
    3, [3], [{"input": "1"}], "[oops", {"a": 1}, {"input": ["1"], "output": []}, {"input": 5, "output": 5}, "[" * 100_000, True,
    ["assert '\ud800'"], [{"input": "\ud800", "output": ""}], [["assert True"]], [None], 0.5, b"assert True",
]  # fmt: skip


@pytest.mark.parametrize("tests", MALFORMED)
def test_a_malformed_row_costs_one_completion_and_is_found_at_the_start(tests):
    rows = [TESTS, tests, TESTS]
    scores = RewardRunner([code_reward], 60)(
        ["p"] * 3, [block("double = lambda x: x + x")] * 3, [[1]] * 3, {"tests": rows}, 1
    )
    assert scores.rewards[:, 0].tolist()[::2] == [1.0, 1.0] and scores.rewards[1].isnan()
    assert scores.metrics["rewards/code_reward/failures"] == 1
    with pytest.raises(ValueError, match="^row 1 of train_dataset: a row's tests"):
        RewardRunner([code_reward]).check_rows([{"tests": row} for row in rows], "train_dataset")


@pytest.mark.parametrize("tests", [3, [3], [{"input": "1"}], "[oops", {"a": 1}])
def test_tests_in_another_form_stop_the_run_at_its_start(tests):
    with pytest.raises(ValueError, match="a row's tests are"):
        RewardRunner([code_reward], 60).try_out(["p"], {"tests": [tests]})


def test_without_a_column_of_tests_the_run_stops_at_its_start():
    with pytest.raises(ValueError, match="needs a dataset column named tests"):
        RewardRunner([code_reward], 60).try_out(["p"], {})


def test_a_system_that_cannot_isolate_is_refused_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr("lowmem_grpo.rewards.code.cannot_isolate", lambda: "the kernel has no Landlock")
    with pytest.raises(ValueError, match="cannot isolate code here: the kernel has no Landlock.*allow_unsafe=True"):
        RewardRunner([code_reward], 60).try_out(["p"], {"tests": [TESTS]})
    unsafe, mark = get_code_reward(allow_unsafe=True), f"61{os.getpid()}.5"
    escape = f"import subprocess\ndef double(x):\n    subprocess.Popen(['sleep', '{mark}'])\n    return x + x"
    assert unsafe(completions=[block(escape)], tests=[TESTS]) == [1.0]
    until(lambda: not processes_with(mark))


def test_a_jail_that_fails_to_isolate_runs_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "jail.py"
    broken.write_text(Path(jail.__file__).read_text().replace("444, 445, 446", "9991, 9992, 9993"))
    monkeypatch.setattr(sandbox, "JAIL", broken)
    with pytest.raises(SandboxError, match="no Landlock"):
        run_tests("", ["pass"], Limits(10.0))


def test_the_numbers_of_calls_are_the_kernels():
    headers = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")]
    for column, header in enumerate(headers):
        if not header.exists():
            pytest.skip(f"{header} is not installed")
        numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
        if column:
            numbers |= {"newfstatat": "79"}  # 3264_fstatat there
        for name, own in {**jail.ALLOWED, **jail.GUARDED}.items():
            assert own[column] is None or own[column] == int(numbers[name]), name


def test_both_filters_are_programs_the_kernel_could_take():
    for machine in jail.ARCHITECTURES:
        assert len(jail.filter_program(machine, 1)) // 8 < 4096  # BPF_MAXINSNS
