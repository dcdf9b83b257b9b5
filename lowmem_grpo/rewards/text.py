"""The text of a completion, whether the prompt was a string or a chat."""


def completion_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
