"""What is handed over works in the tools it is handed over to."""

import json
import shutil
import sys

import pytest
import torch
from tiny import write_jsonl

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.chat import ChatModel, Sampling
from redwhale.engine.conversations import Message
from redwhale.engine.errors import CheckpointError, RecipeError, RunError
from redwhale.model import load_model

ASK = [{"role": "user", "content": "첫 낱말은?"}]


def export_again(finished, tiny_root, tmp_path, *overrides):
    """The tiny run's export, done again with other settings; gives its folder and manifest."""
    shutil.copytree(finished.run_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns("export"))
    recipe = load_recipe(tiny_root / "tiny.toml", [f"runs={tmp_path}", *overrides])
    (manifest,) = run_recipe(recipe, only="export", say=lambda line: None)
    return recipe.run_dir / "export", manifest


@pytest.fixture(scope="module")
def exported(finished):
    return finished.run_dir / "export" / "model"


def test_transformers_pipeline_answers_as_we_do(exported):
    from transformers import pipeline

    generate = pipeline("text-generation", str(exported), dtype=torch.float32)
    # An untrained model repeats itself; the penalty makes the answer worth comparing.
    done = generate(ASK, max_new_tokens=16, do_sample=False, repetition_penalty=1.5)[0]["generated_text"]
    sampling = Sampling(max_new_tokens=16, repetition_penalty=1.5)
    ours = "".join(ChatModel.load(exported, dtype=torch.float32).answer([Message(**ASK[0])], sampling))
    assert len(ours.strip()) >= 3
    assert done[-1] == {"role": "assistant", "content": done[-1]["content"]}
    assert done[-1]["content"].removeprefix(" ") == ours


def test_the_manifest_tells_that_logits_ids_and_the_template_agree(finished):
    manifest = json.loads((finished.run_dir / "export" / "manifest.json").read_text(encoding="utf-8"))
    verification = manifest["summary"]["verification"]
    assert verification["relative_difference"] < 1e-5
    assert (verification["same_ids"], verification["same_chat"]) == (True, True)


