"""LiteLLM: python litellm_client.py URL MODEL."""

import json
import sys

import litellm

url, model = sys.argv[1:]
options = {"api_base": url, "api_key": "none", "max_tokens": 8, "seed": 7, "num_retries": 0}
steering = {"extra_body": {"objective_weights": {"brief": 1.0}}}
turns = [{"role": "user", "content": "Hello there"}]

answer = litellm.completion(model=f"openai/{model}", messages=turns, **options, **steering)
chunks = litellm.completion(model=f"openai/{model}", messages=turns, stream=True, **options, **steering)
of_text = f"text-completion-openai/{model}"
text = litellm.text_completion(model=of_text, prompt=["Once upon", "The sky is"], **options, **steering)
one = litellm.text_completion(model=of_text, prompt="Once upon", **options, **steering)
print(
    json.dumps(
        {
            "chat": answer.choices[0].message.content,
            "chat streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "chat tokens": answer.usage.completion_tokens,
            "text": one.choices[0].text,
            "text batch": [choice.text for choice in text.choices],
        }
    )
)
