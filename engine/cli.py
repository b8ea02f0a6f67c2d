"""The command line: `redwhale run`, one command a step, and commands for data, plans, checkpoints and reports."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from .tokenizer_parsers import TOKENIZER_COMMANDS, add_tokenizer_parsers

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
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["tokenizer"] and " ".join(arguments[:2]) in TOKENIZER_COMMANDS:
        arguments[:2] = [" ".join(arguments[:2])]  # beside `redwhale tokenizer RECIPE`
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes all positional arguments at once, so overrides behind an option are left over.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Everything heavy is imported behind the parser, so that --help and worker processes start at once.
    from .errors import USER_ERRORS, Interrupted, StoppedElsewhere, explain_os_error

    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
        sys.stdout.flush()
    except Interrupted as stop:
        _say(stop, stop.exit_code)
        return stop.exit_code
    except StoppedElsewhere as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on with the step it was in", 130)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*USER_ERRORS, OSError) as error:
        if options.debug:
            traceback.print_exc()
        _say(explain_os_error(error) if isinstance(error, OSError) else error, 2)
        return 2
    except RuntimeError:
        from .world import current

        if not current().failed:
            raise
        return 1  # the connection to a process that has said why it ended
    return 0


def _say(message: object, code: int) -> None:
    """Print why the command ends; of several processes that say the same, one does."""
    from .world import current

    if current().fail(str(message), code):
        print(f"redwhale: {message}", file=sys.stderr, flush=True)


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
        step = commands.add_parser(name, parents=[common if name == "filter" else recipe], help=text)
        if name == "filter":
            _add_explain(step)
        step.add_argument("--force", action="store_true", help="redo the step even if it is up to date")
        if name in ("train", "sft"):
            step.add_argument(
                "--profile", type=int, default=0, metavar="N", help="trace N steps of each stage with torch.profiler"
            )
        step.set_defaults(command=_run, only=name)

    snapshot = commands.add_parser(
        "snapshot", parents=[recipe], help="a checkpoint of the stage in training, from its latest saved state"
    )
    snapshot.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="to write, for Hugging Face tools")
    snapshot.set_defaults(command=_snapshot)

    add_tokenizer_parsers(commands, common)

    plan = commands.add_parser("plan", parents=[recipe], help="memory, time and cost of every stage, before paying")
    plan.add_argument(
        "--gpu", default="h100-80gb", metavar="NAME", help="h100-80gb (default), h200, ... or NAME=BYTES,TFLOPS,GBPS"
    )
    plan.add_argument("--model", metavar="MODEL", help="preset or checkpoint, where the recipe's base is not at hand")
    plan.add_argument("--price", type=float, metavar="N", help="of an hour, for the cost")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")
    plan.set_defaults(command=_plan)

    fetching = commands.add_parser(
        "fetch", parents=[common], help="copy a published step from an object store, checked"
    )
    fetching.add_argument("url", metavar="URL", help="such as s3://bucket/shards, the output of [filter] or [pack]")
    fetching.add_argument("folder", type=Path, metavar="FOLDER", help="such as runs/NAME/pack")
    fetching.set_defaults(command=_fetch)

    ablation = commands.add_parser(
        "filter-ablation", parents=[recipe], help="what each group of filter rules is worth, by small proxy models"
    )
    ablation.add_argument("--megabytes", type=float, default=20.0, metavar="N", help="raw text that is sampled")
    ablation.add_argument("--tokens", type=int, default=1_000_000, metavar="N", help="bytes that every model trains on")
    ablation.add_argument("--seeds", type=int, default=3, metavar="N", help="models for each variant")
    ablation.add_argument("--groups", default="", metavar="A,B", help="groups of rules; all by default")
    ablation.set_defaults(command=_filter_ablation)

    generate = commands.add_parser("generate", parents=[common], help="text from a checkpoint")
    generate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with weights and tokenizer.model")
    generate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="several are continued at once; - reads standard input"
    )
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    generate.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1, words so far become less likely"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    generate.add_argument("--template", metavar="NAME", help="with --chat, instead of the checkpoint's own")
    generate.add_argument("--device", default="auto")
    generate.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto, the default, is the stored one"
    )
    generate.set_defaults(command=_generate)

    talk = argparse.ArgumentParser(add_help=False, parents=[common])
    talk.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with weights and tokenizer.model")
    talk.add_argument(
        "--template", metavar="NAME", help="redwhale, chatml, llama-2 or a Jinja file, instead of the checkpoint's own"
    )
    talk.add_argument("--device", default="auto")
    talk.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto, the default, is the stored one"
    )
    chat = commands.add_parser("chat", parents=[talk], help="talk to a checkpoint in the terminal")
    chat.add_argument("--system", metavar="TEXT", help="instructions, instead of the template's own")
    chat.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of one answer")
    chat.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy")
    chat.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus sampling")
    chat.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(command=_chat)
    serve = commands.add_parser("serve", parents=[talk], help="an OpenAI-compatible endpoint, for trying out")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--name", help="what clients call the model; by default its folder's name")
    serve.set_defaults(command=_serve)

    new = commands.add_parser("new", parents=[common], help="a checkpoint with random weights")
    new.add_argument("preset", nargs="?", metavar="PRESET", help="such as tiny-solar-10.7b; see --list")
    new.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="to write; must not exist, or be empty")
    new.add_argument("--list", action="store_true", help="show the presets with their sizes")
    new.add_argument("--vocab-size", type=int, metavar="N", help="instead of the preset's")
    new.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same weights on every machine")
    new.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    new.set_defaults(command=_new)

    upscale = commands.add_parser("upscale", parents=[common], help="a deeper checkpoint out of one's layers (SOLAR)")
    upscale.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="Hugging Face folder to copy layers from")
    upscale.add_argument("folder", type=Path, metavar="FOLDER", help="to write; must not exist, or be empty")
    upscale.add_argument("--first", type=int, metavar="N", help="layers from the bottom; three quarters by default")
    upscale.add_argument("--last", type=int, metavar="N", help="layers from the top; three quarters by default")
    upscale.set_defaults(command=_upscale)

    report = commands.add_parser("report", parents=[common], help="one HTML page with a run's plots and tables")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/quickstart")
    report.set_defaults(command=_report)

    grades = commands.add_parser("grades", parents=[common], help="count what people wrote into a sheet of answers")
    grades.add_argument("sheet", type=Path, metavar="SHEET", help="such as a copy of runs/NAME/eval/qa-NAME.csv")
    grades.set_defaults(command=_grades)
    return parser


def _add_explain(step: argparse.ArgumentParser) -> None:
    step.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="optional with --explain")
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as filter.workers=4")
    step.add_argument("--explain", type=Path, metavar="FILE", help="print all scores of one document, filter nothing")
    step.add_argument("--id", metavar="ID", help="of the document to explain; the file's first by default")


def _explain(options: argparse.Namespace) -> None:
    from ..filtering import FilterConfig, explain_file
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides) if options.recipe is not None else None
    config = (recipe and recipe.filter) or FilterConfig(inputs=[str(options.explain)])
    print(explain_file(options.explain, config.measure_options(), identifier=options.id, html=config.html))


def _run(options: argparse.Namespace) -> None:
    if getattr(options, "explain", None) is not None:
        _explain(options)
        return
    if options.recipe is None:
        from ..filtering import CorpusError

        raise CorpusError("filter needs a recipe, or --explain FILE to print the scores of one document")
    from .pipeline import run_recipe, table
    from .recipe import load_recipe
    from .world import join

    world = join()
    profiled = getattr(options, "profile", 0)
    profile = [f"{options.only}.profile={profiled}"] if profiled else []
    recipe = load_recipe(options.recipe, [*options.overrides, *profile])
    say = lambda line: print(line, flush=True)  # noqa: E731 (a log read while it grows)
    rows = run_recipe(recipe, only=options.only, force=options.force, say=say, world=world)
    world.close()
    if options.only is None and world.is_first:
        print(f"\n{table(rows)}\n")
        try:
            from .report import write_report
        except ModuleNotFoundError as missing:
            print(f'no report: it needs {missing.name}, pip install "redwhale[report]"')
        else:
            print(f"report: {write_report(recipe.run_dir)}")


def _snapshot(options: argparse.Namespace) -> None:
    from .recipe import load_recipe
    from .steps.context import Context
    from .steps.train import snapshot

    training = Context.create(load_recipe(options.recipe, options.overrides))
    # On the CPU, since the GPUs may be training, but in the precision that training resolves there.
    overrides = [*options.overrides, "device=cpu", f"precision={training.precision}"]
    recipe = load_recipe(options.recipe, overrides)
    print(snapshot(Context.create(recipe), options.to), flush=True)


def _plan(options: argparse.Namespace) -> None:
    from .plan_command import plan_recipe
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    for line in plan_recipe(recipe, options.gpu, model=options.model, price=options.price, output=options.json):
        print(line, flush=True)


def _fetch(options: argparse.Namespace) -> None:
    from .copies import fetch
    from .progress import Progress

    with Progress("fetch", None, "B") as progress:
        manifest = fetch(options.url, options.folder, progress.update)
    size = sum(recorded["bytes"] for recorded in manifest["outputs"].values())
    print(f"{options.folder}: {manifest['step']}, {len(manifest['outputs']):,} files, {size / 1e6:.1f} MB, all checked")


def _filter_ablation(options: argparse.Namespace) -> None:
    from .filter_ablation import AblationConfig, ablation_table, run_ablation
    from .recipe import load_recipe

    config = AblationConfig(
        megabytes=options.megabytes,
        tokens=options.tokens,
        seeds=options.seeds,
        groups=tuple(filter(None, options.groups.split(","))),
    )
    recipe = load_recipe(options.recipe, options.overrides)
    print(ablation_table(run_ablation(recipe, config, say=lambda line: print(line, flush=True))))


def _generate(options: argparse.Namespace) -> None:
    from ..model import check_settings, load_model, read_config
    from ..tokenizer import Tokenizer
    from .chat import read_chat_files
    from .conversations import Message
    from .device import resolve_device, resolve_precision
    from .errors import RecipeError
    from .text_generation import check_stops, check_vocabulary, generate_text, generate_texts, prompt_ids

    settings = {
        name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
    }
    # Everything that can be wrong is looked at before the weights, which take long to read.
    check_settings(**settings)
    stops = [unicodedata.normalize("NFC", stop) for stop in options.stop]  # as the prompts are, whatever was typed
    check_stops(stops)
    prompts = _prompts(options.prompts)
    config = read_config(options.checkpoint)
    if not (options.checkpoint / "tokenizer.model").exists():
        raise RecipeError(f"{options.checkpoint} has no tokenizer.model: put the one of its model beside the weights")
    tokenizer = Tokenizer(options.checkpoint / "tokenizer.model")
    check_vocabulary(tokenizer, config.vocab_size)
    begun: list[str] | list[list[int]] = prompts
    ends = []
    if options.chat:
        template = read_chat_files(options.checkpoint, options.template)[1]
        begun = [template.prompt_ids([Message("user", prompt)]) for prompt in prompts]
        ends = template.stop_ids
    device = resolve_device(options.device)
    dtype = None if options.precision == "auto" else resolve_precision(options.precision, device)
    model = load_model(options.checkpoint, device=device, dtype=dtype)

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal of another encoding than UTF-8 cannot show every character a model writes.
        sys.stdout.reconfigure(errors="replace")
    # The answer of a chat is printed alone; a continuation behind its prompt, as the tokenizer spells it.
    shown = ["" if options.chat else tokenizer.decode(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    more = {"stop": stops, "ends": ends, "answer": options.chat, "seed": options.seed, **settings}
    if len(prompts) == 1:
        pieces = generate_text(model, tokenizer, begun[0], **more)
        print(shown[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = generate_texts(model, tokenizer, begun, **more)
    print("\n---\n".join(prompt + text for prompt, text in zip(shown, texts, strict=True)))


def _prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of a command line, the one called "-" from standard input without its last line end."""
    from .errors import RecipeError

    if arguments.count("-") > 1:
        raise RecipeError("- stands for standard input, which can be read once; give it as one prompt only")
    if "-" not in arguments:
        return list(arguments)
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None
    text = text.removesuffix("\n").removesuffix("\r")
    return [text if argument == "-" else argument for argument in arguments]


