"""When a completion is whole."""

from collections.abc import Callable

from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.policy import Policy


def ending(policy: Policy, params: SamplingParams) -> Callable[[list[int]], str | None]:
    """What ends a completion with its newest token: "eos", "stop" or "length", or None. Asked after every token."""
    ends, strings = set(policy.eos_token_ids), params.stop_strings
    # A token is a byte at least, so that this many hold any stop string that the newest completes; one more, because
    # decoders like Llama 2's take the first token's leading space away.
    tail = max((len(string.encode()) + 1 for string in strings), default=0)

    def found(ids: list[int]) -> str | None:
        if ids[-1] in ends:
            return "eos"
        if tail:
            # A window that begins within a character of several byte tokens is not read at all, up to the next other
            # token; one of four windows begins between two.
            for more in range(4):
                text = policy.tokenizer.decode(ids[-tail - more :])
                if any(string in text for string in strings):
                    return "stop"
                if "\ufffd" not in text:
                    break
        return "length" if len(ids) == params.max_completion_length else None

    return found
