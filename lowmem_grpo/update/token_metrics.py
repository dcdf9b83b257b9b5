"""Values that an update records at each token, and the means that are logged of them."""

import torch
from torch import Tensor

from lowmem_grpo.distributed import gathered, in_order, sum_over_ranks, world_size
from lowmem_grpo.rollout.rollout import Rollout

# Metrics that are the mean of what an update recorded, where it did: by metric, the name of what was recorded.
_MEANS = {"kl": "kl", "cispo_clip_ratio": "cispo_clipped", "vespo/phi_seq_mean": "phi_seq"}


class TokenMeter:
    """Values that an update recorded at the rollout's M tokens, however they were split into micro-batches."""

    def __init__(self, rollout: Rollout, device: torch.device):
        self.rollout = rollout
        self.device = device
        self.seen = self._zeros().bool()
        self.values: dict[str, Tensor] = {}  # (M,) fp32 each, 0 where not seen

    def _zeros(self) -> Tensor:
        return torch.zeros(self.rollout.num_tokens, device=self.device)

    def add(self, token_index: Tensor, **values: Tensor) -> None:
        """Record values (N,) at the tokens token_index (N,); a later iteration or another attempt overwrites them."""
        self.seen[token_index] = True
        for name, value in values.items():
            known = self.values.setdefault(name, self._zeros())
            known[token_index] = value.detach().to(known.dtype)

    def mean(self, name: str, part: Rollout) -> float | None:
        """Mean over the tokens of a part that were computed and that learn_mask leaves; None without any."""
        whole = self._of_all_ranks()
        where = slice(part.first_token_index, part.first_token_index + part.num_tokens)
        counted = whole.seen[where] if part.learn_mask is None else whole.seen[where] & part.learn_mask
        values = whole.values.get(name, self._zeros())[where][counted]
        return values.mean().item() if len(values) else None

    def metrics(self) -> dict[str, float]:
        """Means over the tokens that counted; clip minimum and maximum are over completions, as in TRL.

        What is the mean of nothing is NaN and not 0: where no token counted, because no group has a difference, or
        every completion is masked, nobody knows the policy's entropy.
        """
        return self._of_all_ranks()._metrics()

    def _of_all_ranks(self) -> "TokenMeter":
        """The values of all ranks, of which each has recorded others' tokens; itself where there is one."""
        if world_size() == 1:
            return self
        whole = TokenMeter(self.rollout, self.device)
        names = dict.fromkeys(in_order(gathered([*self.values])))
        seen = self.seen.to(torch.float32)
        whole.values = {name: self.values.get(name, self._zeros()).clone() for name in names}
        sum_over_ranks([seen, *whole.values.values()])
        whole.seen = seen > 0
        return whole

    def _metrics(self) -> dict[str, float]:
        sampled = self.rollout.sampled
        count, zeros = self.seen.sum(), self._zeros()  # a sum of nothing, 0, divided by 0 is NaN
        clipped_low, clipped_high = (self.values.get(name, zeros) for name in ("clipped_low", "clipped_high"))
        low, high = (self._completion_means(x) for x in (clipped_low, clipped_high))
        nothing = zeros.sum() / 0
        values = {
            "frac_tokens_skipped": 1 - (self.seen if sampled is None else self.seen[sampled]).float().mean(),
            "entropy": self.values.get("entropy", zeros).sum() / count,
            "clip_ratio/low_mean": clipped_low.sum() / count,
            "clip_ratio/low_min": low.min() if len(low) else nothing,
            "clip_ratio/high_mean": clipped_high.sum() / count,
            "clip_ratio/high_max": high.max() if len(high) else nothing,
            "clip_ratio/region_mean": (clipped_low + clipped_high).sum() / count,
        }
        for name, of in _MEANS.items():
            if of in self.values:
                values[name] = self.values[of].sum() / count
        if self.rollout.ref_logprobs is not None and "kl" not in self.rollout.metrics:
            values.setdefault("kl", nothing)
        if self.rollout.sampling_logprobs is not None:
            fresh = self.seen.clone()  # the tokens that this step's policy sampled
            fresh[len(fresh) - self.rollout.num_replayed_tokens :] = False
            difference = self.values.get("difference", zeros) * fresh
            values["sampling/sampling_logp_difference/mean"] = difference.sum() / fresh.sum()
            values["sampling/sampling_logp_difference/max"] = difference.max() if fresh.any() else nothing
        for name, of in (("ratio", "ratio"), ("sampling/importance_sampling_ratio", "importance_weights")):
            if of in self.values and self.seen.any():
                seen = self.values[of][self.seen]
                values |= {f"{name}/mean": seen.mean(), f"{name}/min": seen.min(), f"{name}/max": seen.max()}
        return {name: value.item() for name, value in values.items()}

    def _completion_means(self, values: Tensor) -> Tensor:
        """Means (B',) over the tokens of each completion that was computed."""
        sums, counts = (self.rollout.by_completion(x) for x in (values, self.seen.float()))
        return sums[counts > 0] / counts[counts > 0]
