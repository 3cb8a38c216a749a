"""Compare methods of steering on the unseen prompts of a finished run: figures, plots and a page.

python -m jobs.evaluate --config jobs/configs/quickstart.yaml [--json FILE] [dotted.key=value ...]
"""

from __future__ import annotations

from pathlib import Path

from jobs import arguments
from mavis_dist.config import Config


def main() -> None:
    parser = arguments.parser("evaluate", "Compare methods of steering on the unseen prompts of a finished run.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parsed = parser.parse_args()
    config = arguments.config_of(parsed)
    arguments.refusing(lambda: run(config, parsed.json))


def run(config: Config, file: Path | None = None) -> None:
    import json

    from mavis_dist.compare.results import table
    from mavis_dist.compare.run import compare
    from mavis_dist.progress import say

    comparison, page = compare(config)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(comparison.to_json(), indent=1) + "\n")
    say("report", page)
    print(table(comparison))


if __name__ == "__main__":
    main()
