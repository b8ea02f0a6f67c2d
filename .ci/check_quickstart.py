"""Check what the quickstart promises, from the manifests of a finished run: python .ci/check_quickstart.py RUN_DIR."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path


def check(run: Path) -> list[str]:
    """Sentences for everything that does not hold."""

    def manifest(step: str) -> dict:
        return json.loads((run / step / "manifest.json").read_text(encoding="utf-8"))

    problems = []
    stages = [name.removeprefix("train/") for name in json.loads((run / "train/stages.json").read_text())]
    if len(stages) != 4:
        problems.append(f"expected four stages, found {stages}")
    for step in ["base", *(f"train/{stage}" for stage in stages), "sft"]:
        before, after = manifest(step)["before"], manifest(step)["after"]
        print(f"{step}: loss {before:.4f} -> {after:.4f}")
        if not after < before:
            problems.append(f"the loss does not fall in {step}: {before} -> {after}")

    methods = manifest("init")["summary"]["methods"]
    bits = {method: domains["korean"]["bits_per_byte"] for method, domains in methods.items()}
    print(f"init: bits per byte {bits}")
    if not bits["decomposition/decomposition"] < bits["random/random"]:
        problems.append(f"decomposition does not beat random: {bits}")

    tokenizer = manifest("tokenizer")["summary"]
    if tokenizer["parity_mismatches"] != 0 or not tokenizer["parity_texts"]:
        problems.append(f"tokenizer.json and tokenizer.model disagree: {tokenizer['parity_mismatches']} texts")

    verification = manifest("export")["summary"]["verification"]
    print(f"export: {verification}")
    if verification is None or verification["relative_difference"] > 1e-3 or not verification["same_ids"]:
        problems.append(f"the export does not agree with transformers: {verification}")

    filtered = manifest("filter")["summary"]
    dropped = sum(rule["dropped_documents"] for rule in filtered["rules"])
    if not 0 < dropped == filtered["documents_in"] - filtered["documents_out"]:
        problems.append("the filter's counts do not add up")

    page = (run / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    if page.count("<svg") < 3 or any(outside in page for outside in ("<script src", "<link", "<img")):
        problems.append("the report lacks its plots or reads other files")
    return problems


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    for problem in found:
        print(f"FAILED: {problem}")
    sys.exit(1 if found else 0)
