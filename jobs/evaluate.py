"""Compare methods of steering on the unseen prompts of a finished run: figures, plots and a page.

    python -m jobs.evaluate --config FILE [--json FILE] [--answers FILE] [dotted.key=value ...]
    python -m jobs.evaluate --config FILE --from FILE,FILE [--json FILE]

`--answers` keeps all answers in one file; `--from` makes the figures of such files, without the run and its models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs import arguments
from mavis_dist.config import Config


def main() -> None:
    parser = arguments.parser("evaluate", "Compare methods of steering on the unseen prompts of a finished run.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments.add_answers(parser)
    parsed = parser.parse_args()
    config = arguments.config_of(parsed)
    arguments.refusing(lambda: run(config, parsed.json, parsed.answers, parsed.sources))


def run(config: Config, file: Path | None = None, answers: Path | None = None, sources: Sequence[Path] = ()) -> None:
    import json

    from mavis_dist.compare.results import table
    from mavis_dist.compare.run import compare
    from mavis_dist.progress import say

    comparison, page = compare(config, answers, sources)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(comparison.to_json(), indent=1) + "\n")
    say("report", page)
    print(table(comparison))


if __name__ == "__main__":
    main()
