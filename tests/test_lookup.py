"""Bad input is answered before anything is imported that computes, and without the hub's client's many tries."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_models import DEMO_MODEL

# Runs each of several commands, and prints its status and its sentence; what takes seconds cannot be imported.
PROGRAM = """
import contextlib, io, json, sys
for name in ("torch", "transformers", "datasets", "peft", "accelerate"):
    sys.modules[name] = None
from lowmem_grpo import cli, lookup
lookup.PAUSE_S = 0.0
for command in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = cli.main(command)
        except ModuleNotFoundError:
            status = None  # the names are taken, and what computes is next
    print(json.dumps([status, said.getvalue().strip()]))
"""
MODEL, ROWS, REWARD = ("--model", str(DEMO_MODEL)), ("--dataset", "rows.jsonl"), ("--reward_funcs", "accuracy_reward")
TRAIN = ("train", *MODEL, *ROWS)
PHASES = "model: {model}\noutput_dir: out\nphases: [{{name: a, kind: {kind}, dataset: {dataset}{more}}}]\n"
FILES = {
    "own.py": "def plain(completions, **columns): ...", "rows.jsonl": '{"prompt": "1+1=", "solution": "2"}\n', "empty.jsonl": "", "rows.txt": "1+1=", "file": "",
    "out/checkpoint-2/trainer_state.json": "{}", "run/adapter/adapter_config.json": "{}",
    "kind.yaml": PHASES.format(model=DEMO_MODEL, kind="grop", dataset="rows.jsonl", more=""),
    "file.yaml": PHASES.format(model=DEMO_MODEL, kind="sft", dataset="rowss.jsonl", more=""),
    "rewards.yaml": PHASES.format(model=DEMO_MODEL, kind="grpo", dataset="rows.jsonl", more=""),
    "reward.yaml": PHASES.format(model=DEMO_MODEL, kind="grpo", dataset="rows.jsonl", more=", reward_funcs: acuracy"),
    "model.yaml": PHASES.format(model="./nowhere", kind="sft", dataset="rows.jsonl", more=""),
}  # fmt: skip
MISTAKES = [
    (TRAIN, "reward_funcs is missing"),
    ((*TRAIN, "--reward_funcs", "acuracy_reward"), "did you mean accuracy_reward?"),
    ((*TRAIN, "--reward_funcs", "my_own.brevity"), "cannot be imported: No module named 'my_own'"),
    ((*TRAIN, "--reward_funcs", "get_regex_reward"), "call it: get_regex_reward(pattern"),
    ((*TRAIN, "--reward_funcs", "get_regex_reward(patern='x')"), "missing a required argument: 'pattern'"),
    ((*TRAIN, "--reward_funcs", "os.system"), "is of Python's own"),
    ((*TRAIN, "--reward_funcs", "./own.py:plain"), "name it as Python imports it: own.plain"),
    ((*TRAIN, "--reward_funcs", "own:plain"), "name it as Python imports it: own.plain"),
    ((*TRAIN, "--reward_funcs", "accuracy_reward,code_reward"), "give each of several by itself"),
    ((*TRAIN, "--reward_funcs", "accuracy_reward()"), "is a reward function itself"),
    ((*TRAIN, "--reward_funcs", "own.plain(scale=1)"), "missing a required argument: 'completions'"),
    ((*TRAIN, "--reward_funcs", "./rm"), "reward model './rm' is not a folder"),
    ((*TRAIN, *REWARD, "--reward_weights", "1", "2"), "has 2 numbers for 1 reward function; give one for each"),
    (
        ("train", *MODEL, "--dataset", "rowss.jsonl", *REWARD),
        "is not a file on this machine; did you mean 'rows.jsonl'?",
    ),
    (("train", *MODEL, "--dataset", "empty.jsonl", *REWARD), "is empty"),
    (("train", *MODEL, "--dataset", "rows.txt", *REWARD), "is a file of another format"),
    (("train", *MODEL, "--dataset", "./rows", *REWARD), "is no file or folder on this machine"),
    (("train", *MODEL, "--dataset", "countdown?sise=5"), "has no option 'sise'; did you mean size?"),
    ((*TRAIN, *REWARD, "--eval_dataset", "none.csv"), "eval_dataset 'none.csv' is not a file"),
    ((*TRAIN, *REWARD, "--eval_steps", "5"), "there is no eval_dataset"),
    (("train", "--model", "./nowhere", *ROWS, *REWARD), "model './nowhere' is not a folder"),
    (
        ("train", "--model", "https://huggingface.co/Qwen/Qwen2.5-0.5B", *ROWS, *REWARD),
        "did you mean 'Qwen/Qwen2.5-0.5B'?",
    ),
    (("train", "--model", "file", *ROWS, *REWARD), "is a file; name the folder that it is in"),
    (("train", "--model", "run", *ROWS, *REWARD), "is the output of a run; its adapter is run/adapter"),
    ((*TRAIN, "--teacher", "./nowhere"), "teacher './nowhere' is not a folder"),
    ((*TRAIN, *REWARD, "--adv_estimator", "gae", "--critic_init", "none"), "is no adapter with a score head"),
    ((*TRAIN, *REWARD, "--output_dir", "file/x"), "cannot be written: Not a directory"),
    ((*TRAIN, *REWARD, "--output_dir", "out"), "holds checkpoint-2 of an earlier run"),
    ((*TRAIN, *REWARD, "--output_dir", "new", "--resume_from_checkpoint", "true"), "has no whole checkpoint"),
    (("sft", *MODEL, "--dataset", "rows.jsonl", "none.jsonl"), "train_dataset 'none.jsonl' is not a file"),
    (("reward", *MODEL, "--dataset", "none.jsonl"), "is not a file"),
    (("sample", *MODEL, "--dataset", "none.jsonl"), "is not a file"),
    (("eval", *MODEL, *ROWS), "reward_funcs is missing"),
    (("eval", *MODEL, "--dataset", "none.jsonl", *REWARD), "eval_dataset 'none.jsonl' is not a file"),
    (("data", *MODEL, *ROWS, "--reward_funcs", "acuracy_reward"), "did you mean accuracy_reward?"),
    (("plan", "--model", "./nowhere"), "is not a folder"),
    (("export", "--model", "./nowhere", "--merge", "merged"), "is not a folder"),
    (("r1", "--config", "kind.yaml", "--dry_run"), "phase a: kind 'grop' is none; did you mean grpo?"),
    (("r1", "--config", "file.yaml", "--dry_run"), "phase a: train_dataset 'rowss.jsonl' is not a file"),
    (("r1", "--config", "rewards.yaml", "--dry_run"), "phase a: reward_funcs is missing"),
    (("r1", "--config", "reward.yaml", "--dry_run"), "phase a: no reward function is named 'acuracy'"),
    (("r1", "--config", "model.yaml", "--dry_run"), "model './nowhere' is not a folder"),
    (("r1", "--config", "file.yaml", "--until", "b"), "--until 'b' is none of the phases"),
    (("r1", "--config", "file.yaml", "--from", "b"), "--from 'b' is none of the phases"),
]


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run(commands, folder, **environment):
    """The status and the sentence of each command, run in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(commands), cwd=folder,
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(commands), done.stderr
    return lines


