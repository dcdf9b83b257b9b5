"""How a completion ends: by an end-of-sequence token, a stop string or its length."""

from collections.abc import Callable

from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.model.policy import Policy


def ending(policy: Policy, params: SamplingParams) -> Callable[[list[int]], str | None]:
    """A function of token ids that says what the newest ends: "eos", "stop", "length" or None."""
    ends, strings = set(policy.eos_token_ids), params.stop_strings
    # A token is a byte at least, so that this many hold any stop string that the newest completes; one more, because
    # decoders like Llama 2's take the first token's leading space away.
    tail = max((len(string.encode()) + 1 for string in strings), default=0)

    def shows(ids: list[int], *texts: str) -> bool:
        decoded = policy.tokenizer.decode(ids)
        return any(text in decoded for text in texts)

    def found(ids: list[int]) -> str | None:
        if ids[-1] in ends:
            return "eos"
        # The whole text decides. Where the end of it begins inside a character, decoders that fall back to bytes make
        # replacement characters of all bytes up to the next ordinary token.
        if tail and shows(ids[-tail:], *strings, "\ufffd") and shows(ids, *strings):
            return "stop"
        return "length" if len(ids) == params.max_completion_length else None

    return found
