"""A tiny adaptation that the engine's tests share: real text, a real tokenizer, some thousand weights."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch

from redwhale.engine.recipe import Recipe, load_recipe
from redwhale.model import Llama, ModelConfig, save_model

PROJECT = Path(__file__).resolve().parents[1]
GOOD_KOREAN = PROJECT / "recipes" / "quickstart" / "crawl_good.jsonl"
KOBEST = PROJECT / "recipes" / "quickstart" / "kobest"

RECIPE = """
name = "tiny"
runs = "{root}/runs"
device = "cpu"
precision = "{precision}"

[heldout]
english = ["{root}/data/english_heldout.jsonl"]

[base]
tokenizer = "{root}/data/tokenizer.model"

[base.pretrain]
corpus = ["{root}/data/english.jsonl"]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
sequence_length = 64
max_position_embeddings = 256
tokens = 8_000
lr = 1e-2
batch_size = 4

[filter]
inputs = ["{root}/data/korean"]
validation_fraction = 0.15

[tokenizer]
vocab_size = 1_300
max_added = 300
threads = 1

[init]
compare = ["random"]

[pack]

[train]
sequence_length = 64
batch_size = 4
micro_batch_size = 2
log_every = 5
checkpoint_every = 7

[[train.stages]]
name = "embed-head"
train = ["embed", "head"]
tokens = 10_000
lr = 5e-3

[[train.stages]]
name = "odd"
train = ["layers.odd"]
tokens = 10_000
lr = 5e-3

[[train.stages]]
name = "even"
train = ["layers.even"]
tokens = 10_000
lr = 5e-3

[[train.stages]]
name = "lora"
train = ["lora"]
tokens = 10_000
lr = 5e-3
lora = {{ r = 4, alpha = 8.0 }}

[sft]
data = ["{root}/data/sft.jsonl"]
heldout = ["{root}/data/sft_heldout.jsonl"]
sequence_length = 256
batch_size = 2
lr = 5e-3
lora = {{ r = 4, alpha = 8.0 }}

[eval]
documents = 5
kobest = "{kobest}"

[export]
"""


def write_jsonl(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def english_texts() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name][:1500] for name in sorted(topics)][:40]


def korean_texts() -> list[str]:
    lines = GOOD_KOREAN.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def write_tiny_data(root: Path) -> None:
    """The inputs of RECIPE below `root/data`."""
    data = root / "data"
    english, korean = english_texts(), korean_texts()
    write_jsonl(data / "english.jsonl", ({"text": text} for text in english[2:] + korean[:2]))
    write_jsonl(data / "english_heldout.jsonl", ({"text": text} for text in english[:2]))
    write_jsonl(data / "korean" / "good.jsonl", ({"text": text} for text in korean[2:]))
    spam = "★★★무료★★★ 100% 당첨!!! ☎☎☎ $$$ >>>클릭<<< "
    write_jsonl(data / "korean" / "bad.jsonl", [{"text": spam * 10}, {"text": "짧다"}, {"text": korean[5]}])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"첫 낱말은? {text[:40]}"},
                {"role": "assistant", "content": text.split()[0]},
            ]
        }
        for text in korean
    ]
    write_jsonl(data / "sft.jsonl", chats[:24])
    write_jsonl(data / "sft_heldout.jsonl", chats[24:30])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in english for line in text.splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    (data / "tokenizer.model").write_bytes(model.getvalue())


def write_recipe(root: Path, precision: str = "fp32") -> Path:
    path = root / "tiny.toml"
    path.write_text(RECIPE.format(root=root, precision=precision, kobest=KOBEST), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder with the tiny recipe and its data; read only."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny_data(root)
    write_recipe(root)
    return root


@pytest.fixture(scope="session")
def finished(tiny_root) -> Recipe:
    """The tiny recipe after `redwhale run`, shared and read only."""
    from redwhale.engine import run_recipe

    recipe = load_recipe(tiny_root / "tiny.toml")
    run_recipe(recipe, say=lambda line: None)
    return recipe


TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, config: ModelConfig = TINY) -> Llama:
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.to(dtype)


@pytest.fixture
def tiny_checkpoint(tmp_path) -> Path:
    save_model(tiny_model(), tmp_path / "tiny-checkpoint")
    return tmp_path / "tiny-checkpoint"
