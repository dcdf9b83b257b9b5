"""The configuration of any training."""

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sft import SFTConfig

TrainingConfig = GRPOConfig | SFTConfig | RewardConfig
