"""How the next token is chosen."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    max_completion_length: int
    temperature: float  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float | None = None
    repetition_penalty: float = 1.0  # 1 is off

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
