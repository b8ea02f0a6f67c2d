"""What groups of filter rules are worth on real text, by proxy models: the results of `redwhale filter-ablation`.

The proxy models are small and see little text, so that the intervals tell more than the means.
"""

import tempfile
from pathlib import Path

import msgspec
from common import parser, write_result

from redwhale.engine.filter_ablation import AblationConfig, ablation_table, run_ablation
from redwhale.engine.recipe import BaseConfig, Recipe
from redwhale.filtering import FilterConfig, PerplexityConfig


def main() -> None:
    """Measure, print the table, and write the result."""
    arguments = parser(__doc__, "filter_ablation")
    arguments.add_argument("inputs", nargs="+", type=Path, help="raw Korean text")
    arguments.add_argument("--heldout", nargs="+", type=Path, required=True, help="text that the filter never sees")
    arguments.add_argument("--clean", nargs="*", type=Path, default=[], help="text to train the cuts by perplexity on")
    arguments.add_argument("--megabytes", type=float, default=20, help="of raw text (default: %(default)s)")
    arguments.add_argument("--tokens", type=int, default=1_000_000, help="bytes a model reads (default: %(default)s)")
    arguments.add_argument("--seeds", type=int, default=3, help="models a variant (default: %(default)s)")
    arguments.add_argument("--hidden-size", type=int, default=128, help="of the models (default: %(default)s)")
    arguments.add_argument("--layers", type=int, default=4, help="of the models (default: %(default)s)")
    arguments.add_argument("--groups", nargs="*", default=[], help="of rules; all by default")
    arguments.add_argument("--runs", type=Path, help="folder to go on in after an interruption")
    given = arguments.parse_args()

    config = AblationConfig(
        megabytes=given.megabytes,
        tokens=given.tokens,
        seeds=given.seeds,
        hidden_size=given.hidden_size,
        num_hidden_layers=given.layers,
        groups=tuple(given.groups),
    )
    with tempfile.TemporaryDirectory() as temporary:
        recipe = Recipe(
            name="ablation",
            runs=str(given.runs or temporary),
            base=BaseConfig(checkpoint="unused"),
            heldout={path.name.split(".")[0]: (str(path),) for path in given.heldout},
            filter=FilterConfig(
                inputs=[str(path) for path in given.inputs],
                perplexity=PerplexityConfig(train=tuple(map(str, given.clean))) if given.clean else None,
            ),
        )
        variants = run_ablation(recipe, config)
    print(ablation_table(variants))
    write_result(
        given.result,
        __file__,
        {"settings": msgspec.to_builtins(config), "variants": msgspec.to_builtins(variants)},
        data=[*given.inputs, *given.heldout, *given.clean],
    )


if __name__ == "__main__":
    main()
