"""Rewards of finished answers: text rules, embedding relevance, sequence classifiers, the user's own function.

Light to import; models and lexicons are loaded when a reward is built.
"""

from mavis_dist.rewards.build import build, score_parts
from mavis_dist.rewards.protocol import Reward, RewardError

__all__ = ["Reward", "RewardError", "build", "score_parts"]
