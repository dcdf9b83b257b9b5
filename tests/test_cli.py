import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import pytest
from test_config import TEXTS
from test_terminal import in_a_terminal
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig, __version__, cli, evaluate
from lowmem_grpo.cli import settings, trainings
from lowmem_grpo.cli.output import open_closed
from lowmem_grpo.cli.parser import with_underscores
from lowmem_grpo.config.grpo import EVAL_FIELDS
from lowmem_grpo.demo import task
from lowmem_grpo.evaluation.show import as_table
from lowmem_grpo.run.progress import Progress

pytestmark = pytest.mark.usefixtures("known_trials")

INPUTS = {"model": "m", "dataset": "d", "reward_funcs": ["r"]}
FLAGS = ["--model", "m", "--dataset", "d", "--reward_funcs", "r"]


def flags(name, text):
    return [f"--{name}", *([text] if isinstance(text, str) else text)]


def parse(arguments):
    options, rest = cli.make_parser().parse_known_args(["train", *arguments])
    assert not rest
    given = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    return settings.read_settings(given)


def test_every_field_is_a_flag_and_survives():
    given = [flag for name, (text, _) in TEXTS.items() for flag in flags(name, text)]
    assert parse([*FLAGS, *given]) == (INPUTS, {name: value for name, (_, value) in TEXTS.items()})


def test_every_field_survives_a_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    lines = [
        f"{name}: {json.dumps(text if isinstance(value, str) else value)}" for name, (text, value) in TEXTS.items()
    ]
    path.write_text("\n".join(["model: m", "dataset: d", "reward_funcs: [r]", *lines]))
    assert parse(["--config", str(path)]) == (INPUTS, {name: value for name, (_, value) in TEXTS.items()})


