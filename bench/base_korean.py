"""What a little Korean in the base's pretraining does to the initialisation of new rows.

Runs the quickstart's steps up to `init` twice in a temporary folder, with and without the Korean file in the base's
corpus, and compares the methods' bits per byte right after initialisation. Needs the quickstart's data
(`python recipes/quickstart_data.py`).
"""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from common import PROJECT, parser, write_result

from redwhale.engine import load_recipe, run_recipe

RECIPE = PROJECT / "recipes" / "quickstart.toml"
STEPS = ("base", "filter", "tokenizer", "init")


def run_steps(runs: Path, corpus: list[str], tokens: int, seed: int) -> dict[str, Any]:
    """Run the steps with this base corpus; the base's tokens, and bits per byte by method and domain."""
    recipe = load_recipe(
        RECIPE,
        [
            f"runs={json.dumps(str(runs))}",
            f"base.pretrain.corpus={json.dumps(corpus)}",
            f"base.pretrain.tokens={tokens}",
            f"seed={seed}",
        ],
    )
    manifests = {step: run_recipe(recipe, only=step)[0] for step in STEPS}
    base, init = manifests["base"]["summary"], manifests["init"]["summary"]
    bits = {
        method: {domain: measured["bits_per_byte"] for domain, measured in domains.items()}
        for method, domains in {**init["methods"], "base model": init["base"]}.items()
    }
    return {
        "seed": seed,
        "base_corpus": [Path(name).name for name in corpus],
        "base_corpus_tokens": base["corpus_tokens"],
        "pretraining_tokens": base["tokens"],
        "bits_per_byte": bits,
    }


def main() -> None:
    """Measure and write the result."""
    arguments = parser(__doc__, "base_korean")
    arguments.add_argument("--tokens", type=int, default=200_000, help="of each pretraining (default: %(default)s)")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    arguments.add_argument("--korean", default="korean.jsonl", help="name of the Korean file (default: %(default)s)")
    given = arguments.parse_args()

    pretrain = load_recipe(RECIPE).base.pretrain
    assert pretrain is not None
    english = [name for name in pretrain.corpus if Path(name).name != given.korean]
    korean = [name for name in pretrain.corpus if Path(name).name == given.korean]
    if not korean:
        raise SystemExit(f"the recipe's base.pretrain.corpus has no file {given.korean}: {', '.join(pretrain.corpus)}")
    rows = []
    with contextlib.chdir(PROJECT):
        for seed in given.seeds:
            for name, corpus in (("English only", english), ("English and Korean", [*english, *korean])):
                with tempfile.TemporaryDirectory() as runs:
                    rows.append({"base": name, **run_steps(Path(runs), corpus, given.tokens, seed)})
        korean_bytes = sum(Path(name).stat().st_size for name in korean)
    write_result(given.result, __file__, {"korean_file_bytes": korean_bytes, "runs": rows})


if __name__ == "__main__":
    main()
