"""Users name objectives, engines name versions of them. A request keeps the version that it began with.

Knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace

from mavis_dist.decode import Choice, Request, Update
from serve.messages import Admission, Message, OpenStream, Refused


def pinned(open_stream: OpenStream, versions: Mapping[str, str]) -> OpenStream:
    """Streams for requests that name objectives, which become these versions: objective -> version.

    The messages name objectives again.
    """
    objectives = {version: name for name, version in versions.items()}

    async def open_pinned(request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        weights = {versions[name]: weight for name, weight in request.weights.items()}
        async with aclosing(open_stream(replace(request, weights=weights), admission)) as messages:
            async for message in messages:
                yield _renamed(message, objectives)

    return open_pinned


def _renamed(message: Message, names: Mapping[str, str]) -> Message:
    if isinstance(message, Request):
        return replace(message, weights={names[name]: weight for name, weight in message.weights.items()})
    if isinstance(message, Refused):
        return replace(message, message=_with_objectives(message.message, names))
    if isinstance(message, list):
        return [_renamed_update(update, names) for update in message]
    return message


def _renamed_update(update: Update, names: Mapping[str, str]) -> Update:
    choice = update.finished
    if choice is None:
        return update
    error = None if choice.error is None else _with_objectives(choice.error, names)
    renamed: Choice = replace(choice, values={names[name]: v for name, v in choice.values.items()}, error=error)
    return replace(update, finished=renamed)


def _with_objectives(text: str, names: Mapping[str, str]) -> str:
    # The longest first: one version's name may be the beginning of another's.
    for version in sorted(names, key=len, reverse=True):
        text = text.replace(version, names[version])
    return text
