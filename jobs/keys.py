"""API keys of the HTTP service: add, list, remove.

    python -m jobs.keys add NAME --file keys.json
    python -m jobs.keys list --file keys.json
    python -m jobs.keys remove NAME --file keys.json

A key is printed once; the file holds its hash. A running service sees the change within seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs import arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.keys", description="Add, list and remove API keys.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="add | list | remove")
    for action, purpose in (
        ("add", "create a key and print it once"),
        ("remove", "remove a key"),
        ("list", "list the names of all keys"),
    ):
        command = actions.add_parser(action, help=purpose)
        if action != "list":
            command.add_argument("name", help="name of the key's owner")
        command.add_argument("--file", type=Path, default=Path("keys.json"), help="the key file (default: %(default)s)")
    given = parser.parse_args(argv)
    arguments.refusing(lambda: run(given.action, given.file, getattr(given, "name", "")))


def run(action: str, file: Path, name: str) -> None:
    from serve.gateway import api_keys

    if action == "add":
        print(api_keys.add(file, name))
    elif action == "remove":
        api_keys.remove(file, name)
    else:
        print("\n".join(sorted(api_keys.read(file))))


if __name__ == "__main__":
    main()
