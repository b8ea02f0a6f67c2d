"""The command line of `redwhale tokenizer build`, `check`, `report`, `sweep` and `prune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_HELP = {
    "build": "a hybrid tokenizer out of a base and text files, without a recipe",
    "check": "prove a tokenizer right: pieces reachable, files of one mind, texts back as they were",
    "report": "tokens of tokenizers beside those of a base, by domain",
    "sweep": "token ratio by number of added pieces, with a plot",
    "prune": "a checkpoint and its tokenizer without the base pieces that texts never use",
}
TOKENIZER_COMMANDS = tuple(f"tokenizer {name}" for name in _HELP)
"""Commands that `redwhale tokenizer` has beside running the step of a recipe."""


def add_tokenizer_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to the subparsers of `redwhale`."""
    parsers = {
        name: commands.add_parser(f"tokenizer {name}", parents=[common], help=text) for name, text in _HELP.items()
    }
    for name in ("build", "sweep"):
        parser = parsers[name]
        parser.add_argument("base", type=Path, metavar="BASE", help="tokenizer.model, or a byte-level tokenizer.json")
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="to write")
        parser.add_argument(
            "--corpus",
            action="append",
            required=True,
            metavar="[SOURCE=]PATH",
            help="file or folder of Korean text; may be given several times",
        )
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of [tokenizer], such as max_added=8000")
    parsers["check"].add_argument("path", type=Path, metavar="PATH", help="folder, tokenizer.model or tokenizer.json")
    parsers["check"].add_argument("--base", type=Path, metavar="PATH", help="the tokenizer that it extends")
    parsers["check"].add_argument("--fuzz", type=int, default=10_000, metavar="N", help="random texts")
    parsers["report"].add_argument("base", type=Path, metavar="BASE", help="tokenizer to compare with")
    parsers["report"].add_argument("tokenizers", type=Path, nargs="+", metavar="PATH", help="tokenizers to compare")
    parsers["report"].add_argument("--preset", metavar="NAME", help="model whose growth and FLOPs are reported")
    parsers["report"].add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    parsers["sweep"].add_argument(
        "--sizes", default="2000,4000,8000,12000,16000,20000,24000,32000", metavar="N,N", help="numbers of added pieces"
    )
    for name in ("build", "check", "report", "sweep"):
        parsers[name].add_argument(
            "--text", action="append", default=[], metavar="NAME=PATH", help="held-out text of a domain, or more of it"
        )
        parsers[name].add_argument("--kobest", type=Path, metavar="FOLDER", help="KoBEST's TSV files, as more domains")
    for name in ("build", "check"):
        parsers[name].add_argument(
            "--english", type=Path, metavar="PATH", help="text whose lines should keep their ids"
        )
    prune = parsers["prune"]
    prune.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face folder with tokenizer.model")
    prune.add_argument("folder", type=Path, metavar="FOLDER", help="to write; must not exist, or be empty")
    prune.add_argument(
        "--text", action="append", required=True, metavar="NAME=PATH", help="text of every language it is to know"
    )
    prune.add_argument("--min-frequency", type=float, default=1, metavar="N", help="least count of a piece that stays")
    for name, parser in parsers.items():
        parser.set_defaults(command=_run, tokenizer_command=name)


def _run(options: argparse.Namespace) -> None:
    from . import tokenizer_commands

    getattr(tokenizer_commands, options.tokenizer_command)(options)