def test_yaml_reads_a_number_with_an_exponent_as_a_text_and_we_do_not(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: d\nreward_funcs: r\nlearning_rate: 1e-4\n")
    inputs, fields = parse(["--config", str(path)])
    assert fields == {"learning_rate": 1e-4}
    assert inputs["reward_funcs"] == "r"


def test_flags_win_over_the_file_and_trls_names_are_known(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d\nreward_funcs: [r]\nseed: 1\nbeta: 0.5\n")
    assert parse(["--config", str(path), "--seed", "2"]) == (INPUTS, {"seed": 2, "beta": 0.5})
    assert parse(["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "r"]) == (INPUTS, {})


def test_a_truth_value_that_is_named_alone_is_true():
    given = ["--use_cpu", "--load_in_4bit", "false", "--resume_from_checkpoint"]
    assert parse([*FLAGS, *given])[1] == {"use_cpu": True, "load_in_4bit": False, "resume_from_checkpoint": True}


def test_a_dash_within_a_flag_is_an_underscore(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning-rate: 0.5\n")
    given = [
        "--model-name-or-path",
        "m",
        "--dataset-name=d",
        "--reward-funcs",
        "r",
        "--top-p=0.5",
        "--stop-strings",
        "a-b",
    ]
    assert parse([*map(with_underscores, given), "--config", str(path)]) == (
        INPUTS, {"top_p": 0.5, "stop_strings": ["a-b"], "learning_rate": 0.5},
    )  # fmt: skip
    for value in ("-1", "--", "-x", "a--b", "x=--y-z", "--=a-b"):
        assert with_underscores(value) == value


@pytest.mark.parametrize("written", [["a", "b"], ['["a", "b"]']])
def test_a_list_may_be_written_as_json(written):
    assert parse(["--model", "m", "--dataset", "d", "--reward_funcs", "r", "--stop_strings", *written]) == (
        INPUTS, {"stop_strings": ["a", "b"]},
    )  # fmt: skip
    assert parse(["--model", "m", "--dataset", "d", "--reward_funcs", "r", "--stop_strings", "[a", "[b]"]) == (
        INPUTS, {"stop_strings": ["[a", "[b]"]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "did you mean learning_rate"),
        (["--learning-rat", "1"], "did you mean learning_rate"),
        (["--use_vllm", "true"], "has no use_vllm: completions are sampled"),
        (["--use-peft", "true"], "has no use_peft: LoRA adapters are always what is trained"),
        (["--torch_dtype=bfloat16"], "has no torch_dtype: the compute dtype is bfloat16 by default"),
        (["--num_generations", "1"], "a group needs at least 2"),
        (["--learning_rate", "fast"], "learning_rate: 'fast' is not a number"),
        (["--seed", "1", "stray"], "stray is not understood"),
        (["--seed", "1", "max_steps=5"], "'max_steps=5' is not understood; write --max_steps '5'"),
        (["--seed", "1", "data.train_batch_size=5"], "has no data.train_batch_size: set prompts_per_step"),
        (["--config", "/no/such.yaml"], "cannot be read"),
        (["--reward_funcs", "broken_rewards.f"], "cannot be imported"),
        (["--dataset", "no_gold.jsonl"], "accuracy_reward needs the gold answers"),
        (["--seed", "5000000000"], "seed must be at most 4294967295"),
        (["--reward_funcs", "nothing"], "no reward function is named"),
        (["--model", "/no/such/folder"], "is not a folder on this machine"),
        (["--dataset", "/no/such.jsonl"], "is not a file on this machine"),
    ],
)
def test_bad_input_is_one_sentence_on_standard_error(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n')
    (tmp_path / "no_gold.jsonl").write_text('{"prompt": "1+1="}\n')
    (tmp_path / "broken_rewards.py").write_text("def f(:\n")
    inputs = {"--model": str(DEMO_MODEL), "--dataset": "rows.jsonl", "--reward_funcs": "accuracy_reward"}
    good = [word for flag, value in inputs.items() if flag not in arguments for word in (flag, value)]
    assert cli.main(["train", *good, *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1]
    assert errors[-1].startswith("lowmem-grpo train: ")
    assert "Traceback" not in "".join(errors)


@pytest.mark.parametrize(
    "bug", [ValueError("too many values to unpack"), TypeError("no"), FloatingPointError("underflow")]
)
def test_a_bug_is_no_bad_input_and_keeps_its_traceback(bug, monkeypatch):
    def read_settings(given, **_):
        raise bug

    monkeypatch.setattr(trainings, "read_settings", read_settings)
    with pytest.raises(type(bug), match=str(bug)):
        cli.main(["train"])


@pytest.mark.parametrize("missing", ["model", "dataset", "reward_funcs"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_missing_input_is_named(missing, command, capsys):
    arguments = [
        word
        for name, value in INPUTS.items()
        if name != missing
        for word in (f"--{name}", *([value] if isinstance(value, str) else value))
    ]
    assert cli.main([command, *arguments]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["just text", "- a\n- list", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "config file" in capsys.readouterr().err


def test_all_linear_can_be_said(tmp_path):
    assert parse([*FLAGS, "--lora_target_modules", "all-linear"]) == (INPUTS, {"lora_target_modules": "all-linear"})


def test_run_as_a_module_the_errors_are_the_same():
    command = [sys.executable, "-m", "lowmem_grpo.cli", "train", "--config", "/no/such.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lowmem-grpo train: config file '/no/such.yaml' cannot be read: No such file")


HELP = """
import sys
from lowmem_grpo.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    assert not {'torch', 'lowmem_grpo.lookup', 'lowmem_grpo.rewards'} & set(sys.modules)
"""


def shown_flags(*arguments):
    command = [sys.executable, "-c", HELP, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)), shown


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_help_shows_what_people_change_and_help_all_every_field_without_importing_torch(command):
    some, shown = shown_flags(command, "--help")
    every, all_shown = shown_flags(command, "--help_all")
    known = EVAL_FIELDS if command == "eval" else set(TEXTS)
    common = known & {field.name for field in dataclasses.fields(GRPOConfig) if field.metadata["common"]}
    assert some & set(TEXTS) == common and (8 if command == "eval" else 20) <= len(common) <= 30
    assert every & set(TEXTS) == known and every - some == known - common
    assert "--help_all every setting" in shown.splitlines()[-1]
    for title in ("run", "sampling") if command == "eval" else ("run", "objective", "saving"):
        assert f"\n{title}:\n" in shown and f"\n{title}:\n" in all_shown


def test_every_help_text_can_be_read_alone():
    """Sorted by name or found by a search, a text has no line before it that "its" or "such" could mean."""
    (commands,) = [vars(action)["choices"] for action in cli.make_parser(every_setting=True)._actions if action.choices]
    texts = {text for _, _, text in settings.INPUTS}
    for parser in commands.values():
        texts |= {action.help for action in parser._actions}
    assert len(texts) > len(TEXTS)
    for text in texts:
        assert not re.search(r"^(its|the same)\b|\b(there|such|of it)\b", text, re.IGNORECASE), text
        assert not text.endswith("."), text


def test_training_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        json.dumps({"question": task.question(p), "answer": f"think\n#### {sum(p)}"}) for p in task.splits()[0][:10]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "rewards_for_the_cli.py").write_text(
        "def short(completions, **kwargs):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    (tmp_path / "run.yaml").write_text(
        "max_steps: 2\nprompts_per_step: 2\nnum_generations: 2\nmax_completion_length: 8\nlearning_rate: 1e-4\n"
    )
    status = cli.main(
        ["train", "--model", str(DEMO_MODEL), "--dataset", "rows.jsonl", "--eval_dataset", "rows.jsonl", "--reward_funcs",
         "accuracy_reward", "rewards_for_the_cli.short", "--config", "run.yaml", "--use_cpu", "true", "--output_dir", "out"]
    )  # fmt: skip
    assert status == 0
    assert "adapter: out/adapter" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "doctor" not in line] == [0, 1, 2, 2]
    saved = json.loads((tmp_path / "out/grpo_config.json").read_text())
    assert saved == json.loads(json.dumps({**vars(GRPOConfig()), **saved}))
    assert saved["learning_rate"] == 1e-4


def test_evaluation_shows_the_adapter_beside_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", "countdown?size=4&eval_size=2", "--use_cpu", "true", "--max_completion_length", "4"]
    steps = ["--max_steps", "1", "--prompts_per_step", "1", "--num_generations", "2", "--output_dir", "out"]
    assert cli.main(["train", "--model", str(DEMO_MODEL), *given, *steps]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert ["eval_rewards/countdown_reward/mean" in line for line in lines if "doctor" not in line] == [
        True,
        False,
        True,
    ]
    capsys.readouterr()
    given += ["--num_generations_eval", "2"]
    assert cli.main(["eval", "--model", "out/adapter", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"base", "adapter"}
    assert set(found["base"]) >= {"eval_reward", "eval_mean@2", "eval_pass@1", "eval_pass@2", "eval_maj@2"}
    assert cli.main(["eval", "--model", str(DEMO_MODEL), *given]) == 0
    shown = capsys.readouterr().out
    assert "\npass@2 " in shown and "model\n" in shown
    assert not (tmp_path / "grpo-output").exists(), "an evaluation writes nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval_dataset", "x"], "--eval_dataset is for training"),
        (["--vram_budget", "8GB"], "--vram_budget is about training, and an evaluation does not read it; leave it out"),
        (["--learning-rate=1"], "--learning_rate is about training, and an evaluation does not read it; leave it out"),
        (["--dataset", "countdwn?size=3"], "no task is named 'countdwn'"),
        (["--learning_rat", "1"], "did you mean learning_rate"),
        (["--learning-rat", "1"], "did you mean learning_rate"),
    ],
)
def test_bad_input_of_an_evaluation_is_one_sentence(arguments, message, capsys):
    dataset = [] if "--dataset" in arguments else ["--dataset", "countdown"]
    assert cli.main(["eval", "--model", str(DEMO_MODEL), *dataset, *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_look_at_data_takes_one_dataset(capsys):
    assert cli.main(["data", "--model", "m", "--dataset", "d", "--eval_dataset", "x"]) == 2
    assert "--eval_dataset is for training; name what to look at with --dataset" in capsys.readouterr().err


def test_evaluation_prints_completions_with_their_rewards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = [[{"role": "user", "content": task.question(p)}] for p in task.splits()[0][:3]]
    rows = [{"prompt": prompt, "solution": "[red]4\x1b[2J"} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards_to_show.py").write_text("def zero(completions, **_): return [0.0] * len(completions)")
    given = ["--dataset", "rows.jsonl", "--reward_funcs", "rewards_to_show.zero", "--use_cpu", "true"]
    given += ["--max_completion_length", "4"]
    steps = ["--max_steps", "1", "--prompts_per_step", "1", "--num_generations", "2", "--output_dir", "out"]
    assert cli.main(["train", "--model", str(DEMO_MODEL), *given, *steps]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--model", "out/adapter", *given, "--show", "2"]) == 0
    shown = capsys.readouterr().out
    for number, prompt in enumerate(prompts[:2], 1):
        text = f"{number} of 2\n  prompt\n    user: {prompt[0]['content']}\n  gold answer\n    [red]4\\x1b[2J\n  base: zero 0.000, cut off\n    "
        assert text in shown
    assert shown.count("  adapter: zero 0.000") == 2 and prompts[2][0]["content"] not in shown and "\x1b" not in shown
    assert "adapter minus base, on the same prompts" in shown and "+0.000" in shown
    assert cli.main(["eval", "--model", "out/adapter", *given, "--show", "9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"base", "adapter", "shown"} and len(found["shown"]) == 3
    assert found["shown"][0]["base"]["rewards"] == {"zero": 0.0} and found["shown"][0]["gold"] == rows[0]["solution"]
    assert found["adapter"]["eval_reward/difference"] == 0 and found["adapter"]["eval_reward/difference/ci_high"] > 0


@pytest.mark.parametrize("text", ["-1", "five", "2.5", "", "true", "1e3"])
def test_a_number_of_completions_to_show_is_a_number(text, capsys):
    assert cli.main(["eval", "--model", str(DEMO_MODEL), "--dataset", "countdown", f"--show={text}"]) == 2
    assert capsys.readouterr().err == (
        f"lowmem-grpo eval: --show takes a number of completions, such as 5, and not {text!r}\n"
    )


def test_what_a_terminal_cannot_write_is_escaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "½"}))
    (tmp_path / "rewards_to_show.py").write_text("def zero(completions, **_): return [0.0] * len(completions)")
    given = ["--dataset", "rows.jsonl", "--reward_funcs", "rewards_to_show.zero", "--use_cpu", "true", "--show", "1"]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert cli.main(["eval", "--model", str(DEMO_MODEL), *given, "--max_completion_length", "2"]) == 0
    assert b"gold answer\n    \\xbd\n" in written.getvalue()


def test_a_plan_for_a_cpu_counts_no_gpu(capsys):
    plan = ["plan", "--model", str(DEMO_MODEL), "--max_completion_length", "32", "--max_prompt_length", "32"]
    assert cli.main([*plan, "--use_cpu", "true"]) == 0
    shown = capsys.readouterr().out
    assert "CUDA" not in shown and "captured" not in shown and "resident throughout" in shown
    assert cli.main([*plan, "--use_cpu", "true", "--vram_budget", "8GB"]) == 2
    assert "vram_budget is about a GPU's memory" in capsys.readouterr().err
    assert cli.main(plan) == 0
    assert "CUDA and its libraries" in capsys.readouterr().out, "a GPU that need not be there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--seed", "1", "--seed", "2"], "--seed is given as '1' and as '2'; keep one"),
        (["train", "--model", "a", "--model_name_or_path=b"], "--model_name_or_path is given as 'a' and as 'b'; keep one"),
        (["train", "--reward-funcs", "a", "--reward_funcs", "a", "b"], "is given as ['a'] and as ['a', 'b']; keep one"),
        (["train", "--seed"], "argument --seed: expected one argument; see `lowmem-grpo train --help`"),
        (["train", "--reward_funcs"], "argument --reward_funcs: expected at least one argument"),
        (["train", *FLAGS, "--seed="], "seed: '' is not a whole number"),
        (["train", *FLAGS, "--output_dir="], "output_dir has an empty text; remove it"),
        (["train", *FLAGS, "--output_dir", "a\0b"], "null character"),
        (["train", *FLAGS, "--system_prompt", "\udcff"], "system_prompt has half a character"),
        (["train", "--model=", "--dataset", "d"], "--model is missing"),
        (["train", "—seed", "1", *FLAGS], "'—seed' begins with a dash that is no hyphen"),
        (["train", "−−seed=1", *FLAGS], "begins with a dash that is no hyphen"),
        (["train", *FLAGS, "--", "x"], "no field ''"),
        (["train", *FLAGS, "--=1"], "GRPOConfig has no field ''"),
        (["train", *FLAGS, "--see\x1b[2J", "1"], r"no field 'see\x1b[2J'"),
        (["train", "x" * 10**5, *FLAGS], "is not understood"),
        (["train", *FLAGS, "--chat_template_kwargs", '{"a": 1, "a": 2}'], "is not a mapping (JSON in a command) or none"),
        (["train", *FLAGS, "--chat_template_kwargs", "[" * 10**5], "is not a mapping"),
        (["train", "--config", "a\0b"], "config file 'a\\x00b' cannot be read: embedded null byte"),
        (["plan", "—model", "x"], "'—model' begins with a dash that is no hyphen"),
        (["plan", "sft", "--max_lenght", "5"], "did you mean max_length?"),
        (["plan", "--model", "x", "sft"], "what is planned comes first; write `lowmem-grpo plan sft`"),
        (["plan", "stf", "--model", "x"], "argument training: invalid choice: 'stf'"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["--seed=1"], "the following arguments are required: COMMAND; see `lowmem-grpo --help`"),
        (["eval", *FLAGS, "--show", "9" * 5000], "--show takes a number of completions"),
        (["data", *FLAGS, "--rows=-1"], "--rows takes a number of prompts"),
        (["demo", "--seed", "x"], "seed: 'x' is not a whole number"),
        (["demo", "--seed", "-1"], "seed must be at least 0, not -1"),
        (["demo", "--seed", "99999999999"], "seed must be at most 4294967295"),
        (["demo", "--output_dir="], "output_dir has an empty text"),
        (["demo", "--output_dir", "/dev/null"], "cannot be written"),
        (["demo", "r1", "--output_dir", "/dev/null"], "cannot be written"),
        (["demo", "--out", "x"], "--out is not understood"),
        (["demo", "r2"], "demo 'r2' is none; it is grpo or r1"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_be_meant_is_refused_in_one_sentence(arguments, message, capsys):
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert message in line and line.startswith("lowmem-grpo") and line.isprintable() and len(line) < 500


def test_a_flag_may_be_said_again_with_the_same_value():
    assert parse([*FLAGS, *FLAGS, "--seed", "1", "--seed=1"]) == (INPUTS, {"seed": 1})


def test_without_arguments_the_help_is_printed(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: lowmem-grpo ")


@pytest.mark.parametrize("command", ["train --help_all", "--help"])
def test_a_pipe_that_is_closed_ends_a_command_without_a_word(command):
    program = f"{sys.executable} -m lowmem_grpo.cli {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)


WITHOUT_TORCH = """
import contextlib, sys
from lowmem_grpo import cli
for command in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        cli.main(command.split())
sys.exit("torch" in sys.modules)
"""


def test_a_missing_file_a_version_and_a_recipe_need_no_torch():
    commands = [f"{name} nowhere --output x" for name in ("select", "pairs", "label")]
    commands += ["pipeline --config nowhere", "r1 --config r1 --print", "bench --help", "bench --no", "--version"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *commands], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("'nowhere' cannot be read") == 3
    assert f"lowmem-grpo {__version__}\n" in done.stdout and "\nphases:" in done.stdout


def test_choosing_of_what_was_sampled_needs_no_torch(tmp_path):
    """It takes a fraction of a second, then, and rules are tried again and again."""
    row = {"prompt": "2+2=", "rewards": {"right": 1.0}, "finish": "eos", "tokens": 1, "prompt_index": 0}
    rows = [{**row, "completion": "4", "reward": 1.0}, {**row, "completion": "5", "reward": 0.0}]
    (tmp_path / "sampled.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    commands = ["select sampled.jsonl --output sft.jsonl --min_reward 1 --max_similarity 0.8 --max_repetition 0.5"]
    commands += ["pairs sampled.jsonl --output pairs.jsonl", "label sampled.jsonl --output labels.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *commands], capture_output=True, text=True, input="1\n", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{name}.jsonl").read_text() for name in ("sft", "pairs", "labels"))


def test_an_input_that_is_closed_before_a_command_has_nothing_to_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    open_closed()
    assert sys.stdin is not None and sys.stdin.readline() == ""


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_stream_that_is_closed_before_a_command_costs_it_nothing(closed):
    program = (
        f"{sys.executable} -m lowmem_grpo.cli train --nope 1 {closed}>&-; {sys.executable} -m lowmem_grpo.cli --help"
    )
    done = subprocess.run(["bash", "-c", f"{program} {closed}>&-"], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("no field 'nope'" in done.stderr, "usage: " in done.stdout) == (closed == "1", closed == "2")
    assert "no field" not in done.stdout


@pytest.mark.parametrize("command", ["train", "eval", "pipeline", "export", "label"])
def test_help_fits_a_narrow_terminal_and_its_examples_can_be_copied(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")

    def print_help():
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])

    text = in_a_terminal(60, print_help)
    assert max(map(len, text.splitlines())) <= 60
    whole = cli.make_parser().commands[command].epilog
    examples = [line for line in whole.splitlines() if line.startswith("  lowmem-grpo ")]
    assert all(line in text.replace(" \\\n     ", "") for line in examples) and examples


def test_an_evaluation_reads_the_fields_that_its_help_has():
    read = set()

    class Watched(GRPOConfig):
        def __getattribute__(self, name):
            if watches and name in TEXTS:
                read.add(name)
            return super().__getattribute__(name)

    watches = False
    for k in (None, 2):
        config = Watched(use_cpu=True, max_completion_length=2, num_generations_eval=k)
        watches = True
        evaluate(str(DEMO_MODEL), task.answer_reward, task.rows(task.splits()[1][:1]), config)
        watches = False
    # These are read, and what comes of an evaluation does not depend on them.
    in_vain = {
        "vram_budget", "gradient_checkpointing", "activation_offloading", "optim", "lora_r", "lora_alpha",
        "lora_dropout", "lora_target_modules", "teacher",
        "prompts_per_step", "num_generations",  # with how many completions at once a reward is called
    }  # fmt: skip
    assert read - in_vain == EVAL_FIELDS - {"dataset_config"}, "read of hub datasets alone"


HOSTILE = "\x1b[2J\x1b]0;title\x07[bold]x[/bold][/]\r\u202e\ud800\x9b"
SAID = "\\x1b[2J\\x1b]0;title\\x07[bold]x[/bold][/]\\r\\u202e\\ud800\\x9b"
SAYING = """
import logging, sys, warnings
from lowmem_grpo import cli
from lowmem_grpo.cli import demos
from lowmem_grpo.errors import InputError
from lowmem_grpo.warn import warn

def run_demo(given):
    warn("a warning with " + HOSTILE)
    warnings.warn("another's with " + HOSTILE)
    logging.getLogger("lowmem_grpo.rewards").warning("a line of the log with %s", HOSTILE)
    raise InputError("an error with " + HOSTILE)

HOSTILE = {!r}
demos.run_demo = run_demo
sys.argv = ["lowmem-grpo", "demo"]
sys.exit(cli.main())
"""


def test_a_command_writes_out_what_others_put_into_warnings_log_and_errors():
    done = subprocess.run([sys.executable, "-c", SAYING.format(HOSTILE)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    for words in ("a warning with", "another's with", "a line of the log with", "an error with"):
        assert f"{words} {SAID}\n" in done.stderr
    assert all(character.isprintable() or character == "\n" for character in done.stderr)


def test_tables_and_progress_write_out_names_and_leave_markup_alone(capsys):
    metrics = {f"eval_rewards/{HOSTILE}/mean": 0.5}
    text = as_table({"model": metrics}, 200)
    assert f"\nrewards/{SAID}/mean" in text and "\x1b" not in text
    progress = Progress(3)
    progress.say(f"two lines\n{HOSTILE}")
    progress.step({"step": 1, "step_time": 0.1, "time/peak_mib": 1}, remarks=[HOSTILE])
    shown = capsys.readouterr().err.splitlines()
    assert shown[:2] == ["two lines", SAID] and shown[2].endswith(SAID)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("buffering", [-1, 1])
def test_output_that_a_full_disk_refuses_is_one_sentence(buffering, monkeypatch, capsys):
    with open("/dev/full", "w", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["plan", "--model", str(DEMO_MODEL), "--max_completion_length", "20"]) == 1
    said = "lowmem-grpo plan: standard output cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
