"""LangChain's two OpenAI classes: python langchain_client.py URL MODEL."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
asked = {"model": model, "max_tokens": 8, "seed": 7, "temperature": 1}  # OpenAI's class has another default
options = {**asked, "base_url": url, "api_key": "none", "max_retries": 0}
steered = {**options, "extra_body": {"objective_weights": {"brief": 1.0}}}
turns = [("human", "Hello there")]

chat, text = ChatOpenAI(**steered), OpenAI(**steered)
answer = chat.invoke(turns)
print(
    json.dumps(
        {
            "chat": answer.content,
            "chat streamed": "".join(chunk.text for chunk in chat.stream(turns)),
            "chat batch": [one.content for one in chat.batch([turns, turns])],
            "chat tokens": answer.usage_metadata["output_tokens"],
            "text": text.invoke("Once upon"),
            "text streamed": "".join(text.stream("Once upon")),
            "text batch": text.batch(["Once upon", "The sky is"]),
        }
    )
)
