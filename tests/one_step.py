"""How much a reader of one default training step reads: lines, branches and files of the functions that it enters.

    python tests/one_step.py [COMMIT]

Runs the demo for two steps and notes which functions of the package are entered from the second step's start to its
end; train() counts as a whole. A line is one of code: no docstring, no comment, no blank. A branch is an `if`, an
inline `if`, a `while` or an `except`. The closed doors of DOORS are never entered. Those of PASSED_BY have names that
let a reader pass them by, and the last line counts what is left then.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOORS = {  # parts of file names
    "the sampler": ("/generate/", "/answering"),
    "the kernels": ("/kernels/",),
    "the attention": ("/attention", "/packed_attention", "/lora", "/trial"),
    "the isolation of rewards": ("/rewards/",),
    "not of a step": ("/demo/", "/benchmarks/"),
}
PASSED_BY = {
    "Run and Learner": ("/run/", "/update/optimizer"),
    "TokenBudget.fit": ("/out_of_memory",),
    "pack": ("/model/packing",),
    "TokenMeter": ("/update/token_metrics",),
    "settings": ("/config",),
}


def entered() -> dict[str, list[str]]:
    """Qualified names of the functions that the second step of a run enters, by file; and train() itself."""
    from lowmem_grpo import GRPOConfig, train
    from lowmem_grpo.demo import task
    from lowmem_grpo.demo.run import MODEL

    package = str(Path(sys.modules["lowmem_grpo"].__file__ or "").parent)
    seen: set = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            seen.add(frame.f_code)

    def after_step(step, *_):
        sys.setprofile(note if step == 1 else None)

    config = GRPOConfig(output_dir="out", max_steps=2, max_completion_length=16, use_cpu=True, save_steps=100)
    rows = task.rows(task.splits()[0])
    train(str(MODEL), task.answer_reward, rows, config=config, callbacks=after_step)
    sys.setprofile(None)
    found = defaultdict(list)
    seen.add(inspect.unwrap(train).__code__)
    for code in seen:
        found[code.co_filename].append(f"{code.co_firstlineno} {code.co_name}")
    return {name: sorted(functions) for name, functions in found.items()}


def counted(path: Path, functions: list[str]) -> tuple[int, int]:
    """Lines of code and branches of a file's functions, given by first line and name; a nested one with its owner."""
    text = path.read_text(encoding="utf-8")
    wanted = {int(name.split()[0]) for name in functions if "<" not in name}
    lines: set[int] = set()
    branches = 0
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    for node in nodes:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        assert node.end_lineno is not None
        if first not in wanted or any(
            other is not node and other.lineno <= node.lineno and (other.end_lineno or 0) >= node.end_lineno
            for other in nodes
        ):
            continue
        documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        docstring = range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1) if documented else ()
        own = set(range(first, node.end_lineno + 1)) - set(docstring)
        lines |= {n for n in own if (line := text.splitlines()[n - 1].strip()) and not line.startswith("#")}
        branches += sum(isinstance(n, ast.If | ast.IfExp | ast.While | ast.ExceptHandler) for n in ast.walk(node))
    return len(lines), branches


def main() -> None:
    if sys.argv[1:] == ["--entered"]:
        print(json.dumps(entered()))
        return
    with tempfile.TemporaryDirectory() as made:
        tree = ROOT
        if sys.argv[1:]:
            tree = Path(made) / "tree"
            subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, sys.argv[1]], cwd=ROOT, check=True)
        try:
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            command = [sys.executable, __file__, "--entered"]
            found = json.loads(subprocess.check_output(command, cwd=made, env=environment, text=True).splitlines()[-1])
            total, left = [0, 0, 0], [0, 0, 0]
            for name in sorted(found):
                if any(part in name for parts in DOORS.values() for part in parts):
                    continue
                lines, branches = counted(Path(name), found[name])
                total = [total[0] + lines, total[1] + branches, total[2] + 1]
                if lines and not any(part in name for parts in PASSED_BY.values() for part in parts):
                    left = [left[0] + lines, left[1] + branches, left[2] + 1]
                print(f"{lines:5} lines {branches:4} branches  {name[len(str(tree)) + 1 :]}")
            for (lines, branches, files), doors in ((total, DOORS), (left, {**DOORS, **PASSED_BY})):
                print(f"{lines:5} lines {branches:4} branches {files:4} files in all; closed: {', '.join(doors)}")
        finally:
            if tree != ROOT:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
