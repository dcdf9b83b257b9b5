"""The text of prompts and completions, whether strings or chats."""


def completion_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt's text: the string, or the last message of a chat, which is the question."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def tagged_answer(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`, in time linear in the text; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len("<answer>") : end].strip()