def test_ids_that_transformers_does_not_share_are_refused(finished, tiny_root, tmp_path, monkeypatch):
    from redwhale.engine.steps import export

    def drop_nfc(proto, folder, **more):
        paths = real(proto, folder, **more)
        stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        stored["normalizer"]["normalizers"].append({"type": "Lowercase"})
        (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
        return paths

    real = export.export_hf_tokenizer
    monkeypatch.setattr(export, "export_hf_tokenizer", drop_nfc)
    with pytest.raises(CheckpointError, match="other token ids"):
        export_again(finished, tiny_root, tmp_path)
    assert not (tmp_path / "tiny" / "export").exists()


def test_the_adapter_alone_is_the_same_model_in_peft(finished, tiny_root, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = export_again(finished, tiny_root, tmp_path, "export.adapter=true")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    base = tmp_path / "tiny" / "train" / "4-lora" / "model"
    assert config["base_model_name_or_path"].endswith("train/4-lora/model")
    ids = torch.tensor([[1, 20, 21, 22]])
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        torch.testing.assert_close(on_base(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(
            on_base(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-3
        )
    assert AutoTokenizer.from_pretrained(folder / "adapter").chat_template
    assert "PeftModel" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_exported_is_refused_before_any_work(finished, tiny_root, tmp_path):
    for overrides, message in (
        (['sft.train=["layers.odd"]', "export.adapter=true"], r'needs a last step that trains \["lora"\] alone'),
        (["export.gguf=no/such.py"], r"export\.gguf = 'no/such\.py' is no file"),
    ):
        recipe = load_recipe(tiny_root / "tiny.toml", [f"runs={tmp_path}", *overrides])
        with pytest.raises(RecipeError, match=message):
            run_recipe(recipe, say=pytest.fail)


def test_a_converter_that_fails_says_why_and_leaves_no_gguf(finished, tiny_root, tmp_path):
    script = tmp_path / "convert.py"
    script.write_text("import sys\nprint('reading')\nsys.exit('no room for it')\n")
    with pytest.raises(RunError, match=r"convert\.py could not make a GGUF of .*: no room for it"):
        export_again(finished, tiny_root, tmp_path, f"export.gguf={script}")
    assert not list(tmp_path.rglob("*.gguf*"))


def test_the_converter_gets_the_folder_and_the_type(finished, tiny_root, tmp_path):
    """llama.cpp's script itself cannot be installed from a package index; this one notes what it is asked for."""
    script = tmp_path / "convert.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "assert (pathlib.Path(sys.argv[1]) / 'tokenizer.model').exists()\n"
        "pathlib.Path(sys.argv[3]).write_text(json.dumps([sys.executable, sys.argv[2], *sys.argv[4:]]))\n"
    )
    folder, manifest = export_again(finished, tiny_root, tmp_path, f"export.gguf={script}", "export.gguf_type=q8_0")
    asked = json.loads((folder / "model.gguf").read_text())
    assert asked == [sys.executable, "--outfile", "--outtype", "q8_0"]
    assert "model.gguf" in manifest["outputs"]


def test_the_model_card_tells_what_the_run_knows(finished, tiny_root, tmp_path):
    folder, _ = export_again(finished, tiny_root, tmp_path, "export.license=apache-2.0")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    front, _, body = card.partition("---\n\n")
    assert "license: apache-2.0" in front
    assert "library_name: transformers" in front
    filtered = json.loads((finished.run_dir / "filter" / "manifest.json").read_text(encoding="utf-8"))["summary"]
    assert f"{filtered['documents_out']:,} documents, left by the filter of {filtered['documents_in']:,}" in body
    for step in ("train/1-embed-head", "sft"):
        manifest = json.loads((finished.run_dir / step / "manifest.json").read_text(encoding="utf-8"))
        assert f"{manifest['summary']['tokens']:,}" in body
        assert f"{manifest['before']:.4f} | {manifest['after']:.4f} |" in body
    assert "### KoBEST, 0-shot" in body
    assert "80.83" in body
    assert "| base → init | boolq |" in body
    assert str(tiny_root) not in card  # a folder of the machine it was made on says nothing to others
    assert str(tmp_path) not in card


def test_fine_tuning_alone_is_a_recipe(finished, tmp_path):
    """A checkpoint from outside, Alpaca rows, ChatML: from fine-tuning to an export with its adapter."""
    from transformers import AutoTokenizer

    rows = [{"instruction": "첫 낱말은?", "input": text, "output": text.split()[0]} for text in ("가 나", "다 라")] * 6
    write_jsonl(tmp_path / "alpaca.jsonl", rows)
    (tmp_path / "tune.toml").write_text(
        f'name = "tune"\nruns = "{tmp_path}"\nprecision = "fp32"\n'
        f'[base]\ncheckpoint = "{finished.run_dir}/init/model"\n'
        f'[sft]\ndata = ["{tmp_path}/alpaca.jsonl"]\nheldout = ["{tmp_path}/alpaca.jsonl"]\ntemplate = "chatml"\n'
        "sequence_length = 256\nbatch_size = 2\nlr = 5e-3\nlora = { r = 4, alpha = 8.0 }\n"
        "[export]\nadapter = true\n",
        encoding="utf-8",
    )
    tuned, exported = run_recipe(load_recipe(tmp_path / "tune.toml"), say=lambda line: None)
    assert tuned["after"] < tuned["before"]
    assert exported["summary"]["verification"]["same_chat"]
    rendered = AutoTokenizer.from_pretrained(tmp_path / "tune" / "export" / "model").apply_chat_template(
        ASK, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<s><|im_start|>user\n첫 낱말은?<|im_end|>\n<|im_start|>assistant\n"
    assert load_model(tmp_path / "tune" / "export" / "model").config.vocab_size > 600
