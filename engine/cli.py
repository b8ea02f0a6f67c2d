"""The command line: `redwhale run`, one command a step, `generate` and `report`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_STEP_HELP = {
    "base": "pretrain a small base model, where the recipe names no checkpoint",
    "filter": "raw Korean text to a clean, deduplicated corpus",
    "tokenizer": "add Korean pieces to the base tokenizer",
    "init": "add rows for the new pieces to the base checkpoint",
    "pack": "tokenise the corpus into memory-mapped shards",
    "train": "continue pretraining in stages",
    "sft": "fine-tune on instruction data",
    "eval": "measure bits per byte and KoBEST",
    "export": "write a checkpoint for Hugging Face tools, and check it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's to mend, 130 or 143 stopped by a signal."""
    options = _parser().parse_args(arguments)
    # Everything heavy is imported behind the parser, so that --help and worker processes start at once.
    from .errors import USER_ERRORS, Interrupted, explain_os_error

    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
        sys.stdout.flush()
    except Interrupted as stop:
        print(f"redwhale: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("redwhale: interrupted; the same command goes on with the step it was in", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*USER_ERRORS, OSError) as error:
        if options.debug:
            traceback.print_exc()
        message = explain_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"redwhale: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="redwhale",
        description="Turn an English Llama/Mistral-family model into a Korean one.",
        epilog="Recipes are described in docs/recipes.md.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    recipe = argparse.ArgumentParser(add_help=False, parents=[common])
    recipe.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file, such as recipes/quickstart.toml")
    recipe.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as train.stages[0].lr=1e-4")

    run = commands.add_parser("run", parents=[recipe], help="every step that is configured and out of date")
    run.set_defaults(command=_run, only=None, force=False)
    for name, text in _STEP_HELP.items():
        step = commands.add_parser(name, parents=[recipe], help=text)
        step.add_argument("--force", action="store_true", help="redo the step even if it is up to date")
        step.set_defaults(command=_run, only=name)

    generate = commands.add_parser("generate", parents=[common], help="text from a checkpoint")
    generate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with weights and tokenizer.model")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--chat", action="store_true", help="put the prompt into the chat template of `sft`")
    generate.add_argument("--device", default="auto")
    generate.set_defaults(command=_generate)

    report = commands.add_parser("report", parents=[common], help="one HTML page with a run's plots and tables")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/quickstart")
    report.set_defaults(command=_report)
    return parser


def _run(options: argparse.Namespace) -> None:
    from .pipeline import run_recipe, table
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    say = lambda line: print(line, flush=True)  # noqa: E731 (a log read while it grows)
    rows = run_recipe(recipe, only=options.only, force=options.force, say=say)
    if options.only is None:
        print(f"\n{table(rows)}\n")
        try:
            from .report import write_report
        except ModuleNotFoundError as missing:
            print(f'no report: it needs {missing.name}, pip install "redwhale[report]"')
        else:
            print(f"report: {write_report(recipe.run_dir)}")


def _generate(options: argparse.Namespace) -> None:
    from ..model import generate, load_model
    from ..tokenizer import StreamDecoder, Tokenizer
    from .device import resolve_device
    from .errors import RecipeError
    from .sft import Message, segments

    if options.max_new_tokens < 1 or options.temperature < 0 or not 0 < options.top_p <= 1:
        raise RecipeError("--max-new-tokens must be at least 1, --temperature at least 0, --top-p in (0, 1]")
    tokenizer = Tokenizer(options.checkpoint / "tokenizer.model")
    model = load_model(options.checkpoint, device=resolve_device(options.device))
    prompt = options.prompt
    if options.chat:
        prompt, _ = next(segments([Message("user", prompt), Message("assistant", "")]))
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    tokens = generate(
        model,
        prompt_ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        stop_ids={tokenizer.eos_id},
        seed=options.seed,
    )
    decoder = StreamDecoder(tokenizer)
    if not options.chat:  # the answer of a chat begins a text of its own; a continuation keeps its first space
        print("".join(map(decoder.feed, prompt_ids)), end="")
    for token in tokens:
        print(decoder.feed(token), end="", flush=True)
    print(decoder.flush())


def _report(options: argparse.Namespace) -> None:
    from .errors import RunError

    try:
        from .report import write_report
    except ModuleNotFoundError as missing:
        raise RunError(f'the report needs {missing.name}: pip install "redwhale[report]"') from None

    print(write_report(options.run_dir))


if __name__ == "__main__":
    sys.exit(main())
