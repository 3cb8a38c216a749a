"""Preferences as sentences, one for every kind of reward that has one."""

from __future__ import annotations

SENTENCES = {  # by kind of reward
    "sentiment": "Be warm, positive and encouraging.",
    "brevity": "Answer in as few words as possible.",
    "relevance": "Stay strictly on the user's question.",
}
