"""Model cards: parsed back by huggingface_hub, their programs run, and names that would break Markdown or YAML."""

import contextlib
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from test_reward_training import pair_rows
from test_train import ROWS, run
from tiny_models import DEMO_MODEL
from transformers import CONFIG_MAPPING, PreTrainedModel

from lowmem_grpo import RewardConfig, train_reward_model
from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.demo import task
from lowmem_grpo.output.manifest import damage
from lowmem_grpo.output.places import public_name
from lowmem_grpo.report.reading import CONFIGS
from lowmem_grpo.run.card import card_of, write_card
from lowmem_grpo.run.facts import Facts, dataset_id, hub_id
from lowmem_grpo.run.methods import methods_of
from lowmem_grpo.run.snippet import snippet

pytestmark = pytest.mark.usefixtures("known_trials")

EVIL = "a`b``|c\n---\nlicense: mit\n---\n# d <script>alert(1)</script> [e](javascript:f) ](g) \x1b[2J\u202e ![h](i) $j$ *k*"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result of a run of two steps, with an evaluation before and after each."""
    return run(
        tmp_path_factory.mktemp("run"), rewards=[task.answer_reward, task.tag_format_reward], eval_dataset=ROWS[:6],
        eval_steps=1, beta=0.1, doctor="off", reward_weights=[1.0, 0.2], bf16=False, log_completions=True,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A run of four steps, written by hand, in which every text is EVIL; returns its adapter's folder."""
    out = tmp_path / EVIL.replace("/", "")[:200]
    (out / "adapter").mkdir(parents=True)

    def write(name, value):
        (out / name).write_text(json.dumps(value), encoding="utf-8")

    write("adapter/adapter_config.json", {"base_model_name_or_path": EVIL, "r": 8, "lora_alpha": 16})
    write("run.json", {
        "kind": "grpo", "model": EVIL, "datasets": {"train": [EVIL, "openai/gsm8k"], "eval": EVIL},
        "rows": {"train": 5, "eval": 2}, "rewards": [EVIL, "b"], "command": f"```\n{EVIL}", "device": EVIL,
        "versions": {"torch": EVIL},
    })  # fmt: skip
    write("plan.json", {"changes": [{"name": EVIL, "value": EVIL, "reason": EVIL}, 3]})
    write("grpo_config.json", {"system_prompt": EVIL, "teacher": EVIL, "seed": EVIL, "loss_type": EVIL})
    name = f"eval_rewards/{EVIL}/mean"
    lines = [
        {"step": 0, "eval_reward": 0.25, name: None},
        {"step": 4, "reward": 1.0, "loss": 0.0, "step_time": 60.0},
        {"step": 4, "doctor": "x", "text": EVIL},
        {"step": 4, "eval_reward": 0.5, "eval_reward/difference": 0.25, name: 0.125},
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return out / "adapter"


def load(folder) -> Any:
    return ModelCard.load(Path(folder) / "README.md")


def program(card: ModelCard) -> str:
    return re.search(r"^```python\n(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE)[1]


def executed(text: str, *folders: Path) -> dict:
    """Run a card's program, in which each folder stands in the place of its end."""
    for folder in folders:
        assert public_name(str(folder)) in text
        text = text.replace(public_name(str(folder)), str(folder))
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(text, names)
    return {**names, "said": said.getvalue()}


def test_a_run_leaves_a_card_that_the_hubs_own_code_reads(trained):
    card = load(f"{trained.output_dir}/adapter")
    found = card.data.to_dict()
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    assert found["tags"] == ["lowmem_grpo", "lora", "grpo"]
    assert "base_model" not in found, "a folder of this machine is no name on the hub"
    last = trained.eval_history[-1]
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results["reward"] == round(last["eval_reward"], 4) and "reward/ci_low" not in results
    assert f"| `reward` | {trained.eval_history[0]['eval_reward']:.3f} [" in card.text
    assert f"{last['eval_reward/difference']:+.3f} [" in card.text and "| at step 2 |" in card.text
    assert "reward `answer_reward`, weight `1.0`\n" in card.text and "weight `0.2`\n" in card.text
    assert "| `beta` | `0.1` | `0.0` |" in card.text and "output_dir" not in card.text
    assert "trained on `40 rows in memory`\n" in card.text and "* by `train()`, called in Python" in card.text
    assert "one greedy completion of each" in card.text and "chosen among" not in card.text


def test_the_program_on_a_card_loads_what_was_trained(trained):
    text, folders = program(load(f"{trained.output_dir}/adapter")), (Path(trained.output_dir) / "adapter", DEMO_MODEL)
    assert "# ./model is no name on the hub: put the base's folder in its place.\n" in text
    assert executed(text, *folders)["said"]
    names = executed(text.partition("ids = ")[0], *folders)
    model, prompt = names["model"], names["prompt"]
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a product in bf16, of fp32 too
    assert isinstance(model, PeftModel) and model.get_base_model().is_loaded_in_4bit
    trained.policy.model.eval()
    with torch.no_grad():
        theirs = model(**prompt).logits.float()
        ours = trained.policy.model(**prompt).logits.float()
    with torch.no_grad(), model.disable_adapter():
        without = model(**prompt).logits.float()
    assert (theirs - ours).abs().max() < 1e-4 and (without - ours).abs().max() > 0.05


def test_the_best_adapters_card_is_of_its_own_step_and_its_manifest_still_holds(trained):
    best = Facts(Path(trained.output_dir) / "best")
    step = json.loads((best.folder / "best.json").read_bytes())["step"]
    assert best.step == step and best.is_chosen and damage(best.folder) is None
    text = (best.folder / "README.md").read_text(encoding="utf-8")
    assert "flatters it" in text and "More Information Needed" not in text
    assert (f"at step {step}" if step else "| metric | before training |") in text


def test_nothing_that_a_name_holds_reaches_markdown_or_metadata(folder):
    write_card(folder, pytest.fail)
    card = load(folder)
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert card.data.datasets == ["openai/gsm8k"] and len(card.data.eval_results) == 2
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or []]
    assert not [one for one in [*tokens, *inline] if one.type.startswith("html") or one.type == "image"]
    assert {str(one.attrs["href"]).split("/")[2] for one in inline if one.type == "link_open"} == {
        "huggingface.co", "arxiv.org", "thinkingmachines.ai",
    }  # fmt: skip
    headings = [tokens[place + 1].content for place, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == [
        "Model", "Method", "Data and rewards", "Evaluation", "Use", "Settings", "Reproduce", "Limits",
    ]  # fmt: skip
    outside = "".join(one.content for one in inline if one.type == "text")
    assert "script" not in outside and "|" not in outside and "$" not in outside
    assert not {"\x1b", "\u202e"} & set(str(card)), "nothing moves a terminal's cursor"
    rows = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type in ("td_open", "th_open")]
    assert len(rows) == 3 + 5 and len(cells) == 3 * 4 + 5 * 3


def test_a_card_tells_of_intervals_where_there_are_some_and_of_a_short_time_in_seconds(folder):
    text = card_of(folder).text
    assert "In brackets" not in text and "1 step took 1 min 0 s, without" in text
    lines = [{"step": 4, "loss": 0.0, "step_time": 1.5}, {"step": 4, "eval_reward": 0.5, "eval_reward/ci_low": 0.4}]
    (folder.parent / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    text = card_of(folder).text
    assert "In brackets are 95 % intervals" in text and "1 step took 1.5 s, without" in text


def test_the_licence_is_that_of_the_bases_own_card(folder, tmp_path, monkeypatch, caplog):
    base = tmp_path / "base"
    base.mkdir()
    settings = {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "under the licence that its own page has" in card_of(folder).text
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    card: Any = card_of(folder)
    assert card.data.license == "apache-2.0" and "under the licence `apache-2.0`" in card.text
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: x\n---\n", encoding="utf-8")
    card: Any = card_of(folder)
    assert (card.data.license, card.data.license_link) == ("other", "x") and "under the licence `own`" in card.text
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    for text in ("---\nlicense: [\n---\n", "# a card without a head\n"):
        (base / "README.md").write_text(text, encoding="utf-8")
        assert "license" not in card_of(folder).data.to_dict()
    assert not caplog.records, "which a run would print at its end"


def test_a_card_of_damaged_files_or_of_none_leaves_out_what_they_would_say(folder):
    for path in folder.parent.glob("*.json*"):
        path.write_bytes(b'[1, {"step": "\xff')
    (folder.parent / "metrics.jsonl").write_text('{"step": 1, "eval_reward": "x"}\n[]\n', encoding="utf-8")
    assert "## Use" in card_of(folder).text
    odd = {"kind": {}, "loss_type": [], "adv_estimator": {}, "base_model_name_or_path": "x" * 999, "r": 10**400}
    for path in [folder.parent / "grpo_config.json", folder.parent / "run.json", folder / "adapter_config.json"]:
        path.write_text(json.dumps({**odd, "lora_alpha": 10**400}), encoding="utf-8")
    assert "## Use" in card_of(folder).text
    for path in [*folder.parent.glob("*.json*"), folder / "adapter_config.json"]:
        path.unlink()
    text = card_of(folder, name="someone/name").text
    assert "name = 'someone/name'" in text and "## Settings" not in text and "## Limits" not in text


def test_a_card_that_cannot_be_written_costs_a_sentence(folder):
    (folder / "README.md").mkdir()
    said = []
    write_card(folder, said.append)
    assert len(said) == 1 and "README.md cannot be written (" in said[0] and "the adapter beside it is whole" in said[0]
    (folder / "adapter_config.json").unlink()
    write_card(folder, pytest.fail)


def test_keys_and_tokens_stay_out_of_a_card(folder):
    settings = {"model_init_kwargs": {"token": "hf_secret"}}
    (folder.parent / "grpo_config.json").write_text(json.dumps(settings), encoding="utf-8")
    card = str(card_of(folder))
    assert "hf_secret" not in card and "model_init_kwargs" in card


def test_the_program_on_an_uploaded_adapters_card_loads_it_from_the_hub(folder):
    settings = {"push_to_hub": True, "hub_model_id": "someone/sums"}
    (folder.parent / "grpo_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert "name = 'someone/sums'" in card_of(folder).text
    folder.rename(folder.parent / "best")
    assert "name = 'someone/sums'" not in card_of(folder.parent / "best").text, "which is not uploaded"


def test_the_card_of_a_merged_model_is_of_a_whole_model(trained):
    card: Any = card_of(
        Path(trained.output_dir) / "adapter", name=str(DEMO_MODEL), onto="nf4", notes=["it was checked"]
    )
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert "* it was checked\n" in card.text and "lowmem-grpo export" not in card.text
    assert "computes other numbers" not in card.text, "it was merged onto the numbers that training saw"
    assert isinstance(executed(program(card))["model"], PreTrainedModel)


@pytest.mark.parametrize(("given", "said"), [(True, "and not into the 4 bits"), (False, "on which it")])
def test_what_an_adapter_was_merged_into_is_told_by_what_it_was_trained_on(folder, given, said):
    (folder.parent / "grpo_config.json").write_text(json.dumps({"load_in_4bit": given}), encoding="utf-8")
    text = card_of(folder, onto="original").text
    assert f"* the adapter was merged into the base's own weights, {said}" in text
    assert ("computes other numbers here" in text) is given


def test_the_program_on_a_reward_adapters_card_gives_a_score(tmp_path):
    config = RewardConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, pairs_per_step=2, doctor="off")
    train_reward_model(str(DEMO_MODEL), pair_rows(task.splits()[0][:4]), None, config)
    card = load(tmp_path / "adapter")
    assert card.data.pipeline_tag == "text-classification" and "reward-model" in card.data.tags
    assert "It was not evaluated on held-out rows." in card.text
    assert "put the base's folder in its place in adapter_config.json" in card.text
    float(executed(program(card), tmp_path / "adapter")["said"])


def test_a_base_of_more_than_text_is_loaded_by_the_class_that_it_was_saved_by(folder, tmp_path):
    config = CONFIG_MAPPING["qwen3_5"]()
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "base")
    settings = {"base_model_name_or_path": str(tmp_path / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = snippet(Facts(folder), "x", is_merged=False)
    assert "base = Qwen3_5ForConditionalGeneration.from_pretrained(" in found
    assert 'prompt = tokenizer("...", return_tensors="pt")' in found, "its tokenizer has no chat template"


@pytest.mark.parametrize(
    "name, model, dataset",
    [
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"), ("gpt2", "gpt2", None),
        ("gsm8k?style=tags", None, "openai/gsm8k"), ("countdown", "countdown", None), (str(DEMO_MODEL), None, None),
        ("12 rows in memory", None, None), ("a/b/c", None, None), ("data/gone.jsonl", "data/gone.jsonl", None),
        (None, None, None), (3, None, None), ("../x", None, None), ("tests", None, None),
    ],
)  # fmt: skip
def test_only_what_can_be_a_name_on_the_hub_is_one(name, model, dataset, monkeypatch):
    monkeypatch.chdir(DEMO_MODEL.parents[2])
    assert (hub_id(name), dataset_id(name)) == (model, dataset)


def test_every_objective_and_estimator_is_named_with_its_source():
    for loss in set(LOSS_TYPES) - {"grpo"}:
        assert len(methods_of("grpo", {"loss_type": loss})) == 4, loss
    for estimator in ("rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"):
        assert len(methods_of("grpo", {"adv_estimator": estimator, "load_in_4bit": False})) == 3
    assert [one.tag for one in methods_of("grpo", {"adv_estimator": "gae"}) if one.tag] == ["ppo"]
    assert [one.tag for one in methods_of("grpo", {"teacher": "x"}) if one.tag] == ["distillation"]
    assert {kind: methods_of(kind, {})[0].tag for kind in CONFIGS} == {
        "grpo": "grpo", "sft": "sft", "reward": "reward-model",
    }  # fmt: skip