def answered(mistakes, folder, **environment):
    """Compare what each command says."""
    lines = run([command for command, _ in mistakes], folder, **environment)
    for (status, said), (command, words) in zip(lines, mistakes, strict=True):
        assert status == 2 and words in said and "\n" not in said, f"{command}: {said}"


def test_mistakes_are_answered_without_what_computes(tmp_path):
    write(tmp_path, FILES)
    answered(MISTAKES, tmp_path)


# What the hub's cache has: a model in GGUF, and one of another branch than main, that was downloaded to be offline.
CACHE = {
    "hub/models--me--gguf/refs/main": "abc", "hub/models--me--gguf/snapshots/abc/x.gguf": "x",
    "hub/models--me--branch/refs/v2": "abc", "hub/models--me--branch/snapshots/abc/config.json": "{}",
    "hub/datasets--me--rows/refs/main": "abc", "hub/datasets--me--rows/snapshots/abc/rows.jsonl": "{}",
    "datasets/me___more_rows/x": "",
}  # fmt: skip
COMMON = PHASES.replace("phases", "common: {{model_init_kwargs: {{{common}}}}}\nphases")
TAKEN_FILES = {
    **CACHE, "rows.jsonl": FILES["rows.jsonl"], "odd name/config.json": "{}", "run/checkpoint-2/trainer_state.json": "{}",
    "gguf.yaml": COMMON.format(model="me/gguf", kind="sft", dataset="rows.jsonl", more="", common="gguf_file: x.gguf"),
    "branch.yaml": COMMON.format(model="me/branch", kind="sft", dataset="rows.jsonl", more="", common="revision: v2"),
    "served.yaml": PHASES.format(
        model="large", kind="sample", dataset="rows.jsonl", more=", base_url: 'http://localhost:1/v1'"
    ),
    "done.yaml": "model: ./gone\noutput_dir: done\nphases: [{name: a, kind: sft, dataset: rows.jsonl}, "
    "{name: b, kind: sft, dataset: rows.jsonl}]\n",
    "done/01-a/done.json": "{}",
    "number.yaml": "model: 3\ndataset: rows.jsonl\nreward_funcs: [accuracy_reward]\n",
    "own.py": '''
import functools

def scaled(function):
    @functools.wraps(function)
    def inner(**arguments):
        return function(scale=2.0, **arguments)
    return inner

@scaled
def get_reward(scale, offset):
    return lambda completions, **columns: [scale + offset] * len(completions)

class Table(dict):
    def __call__(self, completions, **columns):
        return [0.0] * len(completions)
''',
}  # fmt: skip
OF_KWARGS = ("--model_init_kwargs", '{"gguf_file": "x.gguf", "subfolder": null}')
TAKEN = [
    (*TRAIN, *REWARD, "--teacher", "base", "--teacher_system_prompt", "Be brief."),
    (*TRAIN, "--reward_funcs", "own.get_reward(offset=1.0)"),
    (*TRAIN, "--reward_funcs", "own.Table(a=1)"),
    ("train", *MODEL, "--dataset", "me/rows", *REWARD),
    ("train", *MODEL, "--dataset", "me/More_Rows", *REWARD),
    ("train", *MODEL, "--dataset", "hf://datasets/me/rows", *REWARD),
    ("train", "--model", "me/gguf", *ROWS, *REWARD, *OF_KWARGS),
    ("train", "--model", "odd name", *ROWS, *REWARD),
    ("train", "--model", "./gone", *ROWS, *REWARD, "--output_dir", "run", "--resume_from_checkpoint", "auto"),
    ("train", "--config", "number.yaml"),
    *[("r1", "--config", name, "--dry_run") for name in ("gguf.yaml", "branch.yaml", "served.yaml", "done.yaml")],
]


