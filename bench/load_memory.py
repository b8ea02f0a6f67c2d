"""Peak memory of loading a checkpoint, against the checkpoint's own size.

A random Llama checkpoint of about --gigabytes is written to a temporary folder. Fresh processes then load it, each
reading every weight and reporting its peak resident memory less what it had after its imports: ours and transformers'
`from_pretrained`, from one file and from shards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parser, write_result

LOADERS = {
    "redwhale": "from redwhale.model import load_model as load",
    "transformers": "from transformers import LlamaForCausalLM; load = LlamaForCausalLM.from_pretrained",
}
PROGRAM = """
import json, sys, time
import torch
{setup}
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
began = time.perf_counter()
model = load(sys.argv[1])
for parameter in model.parameters():  # a mapped file costs memory only once it is read
    parameter.data.view(torch.int16).max()
seconds = time.perf_counter() - began
peak = status("VmHWM") - before
print(json.dumps({{"peak_bytes": peak, "seconds": seconds, "dtype": str(next(model.parameters()).dtype)}}))
"""


def main() -> None:
    arguments = parser(__doc__, "load_memory")
    arguments.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default: %(default)s)")
    options = arguments.parse_args()

    import torch

    from redwhale.model import ModelConfig, create_checkpoint, parameter_count

    def config(layers: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
        )

    per_layer = parameter_count(config(2)) - parameter_count(config(1))
    layers = max(1, round((options.gigabytes * 1e9 / 2 - parameter_count(config(1))) / per_layer))
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for layout, shard_bytes in (("one file", 1 << 40), ("shards of 256 MB", 256 << 20)):
            folder = Path(scratch) / layout.replace(" ", "-")
            create_checkpoint(config(layers), folder, dtype=torch.bfloat16, max_shard_bytes=shard_bytes)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            for loader, setup in LOADERS.items():
                command = [sys.executable, "-c", PROGRAM.format(setup=setup), str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                measured = json.loads(output.splitlines()[-1])
                ratio = measured["peak_bytes"] / size
                results.append(
                    {"loader": loader, "layout": layout, "checkpoint_bytes": size, "ratio": ratio, **measured}
                )
                print(f"{loader:13} {layout:17} {ratio:.2f}x of {size / 1e9:.2f} GB in {measured['seconds']:.1f} s")
    write_result(options.result, __file__, {"results": results})


if __name__ == "__main__":
    main()
