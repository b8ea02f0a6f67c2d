"""`redwhale init` on a tied, padded, byte-level base, and with a second model that knows the new language."""

import io
import json

import pytest
import sentencepiece
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny import english_texts, korean_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.errors import RecipeError
from redwhale.model import ModelConfig, create_checkpoint
from redwhale.tokenizer import open_vocabulary

EMBEDDING = "model.embed_tokens.weight"
PADDING = 7


def small(vocab_size, hidden_size, *, tied):
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )


def with_varied_rows(folder):
    """Random rows at the scale of a trained model, so that no two products tie."""
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING] = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(5))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors[EMBEDDING]


@pytest.fixture(scope="module")
def byte_level_run(finished, tmp_path_factory):
    """A recipe whose base has a byte-level tokenizer.json, a tied head and padding rows; its two steps are done."""
    root = tmp_path_factory.mktemp("byte-level")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*english_texts(), "한국어"], trainer)
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    config = small(made.get_vocab_size() + PADDING, 32, tied=True)
    create_checkpoint(config, root / "base", seed=0, dtype=torch.float32)
    with_varied_rows(root / "base")
    made.save(str(root / "base" / "tokenizer.json"))
    (root / "runs" / "bytes").mkdir(parents=True)
    (root / "runs" / "bytes" / "filter").symlink_to(finished.run_dir / "filter")
    data = finished.run_dir.parents[1] / "data"
    path = root / "bytes.toml"
    path.write_text(
        f"""
        name = "bytes"
        runs = {json.dumps(str(root / "runs"))}
        device = "cpu"
        precision = "fp32"
        [base]
        checkpoint = {json.dumps(str(root / "base"))}
        [heldout]
        english = [{json.dumps(str(data / "english_heldout.jsonl"))}]
        [filter]
        inputs = [{json.dumps(str(data / "korean"))}]
        validation_fraction = 0.15
        [tokenizer]
        vocab_size = 150
        max_added = 100
        threads = 1
        [init]
        compare = ["focus", "distillation"]
        fit_documents = 5
        fit_steps = 2
        break_collisions = 0.0
        heldout_documents = 2
        """,
        encoding="utf-8",
    )
    for step in ("tokenizer", "init"):
        run_recipe(load_recipe(path), only=step, say=lambda line: None)
    return path, root / "base", root / "runs" / "bytes"


def test_new_rows_of_a_byte_level_base_are_means_of_the_rows_of_their_bytes(byte_level_run):
    _, base_folder, run = byte_level_run
    base, hybrid = (open_vocabulary(folder / "tokenizer.json") for folder in (base_folder, run / "tokenizer"))
    first, rows = len(base.names), load_file(run / "init" / "model" / "model.safetensors")[EMBEDDING]
    before = load_file(base_folder / "model.safetensors")[EMBEDDING]
    assert len(before) == first + PADDING
    assert len(rows) == len(hybrid.names) == first + 100
    assert torch.equal(rows[:first], before[:first])
    lines = parquet.read_table(run / "init" / "provenance.parquet").to_pylist()
    assert [line["id"] for line in lines] == list(range(first, first + 100))
    korean = 0
    for line in lines:
        ids = line["base_ids"]
        assert b"".join(base.surfaces[i] for i in ids) == hybrid.surfaces[line["id"]]
        torch.testing.assert_close(rows[line["id"]], before[ids].mean(0))
        korean += "가" <= hybrid.surfaces[line["id"]].decode(errors="replace").strip()[:1] <= "힣"
    assert korean > 20  # the others are beginnings of syllables