def test_what_is_there_or_is_no_name_is_not_refused_early(tmp_path):
    write(tmp_path, TAKEN_FILES)
    lines = run(TAKEN, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    refused = {" ".join(command): line for command, line in zip(TAKEN, lines, strict=True) if line != [None, ""]}
    assert not refused


@pytest.fixture
def hub():
    """The address of a hub on this machine, whose answer is in a repository's name."""
    codes = {"gated": "GatedRepo", "missing": "RepoNotFound", "revision": "RevisionNotFound"}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            name = next((name for name in codes if name in self.path), None)
            self.send_response(401 if name != "revision" else 404)
            if name:
                self.send_header("X-Error-Code", codes[name])
            else:
                self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def of_hub(name, *more):
    return ("train", "--model", name, *ROWS, *REWARD, *more)


def test_each_refusal_of_the_hub_has_a_sentence(tmp_path, hub):
    (tmp_path / "rows.jsonl").write_text(FILES["rows.jsonl"])
    mistakes = [
        (of_hub("me/gated"), f"it is gated; accept its conditions at {hub}/me/gated, and log in by `hf auth login`"),
        (of_hub("me/missing"), "has none of this name, or a private one; check the name, or log in by"),
        (of_hub("me/revision", "--model_init_kwargs", '{"revision": "v9"}'), "it has no revision 'v9'"),
        (of_hub("me/secret"), "does not take the token"),
        (("train", *MODEL, "--dataset", "me/missing", *REWARD), "train_dataset 'me/missing' is neither a JSONL, JSON"),
        (("train", *MODEL, "--dataset", "me/gated", *REWARD), f"at {hub}/datasets/me/gated"),
    ]
    (tmp_path / "home").mkdir()
    answered(mistakes, tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_TOKEN="")


def test_without_a_network_a_name_is_answered_at_once(tmp_path):
    """A port that nobody listens on, which the hub's client would ask six times within 23 s."""
    (tmp_path / "rows.jsonl").write_text(FILES["rows.jsonl"])
    (tmp_path / "gsm8k-model").mkdir()
    mistakes = [
        (of_hub("me/model"), "cannot be reached ([Errno 111] Connection refused), and the hub's cache has none of"),
        (of_hub("gsm8k-modl"), "did you mean 'gsm8k-model'?"),
        (("train", *MODEL, "--dataset", "me/rows", *REWARD), "cannot be reached"),
    ]
    home = str(tmp_path / "home")
    answered(mistakes, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=home)
    offline = [(of_hub("me/model"), "HF_HUB_OFFLINE is set, and the hub's cache has none of this name")]
    answered(offline, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=home)
