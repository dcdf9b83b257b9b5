"""Prompts: a text, a chat and a chat that goes on are to the model what the user wrote, or they are refused."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value
from tiny_models import DEMO_MODEL
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.chats import OURS, closing_of, said_at_end
from lowmem_grpo.data.prompts import tokenize_prompts
from lowmem_grpo.data.rows import load_rows
from lowmem_grpo.data.text import text_ids
from lowmem_grpo.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
R1 = (  # opens an answer's thoughts, and deletes those of earlier turns
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
    "<A>{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
QWEN3 = (  # has a block of thoughts in the last turn, an empty one where there are none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WHOLE = "{{ messages | tojson }}{{ tools | tojson }}{{ mood }}"
QUESTION = {"role": "user", "content": "1+1="}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


def make_tokenizer(template):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    return tokenizer


def prompts_of(rows, template, **settings):
    tokenizer = make_tokenizer(template)
    prompts, _ = tokenize_prompts(
        load_rows(rows, GRPOConfig()), tokenizer, GRPOConfig(max_prompt_length=None, **settings)
    )
    return [(tokenizer.decode(prompt.ids), prompt.said, prompt.text) for prompt in prompts]


def one(chat, template, **row):
    return prompts_of([{"prompt": chat, **row}], template)[0]


# C1: a text that was rendered beforehand


def make_marked_tokenizer(beginning, end):
    """A tokenizer of one token a character, which puts <s> before a text or </s> behind it."""
    tokens = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(32, 127))])}
    inner = Tokenizer(WordLevel(tokens, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), Fuse()
    inner.add_special_tokens(["<s>", "</s>"])
    single = f"{'<s> ' if beginning else ''}$A{' </s>' if end else ''}"
    inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("beginning", "end"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("text", ["<s>user: 1+1=", "user: 1+1=", "<s>", "</s>x"])
def test_a_text_has_the_tokenizers_beginning_once_and_never_its_end(text, beginning, end):
    tokenizer = make_marked_tokenizer(beginning, end)
    expected = text if text.startswith("<s>") or not beginning else "<s>" + text
    assert tokenizer.decode(text_ids(tokenizer, text)) == expected
    (prompt,), _ = tokenize_prompts(Dataset.from_list([{"prompt": text}]), tokenizer, GRPOConfig())
    assert prompt.ids == text_ids(tokenizer, text)


def test_a_transcript_has_them_likewise_and_a_template_writes_its_own():
    tokenizer = make_marked_tokenizer(True, True)
    rows = Dataset.from_list([{"prompt": [QUESTION]}])
    assert (
        tokenizer.decode(tokenize_prompts(rows, tokenizer, GRPOConfig())[0][0].ids)
        == "<s>User: 1+1=<unk><unk>Assistant:"
    )
    tokenizer.chat_template = "<s>{{ messages[0].content }}"
    assert tokenizer.decode(tokenize_prompts(rows, tokenizer, GRPOConfig())[0][0].ids) == "<s>1+1="


# C2: a chat that ends with the assistant's words; A7: a template that opens an answer


@pytest.mark.parametrize(
    ("words", "template", "end", "said"),
    [
        ("The answer", CHATML, "<|im_start|>assistant\nThe answer", "The answer"),
        ("The answer is ", TRIMMED, "<|im_start|>assistant\nThe answer is ", "The answer is "),
        ("\nThe\n", TRIMMED, "<|im_start|>assistant\n\nThe\n", "\nThe\n"),
        ("1+1=", CHATML, "<|im_start|>assistant\n1+1=", "1+1="),
        ("", CHATML, "<|im_start|>assistant\n", ""),
        ("The answer", R1, "<U>1+1=<A>The answer", "The answer"),
        ("<think>\nHm", R1, "<U>1+1=<A><think>\nHm", "<think>\nHm"),
        ("<think>Hm</think>It is", R1, "<U>1+1=<A><think>Hm</think>It is", "<think>Hm</think>It is"),
        ("Hm</think>It is", R1, "<U>1+1=<A><think>\nHm</think>It is", "<think>\nHm</think>It is"),
        ("<think>\nHm", QWEN3, "assistant\n<think>\nHm", "<think>\nHm"),
        ("It is", QWEN3, "assistant\n<think>\n\n</think>\n\nIt is", "<think>\n\n</think>\n\nIt is"),
        ("It is", None, "User: 1+1=\n\nAssistant: It is", "It is"),
        ("<think>", None, "User: 1+1=\n\nAssistant: <think>", "<think>"),
        (" ", None, "User: 1+1=\n\nAssistant:", ""),
    ],
)
def test_a_chat_that_ends_with_the_assistants_words_goes_on_from_them(words, template, end, said):
    text, found, asked = one([QUESTION, {"role": "assistant", "content": words}], template)
    assert text.endswith(end) and found == said
    assert asked[-1]["role"] == "user" or not said


def test_a_chat_that_goes_on_is_what_transformers_renders():
    chat = [QUESTION, {"role": "assistant", "content": "2"}, QUESTION, {"role": "assistant", "content": "The answer"}]
    rendered = make_tokenizer(CHATML).apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert one(chat, CHATML)[0] == rendered


@pytest.mark.parametrize(
    ("template", "settings", "said"),
    [
        (CHATML, {}, ""),
        (R1, {}, "<think>\n"),
        (QWEN3, {}, ""),
        (QWEN3, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\nLet me think.\n<think>{% endif %}"), {}, "Let me think.\n<think>"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\n[THINK]{% endif %}"), {}, "[THINK]"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\n<seed:think>{% endif %}"), {}, "<seed:think>"),
        ("{{ messages[-1].content }}<A><think>", {}, "<think>"),  # whatever is asked of it
        ("{{ raise_exception('no') if messages | length > 1 }}{{ messages[0].content }}"
         "{% if add_generation_prompt %}<A><think>{% endif %}", {}, "<think>"),
        (None, {}, ""),
    ],
)  # fmt: skip
def test_what_a_template_opens_an_answer_with_is_said_already(template, settings, said):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("1+1=", "<think>", "assistant\n")]
    prompts = prompts_of(rows, template, chat_template_kwargs=settings or None)
    assert [found for _, found, _ in prompts] == [said] * 3
    assert all(text.endswith(said) for text, _, _ in prompts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("User: 1+1=\nAssistant: <think>", "<think>"), ("<A><think>\n", "<think>\n"), ("<A><think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("Put thoughts in <think> and </think>.", ""), ("<think>x</think>", ""), ("1+1=", ""), ("<thinking>\n", "<thinking>\n"),
    ],
)  # fmt: skip
def test_a_text_that_ends_in_an_open_block_of_thoughts_says_it(text, said):
    assert said_at_end(text) == said
    assert one(text, None)[1:] == (said, text.removesuffix(said))


@pytest.mark.parametrize(
    ("said", "closing"),
    [("<think>\n", "</think>"), ("<think></think>", ""), ("It is", ""), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
     ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷")],
)  # fmt: skip
def test_the_tag_that_closes_thoughts_is_known(said, closing):
    assert closing_of(said) == closing


# C3: whole messages


def test_whole_messages_go_to_the_template_without_arrows_nulls():
    chat = [
        {"role": "user", "content": "1+1=", "name": "Ann"},
        {"role": "assistant", "content": "2", "reasoning_content": "easy"},
        CALL,
        {"role": "tool", "content": "2", "tool_call_id": "7"},
        {"role": "user", "content": "And?"},
    ]
    other = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "sub", "arguments": {"b": 2}}}],
    }
    rows = [{"prompt": chat}, {"prompt": [QUESTION, other, QUESTION]}]
    for (text, _, asked), row in zip(prompts_of(rows, WHOLE), rows, strict=True):
        assert text == make_tokenizer(WHOLE).apply_chat_template(row["prompt"], tokenize=False)
        assert asked == row["prompt"]


def test_tools_and_a_rows_own_settings_go_to_the_template(tmp_path):
    tools = [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}}
    ]
    rows = [{"prompt": [QUESTION], "tools": tools, "chat_template_kwargs": {"mood": "glad"}}, {"prompt": [QUESTION], "tools": None, "chat_template_kwargs": None}]  # fmt: skip
    expected = [f"{json.dumps([QUESTION])}{json.dumps(tools)}glad", f"{json.dumps([QUESTION])}nullsad"]
    as_json = [
        {**row, **{name: row[name] and json.dumps(row[name]) for name in ("tools", "chat_template_kwargs")}}
        for row in rows
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for given in (rows, as_json, str(path)):
        prompts = prompts_of(given, WHOLE, chat_template_kwargs={"mood": "sad"})
        assert [text for text, _, _ in prompts] == expected


@pytest.mark.parametrize(
    ("chat", "row", "message"),
    [
        (
            [QUESTION, CALL, QUESTION],
            {},
            "row 0 of train_dataset has tool_calls, and the tokenizer has no chat template",
        ),
        ([{**QUESTION, "name": "Ann"}], {}, "has name, and the tokenizer has no chat template"),
        ([QUESTION], {"tools": [{"type": "function"}]}, "has tools, and the tokenizer has no chat template"),
    ],
)
def test_without_a_template_nothing_is_dropped_but_refused(chat, row, message):
    with pytest.raises(ValueError, match=message):
        one(chat, None, **row)


@pytest.mark.parametrize(
    ("chat", "row", "message"),
    [
        ([QUESTION, CALL], {}, "ends with a tool call"),
        ([QUESTION, CALL, QUESTION], {"template": CHATML}, "has tool_calls, which the chat template leaves out"),
        (
            [QUESTION],
            {"template": CHATML, "tools": [{"type": "function"}]},
            "has tools, which the chat template leaves out",
        ),
        ([QUESTION], {"tools": "[{"}, "has tools or chat_template_kwargs that are no JSON"),
        ([QUESTION], {"tools": "hammer"}, "has tools or chat_template_kwargs that are no JSON"),
        ([QUESTION], {"tools": 5}, "has the tools '5'; make it a list of tools, or remove the column"),
        ([QUESTION], {"tools": '{"name": "add"}'}, "has the tools .*; make it a list of tools"),
        ([QUESTION], {"chat_template_kwargs": 5}, "has the chat_template_kwargs '5'; make it an object such as"),
        ([QUESTION], {"chat_template_kwargs": False}, "has the chat_template_kwargs 'False'; make it an object"),
        ([QUESTION], {"chat_template_kwargs": "[1]"}, "has the chat_template_kwargs .*; make it an object"),
        ([QUESTION], {"chat_template_kwargs": '"x"'}, "has the chat_template_kwargs 'x'; make it an object"),
        ([QUESTION], {"chat_template_kwargs": ["mood"]}, "has the chat_template_kwargs .*; make it an object"),
        ([{"role": "user", "content": None}], {}, "a chat is a list of role and content texts"),
        ([{"role": "user"}], {}, "a list of role and content texts"),
        ([{"role": "user", "content": 3}], {}, "a list of role and content texts"),
    ],
)
def test_a_chat_that_cannot_be_answered_is_refused(chat, row, message):
    with pytest.raises(ValueError, match=message):
        one(chat, **{"template": WHOLE, **row})


NAMES_ITS_ROLES = CHATML.replace(
    "{{ m.role }}", "{{ 'model' if m.role == 'assistant' or m.role == \"gpt\" else m.role }}"
)


@pytest.mark.parametrize("role", ["human", "User", "", "user\nx", "bot", "message", "role"])
def test_a_role_that_a_template_only_passes_on_is_refused(role):
    chat = [QUESTION, {"role": role, "content": "hi"}]
    for template in (CHATML, NAMES_ITS_ROLES, None):
        with pytest.raises(InputError, match="row 0 of train_dataset has a message of the role '.*none that the chat"):
            one(chat, template)


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "gpt", "model"])
def test_a_role_that_is_known_or_that_the_template_names_is_taken(role):
    assert "hi" in one([QUESTION, {"role": role, "content": "hi"}, QUESTION], NAMES_ITS_ROLES)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_thinkin": False}, "has 'enable_thinkin', which the chat template does not read; did you mean enable_th"),
        ({"tone": "glad"}, "has 'tone', which the chat template does not read; leave it out"),
        *[({name: True}, f"has {name!r}, which is set here; leave it out") for name in sorted(OURS)],
    ],
)  # fmt: skip
def test_settings_that_a_template_would_not_read_are_refused(settings, message):
    with pytest.raises(InputError, match=f"^the chat_template_kwargs of row 0 of train_dataset {message}"):
        one([QUESTION], QWEN3, chat_template_kwargs=settings)
    with pytest.raises(InputError, match=f"^chat_template_kwargs {message}"):
        prompts_of([{"prompt": [QUESTION]}], QWEN3, chat_template_kwargs=settings)


@pytest.mark.parametrize("content", ["", "  ", []])
def test_a_chat_that_says_nothing_is_refused(content):
    chat = [{"role": "system", "content": " "}, {"role": "user", "content": content}]
    with pytest.raises(InputError, match="row 0 of train_dataset has a prompt of white space alone; leave it out"):
        one(chat, CHATML)
    assert "Ask." in one([{"role": "system", "content": "Ask."}, chat[1]], CHATML)[0]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "column", [{"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"mood": "glad"}}], ids=lambda c: next(iter(c))
)  # fmt: skip
def test_a_text_with_what_only_a_chat_template_shows_is_refused(column, as_json):
    ((name, value),) = column.items()
    given = json.dumps(value) if as_json else value
    with pytest.raises(ValueError, match=f"row 0 of train_dataset has {name}, and its prompt is a text"):
        one("1+1=", WHOLE, **{name: given})


@pytest.mark.parametrize("empty", [None, "", " ", "[]", "{}", "null", []])
def test_a_text_with_empty_tools_stays_a_text(empty):
    assert one("1+1=", WHOLE, tools=empty, chat_template_kwargs=empty)[0] == "1+1="


# C4: media


@pytest.mark.parametrize(
    "column", [
        "image", "images", "video", "videos", "audio", "audios", "Image", "image_url", "imageUrls", "image_path", "imagepath",
        "image_0", "image1", "input_image", "img", "imgs", "img_path", "picture", "pixel_values", "video-file", "audio_array",
        "multi_modal_data", "multimodal_inputs",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["cat.png", ["cat.png"], {"bytes": b"x", "path": None}])
def test_a_column_of_media_is_refused(column, value):
    rows = [{"prompt": "1+1=", column: None}, {"prompt": "1+2=", column: value}]
    with pytest.raises(ValueError, match=f"train_dataset has the column {column}, and only text is trained on"):
        load_rows(rows, GRPOConfig())


@pytest.mark.parametrize(
    "column", {
        "imagine": "x", "imaginary_part": "x", "imagery": "x", "picturesque": "x", "audience": "x", "provider": "x", "pilgrims": "x",
        "images": "", "num_images": 0, "has_image": False,
    }.items(), ids=lambda c: c[0],
)  # fmt: skip
def test_a_column_with_an_innocent_name_or_without_media_is_taken(column):
    rows = load_rows([{"prompt": "1+1=", column[0]: column[1]}], GRPOConfig())
    assert column[0] in rows.column_names


def test_a_feature_of_media_is_refused_under_any_name_and_an_empty_column_is_none():
    png = Path(__file__).parents[1] / "benchmarks/results"
    dataset = Dataset.from_dict(
        {"prompt": ["1+1="], "picture": [str(png)]}, features=Features({"prompt": Value("string"), "picture": Image()})
    )
    with pytest.raises(ValueError, match="has the column picture"):
        load_rows(dataset, GRPOConfig())
    empty = Dataset.from_dict(
        {"prompt": ["1", "2"], "images": [[], None]},
        features=Features({"prompt": Value("string"), "images": List(Image())}),
    )
    assert load_rows(empty, GRPOConfig())["prompt"] == ["1", "2"]


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video", "video": "x"}, {"type": "input_audio"}, {"image": "x"}]
)  # fmt: skip
def test_a_content_part_of_media_is_refused_and_parts_of_text_are_taken(part):
    text = {"type": "text", "text": "1+1="}
    with pytest.raises(ValueError, match="has a content part of type .*, and only text is trained on"):
        one([{"role": "user", "content": [text, part]}], CHATML)
    with pytest.raises(ValueError, match="has a content part with image_url, and only text is trained on"):
        one([{"role": "user", "content": [{**text, "image_url": "x"}]}], CHATML)
    parts = [{"role": "user", "content": [text, {"type": "text", "text": " And?"}]}]
    assert one(parts, CHATML)[0] == "<|im_start|>user\n1+1= And?<|im_end|>\n<|im_start|>assistant\n"


def test_a_message_with_images_is_refused():
    with pytest.raises(ValueError, match="has a message with images, and only text is trained on"):
        one([{**QUESTION, "images": ["x"]}], CHATML)
    with pytest.raises(ValueError, match="has a message with image_path"):
        one([{**QUESTION, "image_path": "cat.png"}], CHATML)
    assert one([{**QUESTION, "images": []}], CHATML)[0].startswith("<|im_start|>user\n1+1=")


# C5: a chat written as a text

CHATS_AS_TEXT = [
    json.dumps([QUESTION]), json.dumps([QUESTION], indent=1), str([QUESTION]), json.dumps(QUESTION), json.dumps(json.dumps([QUESTION])),
    json.dumps([{"content": "x", "role": "user"}]), "[{'content': 'x', 'role': 'user'}\n {'content': 'y', 'role': 'assistant'}]",
    json.dumps([{"from": "human", "value": "x"}]), f"  {json.dumps([QUESTION])}\n", json.dumps([{"name": "Ann", **QUESTION}]),
]  # fmt: skip


@pytest.mark.parametrize("text", CHATS_AS_TEXT)
@pytest.mark.parametrize("column", ["prompt", "question", "problem"])
def test_a_chat_written_as_a_text_is_refused_with_the_remedy(text, column, tmp_path):
    rows = [{column: "1+1=", "answer": "2"}, {column: text, "answer": "2"}]
    with pytest.raises(ValueError, match="row 1 of train_dataset is a chat written as a text, .*JSONL"):
        prompts_of(rows, CHATML)


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"role": "admin"} has which rights?', "{x}", "role: user, content: x", '["role", "content"]']
)
def test_a_text_that_is_no_chat_stays_a_text(text):
    assert one(text, CHATML)[2] == text