def test_a_byte_level_base_is_measured_as_its_own_tokenizer_writes(byte_level_run):
    _, base_folder, run = byte_level_run
    summary = json.loads((run / "init" / "manifest.json").read_text())["summary"]
    assert (summary["tied"], summary["chosen"]) == (True, "decomposition/decomposition")
    assert list(summary["methods"]) == [f"{m}/{m}" for m in ("decomposition", "focus", "distillation")]
    assert [path.name for path in sorted((run / "init" / "model").glob("tokenizer*"))] == [
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    library = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    # BOS and EOS of the configuration around each document: every token but BOS is predicted.
    expected = sum(len(library.encode(text).ids) + 1 for text in english_texts()[:2])
    assert summary["base"]["english"]["tokens"] == expected
    assert summary["methods"]["decomposition/decomposition"]["korean"]["new_tokens"] > 0
    assert summary["base"]["english"]["bits_per_byte"] < summary["methods"]["focus/focus"]["english"]["bits_per_byte"]


def test_what_a_byte_level_or_tied_base_cannot_do_is_said_first(byte_level_run):
    path, _, _ = byte_level_run
    with pytest.raises(RecipeError, match=r"\+prior would change the input rows: .* ties its head"):
        run_recipe(load_recipe(path, ['init.compare=["mean+prior"]']), only="init", say=lambda line: None)
    with_pack = path.with_name("with_pack.toml")
    with_pack.write_text(path.read_text(encoding="utf-8") + "[pack]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"\[pack\] and what follows need a SentencePiece tokenizer.model"):
        run_recipe(load_recipe(with_pack), say=lambda line: None)


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A model of another width whose SentencePiece vocabulary has Korean words."""
    folder = tmp_path_factory.mktemp("donor") / "model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in english_texts() + korean_texts() for line in text.splitlines()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        minloglevel=2,
    )
    create_checkpoint(small(1500, 16, tied=True), folder, seed=1, dtype=torch.float32)
    with_varied_rows(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def test_pursuit_against_a_second_model_explains_its_vectors_by_shared_tokens(finished, donor, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    for step in ("base", "filter", "tokenizer"):
        (run / step).symlink_to(finished.run_dir / step)
    overrides = [
        f"runs={json.dumps(str(tmp_path / 'runs'))}",
        'init.head="omp"',
        # To a base of English alone, all pieces are: the embedding has no row by decomposition.
        'init.byte_only="omp"',
        "init.compare=[]",
        "init.break_collisions=0.0",
        f"init.second_checkpoint={json.dumps(str(donor))}",
    ]
    run_recipe(load_recipe(finished.run_dir.parents[1] / "tiny.toml", overrides), only="init", say=lambda line: None)
    second = sentencepiece.SentencePieceProcessor(model_file=str(donor / "tokenizer.model"))
    vectors = load_file(donor / "model.safetensors")[EMBEDDING].double()
    of_base = open_vocabulary(run / "base/model/tokenizer.model").surfaces
    in_both = {surface: i for i, surface in enumerate(open_vocabulary(donor / "tokenizer.model").surfaces) if surface}
    known = vectors[[in_both[surface] for surface in set(of_base) if surface in in_both]]
    base = load_file(run / "base" / "model" / "model.safetensors")
    extended = load_file(run / "init" / "model" / "model.safetensors")
    shared = 0
    for line in parquet.read_table(run / "init" / "provenance.parquet").to_pylist():
        assert (line["method"], line["byte_only"]) == ("omp", True)
        rebuilt = sum(w * base[line["tensor"]][i] for w, i in zip(line["weights"], line["base_ids"], strict=True))
        torch.testing.assert_close(extended[line["tensor"]][line["id"]], rebuilt, rtol=1e-3, atol=1e-4)
        if (own := second.piece_to_id(line["piece"])) == second.unk_id():
            continue
        shared += 1
        atoms = vectors[[in_both[of_base[i]] for i in line["base_ids"]]]
        weights = torch.tensor(line["weights"], dtype=torch.float64)
        solved = torch.linalg.lstsq(atoms.T, vectors[own][:, None]).solution[:, 0]
        torch.testing.assert_close(weights, solved, rtol=0.01, atol=1e-3)
        # The first is the one whose direction comes nearest.
        cosines = (known @ vectors[own]).abs() / known.norm(dim=1)
        assert float((atoms[0] @ vectors[own]).abs() / atoms[0].norm()) == pytest.approx(float(cosines.max()), rel=1e-6)
    assert shared > 100
