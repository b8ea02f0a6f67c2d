"""The numbers of a finished quickstart run, from the manifests that its steps left.

Run it on the machine that made the run: the machine it describes is the one it runs on.
"""

import json
from pathlib import Path
from typing import Any

from common import parser, write_result

from redwhale.engine.pipeline import STEPS


def read_manifests(run: Path) -> list[dict[str, Any]]:
    """The manifests of all finished units, in the order they run; set-aside and partial folders are left out."""
    paths = [
        path
        for path in [*run.glob("*/manifest.json"), *run.glob("train/*/manifest.json")]
        if path.parent.suffix not in (".previous", ".partial")
    ]
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def order(manifest: dict[str, Any]) -> tuple[int, int]:
        step, _, stage = manifest["step"].partition("/")
        return list(STEPS).index(step), int(stage.split("-")[0]) if stage else 0

    return sorted(manifests, key=order)


def bits_per_byte(text: dict[str, Any]) -> dict[str, float]:
    """Bits per byte by domain."""
    return {domain: measured["bits_per_byte"] for domain, measured in text.items()}


def main() -> None:
    """Collect and write the result."""
    arguments = parser(__doc__, "quickstart")
    arguments.add_argument("run", type=Path, metavar="RUN_DIR", help="such as runs/quickstart")
    given = arguments.parse_args()
    manifests = read_manifests(given.run)
    by_step = {manifest["step"]: manifest for manifest in manifests}
    missing = [step for step in STEPS if not any(name.split("/")[0] == step for name in by_step)]
    if missing:
        raise SystemExit(f"{given.run} is not finished, it lacks {', '.join(missing)}: run make demo first")
    if any(manifest["versions"] != manifests[0]["versions"] for manifest in manifests):
        raise SystemExit(f"the steps of {given.run} were run with different versions: delete it and run make demo")

    init, evaluated = by_step["init"]["summary"], by_step["eval"]["summary"]
    columns = ("step", "went_in", "came_out", "before", "after", "seconds", "finished")
    units = [{column: manifest[column] for column in columns} for manifest in manifests]
    write_result(
        given.result,
        __file__,
        {
            "versions": manifests[0]["versions"],
            "units": units,
            "seconds": round(sum(unit["seconds"] for unit in units), 1),
            "init": {
                "methods": {method: bits_per_byte(text) for method, text in init["methods"].items()},
                "base": bits_per_byte(init["base"]),
            },
            "eval": {
                checkpoint: {"bits_per_byte": bits_per_byte(found["text"]), "kobest": found.get("kobest")}
                for checkpoint, found in evaluated["checkpoints"].items()
            },
            "token_ratio": {domain["domain"]: domain["ratio"] for domain in by_step["tokenizer"]["summary"]["domains"]},
            "export": by_step["export"]["summary"]["verification"],
        },
        data=[given.run],
    )


if __name__ == "__main__":
    main()
