"""Makes the demo's model from nothing: `python -m lowmem_grpo.demo.make_model --output_dir DIR` (about 6 CPU-minutes).

A Qwen2 of 0.6 million parameters learns to add in worked steps, then is given a lazy habit: most of the time it
answers at once, and then it is nearly always wrong. GRPO has to find out that showing the work pays.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from lowmem_grpo.demo import task

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STEPS, BATCH, LEARNING_RATE, WARMUP = 2000, 64, 3e-3, 100
HABIT_FROM = 0.85  # the share of the steps after which the lazy habit is taught


def make_tokenizer(words: Sequence[str] = ()) -> Qwen2Tokenizer:
    """A tokenizer with a token for each printable ASCII character, newline, tab, tag and word.

    AutoTokenizer makes a Qwen2Tokenizer for every Qwen2 model, whatever class was saved, so this is one.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    as_bytes = [
        token for character in characters for token, _ in ByteLevel(False, use_regex=False).pre_tokenize_str(character)
    ]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *TAGS, "<unk>", *as_bytes])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token="<unk>", pad_token="<|pad|>", eos_token="<|end|>", padding_side="left",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    # special=False keeps the tags in decoded text, where the rewards look for them.
    tags: list[str | AddedToken] = [AddedToken(tag, special=False, normalized=False) for tag in TAGS]
    tokenizer.add_tokens(tags)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False, single_word=True) for word in words])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=128, hidden_size=128, num_hidden_layers=3, intermediate_size=384, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=SPECIAL.index("<|end|>"), pad_token_id=SPECIAL.index("<|pad|>"),
    )  # fmt: skip


def demonstration(draw: random.Random, problem: task.Problem, habit: bool) -> str:
    """A target completion: worked or lazy, and in the habit phase sometimes with broken tags."""
    worked_share = (0.65 if problem[0] >= 65 else 0.25) if habit else 0.80
    text = task.worked(problem) if draw.random() < worked_share else task.lazy(problem)
    if habit and draw.random() < 0.10:
        text = text.replace(draw.choice(TAGS), "")
    return text


def as_batch(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of questions and completions, both (B, T); prompts and padding carry the label -100."""
    sequences, prompt_lengths = [], []
    for question, completion in pairs:
        prompt = tokenizer(f"<|user|>{question}<|assistant|>")["input_ids"]
        sequences.append(prompt + tokenizer(completion + "<|end|>")["input_ids"])
        prompt_lengths.append(len(prompt))
    width = max(map(len, sequences))
    ids = torch.tensor([s + [tokenizer.pad_token_id] * (width - len(s)) for s in sequences])
    labels = torch.tensor(
        [[-100] * p + s[p:] + [-100] * (width - len(s)) for s, p in zip(sequences, prompt_lengths, strict=True)]
    )
    return ids, labels


def learn(model: Qwen2ForCausalLM, batch_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Train all weights of a model on batch_of(step), by AdamW with a learning rate that warms up and falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    for step in range(steps):
        ids, labels = batch_of(step)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, output_dir: Path) -> None:
    model.generation_config.bos_token_id = None
    model.bfloat16().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def make_model(output_dir: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    draw = random.Random(seed + 1)
    train, evaluation = task.splits()
    held_out = set(train) | set(evaluation)
    tokenizer = make_tokenizer()
    model = Qwen2ForCausalLM(make_config())

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs: list[tuple[str, str]] = []
        while len(pairs) < BATCH:
            problem = task.random_problem(draw)
            if problem not in held_out:
                habit = step >= HABIT_FROM * STEPS
                pairs.append((task.question(problem), demonstration(draw, problem, habit)))
        return as_batch(tokenizer, pairs)

    learn(model, batch_of, STEPS)
    save(model, tokenizer, output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--seed", type=int, default=0)
    make_model(**vars(parser.parse_args()))