def _chat(options: argparse.Namespace) -> None:
    from ..model import check_settings
    from .chat import Sampling
    from .chat_commands import chat, load_chat_model

    names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
    settings = {name: getattr(options, name) for name in names}
    check_settings(**settings)
    model = load_chat_model(
        options.checkpoint, template=options.template, device=options.device, precision=options.precision
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    chat(model, Sampling(seed=options.seed, **settings), system=options.system)


def _serve(options: argparse.Namespace) -> None:
    from .chat_commands import load_chat_model
    from .errors import RunError

    try:
        from .serving import listen, serve
    except ModuleNotFoundError as missing:
        raise RunError(f'serving needs {missing.name}: pip install "redwhale[serve]"') from None

    listening = listen(options.host, options.port)  # before the weights, which take long to read
    model = load_chat_model(
        options.checkpoint, template=options.template, device=options.device, precision=options.precision
    )
    model.name = options.name or model.name
    serve(model, listening)


def _new(options: argparse.Namespace) -> None:
    from .errors import RecipeError
    from .model_commands import list_presets, new_model

    if options.list:
        print(list_presets())
        return
    if options.folder is None:
        raise RecipeError("`redwhale new` needs a preset and a folder; `redwhale new --list` shows the presets")
    print(
        new_model(
            options.preset,
            options.folder,
            vocab_size=options.vocab_size,
            seed=options.seed,
            precision=options.dtype,
        )
    )


def _upscale(options: argparse.Namespace) -> None:
    from .model_commands import upscale

    print(upscale(options.checkpoint, options.folder, first=options.first, last=options.last))


def _report(options: argparse.Namespace) -> None:
    from .errors import RunError

    try:
        from .report import write_report
    except ModuleNotFoundError as missing:
        raise RunError(f'the report needs {missing.name}: pip install "redwhale[report]"') from None

    print(write_report(options.run_dir))


def _grades(options: argparse.Namespace) -> None:
    from .evaluation_tables import markdown_table
    from .grading_sheet import grades_table, read_grades

    table = grades_table(read_grades(options.sheet))
    print(markdown_table(table.header, table.rows))


if __name__ == "__main__":
    sys.exit(main())
