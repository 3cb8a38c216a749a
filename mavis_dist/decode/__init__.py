"""Decoding: requests in, answers out.

>>> from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams
"""

from mavis_dist.decode.chat import chat_prompts
from mavis_dist.decode.engine import Engine
from mavis_dist.decode.guide import Guide, GuideRow
from mavis_dist.decode.local_guide import LocalGuide
from mavis_dist.decode.preferences import PRESETS, Preference, PreferenceParams
from mavis_dist.decode.processor import TiltProcessor
from mavis_dist.decode.request import (
    Alternative,
    Candidate,
    Choice,
    FinishReason,
    LengthError,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
    TokenLogprobs,
    Update,
)
from mavis_dist.decode.search import beam_search, best_of

__all__ = [
    "PRESETS",
    "Alternative",
    "Candidate",
    "Choice",
    "Engine",
    "FinishReason",
    "Guide",
    "GuideRow",
    "LengthError",
    "LocalGuide",
    "Preference",
    "PreferenceParams",
    "Request",
    "RequestError",
    "SamplingParams",
    "Scorer",
    "TiltProcessor",
    "TokenLogprobs",
    "Update",
    "beam_search",
    "best_of",
    "chat_prompts",
]
