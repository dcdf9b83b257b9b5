"""Rows in the shapes of popular data sets are read right, or refused with a sentence, or the doctor says what is wrong.

The columns are those of the data sets' cards; what is in them is made up.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem_grpo import GRPOConfig, RewardConfig, SFTConfig
from lowmem_grpo.data.examples import form_of, tokenize_examples
from lowmem_grpo.data.pairs import tokenize_pairs
from lowmem_grpo.data.prompts import tokenize_prompts
from lowmem_grpo.data.rows import load_rows, read_rows
from lowmem_grpo.errors import InputError
from lowmem_grpo.inputs.rewards import missing_golds
from lowmem_grpo.inputs.texts import empty_texts, run_together, unseen_columns
from lowmem_grpo.preview.examples import marked
from lowmem_grpo.preview.prompts import read_gold
from lowmem_grpo.rewards import RewardRunner, accuracy_reward

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def say(role, content):
    return {"role": role, "content": content}


def turn(name, value, **more):
    return {"from": name, "value": value, **more}


HI = [say("user", "Hi?"), say("assistant", "Yes")]
NO = [say("user", "Hi?"), say("assistant", "No")]
SUM, BOX = "What is 3+4?", "It is $\\boxed{7}$."
ASKED, THOUGHT = f"<user>{SUM}<assistant>", "<|begin_of_thought|>3<|end_of_thought|>7"
NO_PROMPT, NO_FORM = (
    "has no column named prompt, only .*; rename the one that asks",
    "has neither prompt and completion",
)
NO_PAIR = "has no chosen and rejected, only .*; rename its columns"
SHARE_GPT = [turn("human", "Hi?"), turn("gpt", "Yes")]
PROMPTS = {  # a row, its prompt and its gold answer; or why it is refused
    "GSM8K": ({"question": SUM, "answer": "3+4=<<3+4=7>>7\n#### 7"}, ASKED, "7"),
    "GSM8K socratic": ({"question": SUM, "answer": "How many? ** 3+4=<<3+4=7>>7\n#### 7"}, ASKED, "7"),
    "MATH": ({"problem": SUM, "level": "Level 1", "type": "Algebra", "solution": BOX}, ASKED, "7"),
    "MATH-500": ({"problem": SUM, "solution": BOX, "answer": "7", "subject": "Algebra", "level": 1}, ASKED, "7"),
    "DAPO-Math-17k": ({"data_source": "math_dapo", "prompt": [say("user", SUM)], "ability": "MATH", "reward_model": {"ground_truth": "7", "style": "rule"}, "extra_info": {"index": "a"}}, ASKED, "7"),
    "OpenR1-Math": ({"problem": SUM, "solution": "Adding, 7.", "answer": "7", "generations": ["<think>", "7"], "correctness_llama": None, "messages": HI}, ASKED, "7"),
    "NuminaMath": ({"source": "x", "problem": SUM, "solution": BOX, "messages": HI}, ASKED, "7"),
    "DeepScaleR": ({"problem": SUM, "answer": "7", "solution": "Adding gives what one sees at once."}, ASKED, "7"),
    "Big-Math": ({"problem": SUM, "answer": "7", "source": "x", "domain": ["Algebra"], "llama8b_solve_rate": None}, ASKED, "7"),
    "Open-Reasoner-Zero": ({"0": turn("human", SUM), "1": {"from": "assistant", "ground_truth": {"value": "7"}}}, NO_PROMPT),
    "AIME 2024": ({"ID": "2024-II-4", "Problem": SUM, "Solution": "x", "Answer": 7}, NO_PROMPT),
    "AIME 2025": ({"question": SUM, "answer": "70"}, ASKED, "70"),
    "MMLU": ({"question": SUM, "subject": "algebra", "choices": ["6", "7", "8"], "answer": 1}, f"<user>{SUM}\n\nA. 6\nB. 7\nC. 8<assistant>", "B"),
    "MMLU-Pro": ({"question": SUM, "options": ["6", "7"], "answer": "B", "answer_index": 1, "cot_content": ""}, f"<user>{SUM}\n\nA. 6\nB. 7<assistant>", "B"),
    "MedQA": ({"question": SUM, "answer": "seven", "options": {"A": "six", "B": "seven"}, "answer_idx": "B"}, f"<user>{SUM}\n\nA. six\nB. seven<assistant>", "B"),
    "GPQA": ({"Question": SUM, "Correct Answer": "7", "Incorrect Answer 1": "6"}, NO_PROMPT),
    "ARC": ({"id": "x", "question": SUM, "choices": {"text": ["6", "7"], "label": ["1", "2"]}, "answerKey": "2"}, f"<user>{SUM}\n\n1. 6\n2. 7<assistant>", "2"),
    "CommonsenseQA": ({"question": SUM, "question_concept": "sum", "choices": {"label": ["A", "B"], "text": ["6", "7"]}, "answerKey": "B"}, f"<user>{SUM}\n\nA. 6\nB. 7<assistant>", "B"),
    "HellaSwag": ({"ctx_a": "A man", "ctx_b": "he", "ctx": "A man he", "endings": ["eats", "sings"], "label": "0"}, NO_PROMPT),
    "RACE": ({"article": "Ann sings.", "question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}, "<user>Ann sings.\n\nWho?\n\nA. Ann\nB. Bob<assistant>", "A"),
    "AQuA": ({"question": SUM, "options": ["A)6", "B)7"], "answer": "B"}, f"<user>{SUM}\n\nA)6\nB)7<assistant>", "B"),
    "BoolQ": ({"question": "is it", "answer": True, "passage": "It is."}, "has no gold answer .*'True', which is neither a text nor a number"),
    "TriviaQA": ({"question": "Who?", "answer": {"aliases": ["Ann", "Anna"], "value": "Ann"}}, "has no gold answer .*aliases.* which is neither a text nor a number"),
    "SQuAD": ({"context": "Ann sings.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}}, NO_PROMPT),
    "MBPP": ({"text": "Add.", "code": "def add", "test_list": ["assert add"], "test_setup_code": ""}, NO_PROMPT),
    "HumanEval": ({"prompt": "def add", "canonical_solution": "    return", "test": "def check", "entry_point": "add"}, "no column named solution or answer, only .*canonical_solution"),
    "APPS": ({"question": "Add.", "solutions": "[]", "input_output": "{}", "starter_code": ""}, NO_PROMPT),
    "CodeContests": ({"name": "x", "description": "Add.", "solutions": {"language": [3], "solution": ["x"]}}, NO_PROMPT),
    "TACO": ({"question": "Add.", "solutions": "[]", "input_output": "{}", "name": None}, NO_PROMPT),
    "Tulu 3 RLVR": ({"messages": HI[:1], "ground_truth": "7", "dataset": "gsm8k"}, NO_PROMPT),
    "s1K": ({"solution": "7", "question": SUM, "cot_type": "math", "thinking_trajectories": ["3"], "attempt": "7"}, ASKED, "7"),
    "PRM800K": ({"question": {"problem": SUM, "ground_truth_answer": "7"}, "label": {"steps": []}}, NO_PROMPT),
}  # fmt: skip
EXAMPLES = {  # a row, and its text with what is learnt in brackets, or why it is refused; what the doctor says
    "Alpaca": ({"instruction": "Add.", "input": "3 and 4", "output": "7", "text": "### Add. 3 and 4: 7"}, "#[[## Add. 3 and 4: 7</s>]]"),
    "Alpaca cleaned": ({"output": "7", "input": "3 and 4", "instruction": "Add."}, "<user>Add.\n\n3 and 4<assistant>[[7</s>]]"),
    "Alpaca without input": ({"output": "7", "input": "", "instruction": SUM}, f"{ASKED}[[7</s>]]"),
    "Alpaca renamed": ({"prompt": "Add.", "input": "3 and 4", "completion": "7"}, "Add.[[7</s>]]", "joined ['input']"),
    "Dolly": ({"instruction": "Who sings?", "context": "Ann sings.", "response": "Ann", "category": "x"}, "<user>Ann sings.\n\nWho sings?<assistant>[[Ann</s>]]"),
    "OpenOrca": ({"system_prompt": "Be kind.", "question": "Hi?", "response": "Yes"}, "<system>Be kind.<user>Hi?<assistant>[[Yes</s>]]"),
    "OpenAssistant": ({"message_id": "x", "parent_id": None, "text": "Hi?", "role": "prompter", "lang": "en"}, "one message of a chat a row, by its column role; make"),
    "ShareGPT": ({"id": "x", "conversations": SHARE_GPT}, "<[[user>Hi?<assistant>Yes</s>]]"),
    "SlimOrca": ({"conversations": [turn("system", "Be kind.", weight=None), turn("human", "Hi?", weight=0.0), turn("gpt", "Yes", weight=1.0)]}, "<system>Be kind.<user>Hi?[[<assistant>Yes</s>]]"),
    "Tulu 3": ({"id": "x", "messages": HI, "source": "x"}, "<[[user>Hi?<assistant>Yes</s>]]"),
    "no_robots": ({"prompt": "Hi?", "prompt_id": "x", "messages": HI, "category": "x"}, "<[[user>Hi?<assistant>Yes</s>]]"),
    "Capybara": ({"source": "x", "conversation": [{"input": "Hi?", "output": "Yes"}]}, NO_FORM),
    "LIMA": ({"conversations": ["Hi?", "Yes"], "source": "x"}, "a chat is a list of role and content texts"),
    "s1K": ({"solution": "7", "question": SUM, "thinking_trajectories": ["3"], "attempt": "7"}, NO_FORM),
    "OpenThoughts": ({"system": "Think.", "conversations": [turn("user", SUM), turn("assistant", THOUGHT)]}, f"<[[system>Think.{ASKED}{THOUGHT}</s>]]"),
    "Bespoke-Stratos": ({"system": "Think.", "conversations": [turn("user", SUM), turn("assistant", THOUGHT)]}, f"<[[system>Think.{ASKED}{THOUGHT}</s>]]"),
    "MBPP": ({"text": "Add.", "code": "def add", "test_list": ["assert add"]}, "A[[dd.</s>]]", "['code']"),
    "PRM800K in TRL's form": ({"prompt": SUM, "completions": ["3+4", "7"], "labels": [True, True]}, NO_FORM),
    "an empty answer": ({"messages": [*HI, say("user", "Oh?"), say("assistant", " ")]}, "<[[user>Hi?<assistant>Yes</s><user>Oh?<assistant> </s>]]", "{'messages': 1}"),
    "an empty prompt": ({"prompt": "", "completion": "Yes"}, "Y[[es</s>]]", "{'prompt': 1}"),
}  # fmt: skip
PAIRS = {  # a row, and both texts, or why it is refused; what the doctor says
    "UltraFeedback": ({"instruction": "Hi?", "models": ["a"], "completions": [{"response": "Yes"}]}, NO_PAIR),
    "UltraFeedback binarized": ({"prompt": "Hi?", "prompt_id": "x", "chosen": HI, "rejected": NO, "messages": HI, "score_chosen": 8.0}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>No</s>"),
    "HH-RLHF": ({"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: No"}, "\n\nHuman: Hi?\n\nAssistant: Yes</s>", "\n\nHuman: Hi?\n\nAssistant: No</s>"),
    "Orca pairs": ({"system": "Be kind.", "question": "Hi?", "chosen": "Yes", "rejected": "No"}, "<system>Be kind.<user>Hi?<assistant>Yes</s>", "<system>Be kind.<user>Hi?<assistant>No</s>"),
    "Orca pairs by Argilla": ({"system": "", "input": "Hi?", "chosen": "Yes", "rejected": "No", "rating": [8.0, 2.0]}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>No</s>"),
    "SHP": ({"history": "Hi?", "human_ref_A": "Yes", "human_ref_B": "No", "labels": 1}, NO_PAIR),
    "reward-bench": ({"prompt": "Hi?", "chosen": "Yes", "chosen_model": "a", "rejected": "No", "subset": "x"}, "Hi?Yes</s>", "Hi?No</s>", "joined"),
    "PRM800K in TRL's form": ({"prompt": SUM, "completions": ["3+4", "7"], "labels": [True, True]}, NO_PAIR),
    "a prompt and chats of answers": ({"prompt": "Hi?", "chosen": HI[1:], "rejected": NO[1:]}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>No</s>"),
    "a question and chats of answers": ({"question": "Hi?", "chosen": HI[1:], "rejected": NO[1:]}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>No</s>"),
    "a question and whole chats": ({"question": "Hi", "chosen": HI, "rejected": NO}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>No</s>"),
    "a prompt that is said again": ({"prompt": HI[:1], "chosen": [HI[1], *HI], "rejected": [HI[1], *NO]}, "<user>Hi?<assistant>Yes</s><user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant>Yes</s><user>Hi?<assistant>No</s>"),
    "a chat before whole chats": ({"prompt": [say("system", "Be kind."), HI[0]], "chosen": HI, "rejected": NO}, "<system>Be kind.<user>Hi?<assistant>Yes</s>", "<system>Be kind.<user>Hi?<assistant>No</s>"),
    "empty texts": ({"prompt": [HI[0]], "chosen": HI[1:], "rejected": [say("assistant", "")]}, "<user>Hi?<assistant>Yes</s>", "<user>Hi?<assistant></s>", "{'rejected': 1}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte, which knows every text."""
    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_alone = Tokenizer(models.BPE(vocab=letters, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="</s>", chat_template=TEMPLATE)


def said(rows, columns, after):
    """What the doctor will say of rows: texts that run together, empty ones, columns that are not shown."""
    found = ["joined" if run_together(rows, after) else "", empty_texts(rows, columns), unseen_columns(rows)]
    return " ".join(str(one) for one in found if one)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_popular_data_sets_are_read_right_or_refused(name, tokenizer):
    row, *expected = PROMPTS[name]
    config = GRPOConfig(use_cpu=True)
    if len(expected) == 1:
        with pytest.raises(InputError, match=expected[0]):
            missing_golds(RewardRunner([accuracy_reward]), load_rows([row], config), "train_dataset")
        return
    rows = load_rows([row], config)
    (prompt,), _ = tokenize_prompts(rows, tokenizer, config)
    assert [tokenizer.decode(prompt.ids), read_gold(prompt.columns), unseen_columns(rows)] == [*expected, []]
    assert {key: value for key, value in rows[0].items() if key in row and key != "solution"} == {
        key: value for key, value in row.items() if key != "solution"
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_popular_data_sets_are_read_right_or_refused(name, tokenizer):
    row, expected, *found = EXAMPLES[name]
    config = SFTConfig(use_cpu=True)
    rows = read_rows([row], config)
    if "[[" not in expected:
        with pytest.raises(InputError, match=expected):
            tokenize_examples(rows, tokenizer, config)
        return
    (example,), _ = tokenize_examples(rows, tokenizer, config)
    assert marked(example, tokenizer) == expected
    assert said(rows, form_of(rows.column_names), "completion") == " ".join(found)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_popular_data_sets_are_read_right_or_refused(name, tokenizer):
    row, *expected = PAIRS[name]
    config = RewardConfig(use_cpu=True)
    rows = read_rows([row], config)
    if len(expected) == 1:
        with pytest.raises(InputError, match=expected[0]):
            tokenize_pairs(rows, tokenizer, config)
        return
    (pair,), _ = tokenize_pairs(rows, tokenizer, config)
    columns = [column for column in ("prompt", "chosen", "rejected") if column in rows.column_names]
    assert [*map(tokenizer.decode, pair.texts), said(rows, columns, "chosen")] == [*expected, ""][:3]


TWO = [["6", "7"], ["1", "2"]]
CHOICES = [  # choices and gold answers of rows, and these as they are read, or why they are refused
    (TWO, [1, 0], ["B", "A"]),
    (TWO, ["1", "0"], ["B", "A"]),
    (TWO, ["7", "1"], ["B", "A"]),
    (TWO, ["(B)", None], ["B", None]),
    (TWO, ["B", "so \\boxed{A}"], ["B", "A"]),
    ([["6", "7"], []], ["A", "9"], ["A", "9"]),
    ([["3", "1"], ["1", "0"]], ["1", "0"], "row 1 .* gold answer '0', which is one of its choices, and the place of an"),
    (TWO, ["b", "A) 1"], ["B", "A"]),
    ([["Paris", "Rome"]] * 2, ["rome.", "B"], ["B", "B"]),
    (TWO, [7, 1], ["B", "A"]),
    (TWO, [1.0, 0.0], ["B", "A"]),
    ([["A) 6", "B) 7"]], ["7"], ["B"]),
    ([{"a": "6", "b": "7"}], ["B"], ["b"]),
    (["A. 6 B. 7"], ["B"], ["B"]),
    (["['6', '7']"], ["7"], "row 0 of train_dataset has the choices .*; choices are a list of texts"),
    ([["6", "6", "7"]], ["6"], "row 0 of train_dataset has the gold answer '6', which is two of its choices"),
    ([["6", "7"]] * 2, [1, 2], "row 1 of train_dataset has the gold answer 2, which is none of its choices: .*; make it a letter"),
    (TWO, ["seven", "A"], "row 0 of train_dataset has the gold answer 'seven', which is none of its choices"),
    (TWO[:1], [True], "row 0 of train_dataset has no gold answer: .*'True', which is neither a text nor a number"),
    ([[["6"], ["7"]]], [0], "row 0 of train_dataset has the choices .*, which are not all texts"),
    ([{"label": None, "text": None}, {"label": ["A"], "text": ["6"]}], ["9", "A"], ["9", "A"]),
    ([{"label": ["A"], "text": ["6", "7"]}], ["A"], "row 0 of train_dataset has the choices .*; choices are a list of te"),
    ([{"one": "6", "two": "7"}], ["6"], "row 0 of train_dataset has the choices .*; choices are a list of texts"),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "golds", "expected"), CHOICES)
def test_a_gold_answer_is_the_letter_of_its_choice_or_refused(choices, golds, expected):
    rows = [{"question": SUM, "choices": own, "answer": gold} for own, gold in zip(choices, golds, strict=True)]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            load_rows(rows, GRPOConfig())
        return
    assert [read_gold(row) for row in load_rows(rows, GRPOConfig())] == expected


ASKED_FOR = [  # a row of a question, and its prompt
    ({"question": "Which?\n(A) 6\n(B) 7", "options": ["6", "7"], "answer": "B"}, "Which?\n(A) 6\n(B) 7"),
    ({"question": "Ann sings. Who?", "context": "Ann sings.", "answer": "Ann"}, "Ann sings. Who?"),
    ({"question": SUM, "input": SUM, "answer": "7"}, SUM),
    ({"question": "Spell the word.", "input": "word", "answer": "w-o-r-d"}, "Spell the word.\n\nword"),
    ({"question": "Add 4.", "input": 3, "answer": "7"}, "Add 4.\n\n3"),
    ({"question": "Which?", "choices": "A. 6 B. 7", "answer": "B"}, "Which?\n\nA. 6 B. 7"),
    ({"question": {"id": 3}, "problem": SUM, "solution": "7"}, SUM),
]


@pytest.mark.parametrize(("row", "expected"), ASKED_FOR)
def test_a_question_has_each_of_its_parts_once(row, expected):
    assert load_rows([row], GRPOConfig())[0]["prompt"] == [say("user", expected)]


def test_two_texts_that_begin_with_their_question_are_whole(tokenizer):
    shown = {"question": "Hi", "chosen": "Human: Hi\nAssistant: Yes", "rejected": "Human: Hi\nAssistant: No"}
    greeting = {"question": "Hi", "chosen": "Hi! Yes", "rejected": "Hi! No"}
    other = {"question": "Oh?", "chosen": "Yes", "rejected": "No"}
    read = [
        [tokenizer.decode(pair.chosen) for pair in tokenize_pairs(read_rows(rows, config), tokenizer, config)[0]]
        for config in [RewardConfig(use_cpu=True)]
        for rows in ([shown], [greeting, other], [{**shown, "question": None}])
    ]
    whole = ["Human: Hi\nAssistant: Yes</s>"]
    assert read == [whole, ["<user>Hi<assistant>Hi! Yes</s>", "<user>Oh?<assistant>Yes</s>"], whole]


def test_chats_in_either_of_two_columns_are_not_empty():
    rows = read_rows([{"messages": HI}, {"conversations": SHARE_GPT}], SFTConfig(use_cpu=True))
    assert empty_texts(rows, form_of(rows.column_names)) == {}
