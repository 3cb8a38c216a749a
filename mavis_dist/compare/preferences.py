"""The default preference of each kind of reward."""

from __future__ import annotations

PREFERENCES = {  # by kind of reward
    "sentiment": "Be warm, positive and encouraging.",
    "brevity": "Answer in as few words as possible.",
    "relevance": "Stay strictly on the user's question.",
}
