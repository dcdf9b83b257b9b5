"""The text of prompts and completions, whether strings or chats."""


def completion_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_text(prompt: str | list[dict]) -> str:
    """A string, or the last message of a chat, which is the question."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
