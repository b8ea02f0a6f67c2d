"""The model computes what transformers computes from the same checkpoint: logits, gradients, text."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from redwhale.model import Llama, PackedDocuments, generate, load_model, save_model

STORIES = Path(__file__).parents[2].parent / "shared/data/models/stories15m"


def logits_of(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, PackedDocuments.from_lengths([len(ids)]))


def greedy_text(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    model.generation_config.eos_token_id = None
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def test_logits_equal_those_of_transformers(variant, ids):
    theirs, folder = variant
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        actual = logits_of(load_model(folder), ids)
    assert float(expected.std()) > 0.5  # else the comparison would say little
    assert float((actual - expected).abs().max()) <= 1e-4


def test_greedy_continuation_equals_that_of_transformers(variant, ids):
    theirs, folder = variant
    prompt = ids[:12].tolist()
    expected = greedy_text(theirs, prompt, 64)
    assert len(set(expected)) > 8
    assert list(generate(load_model(folder), prompt, max_new_tokens=64)) == expected


def test_gradients_of_every_tensor_equal_those_of_transformers(variant, ids):
    theirs, folder = variant
    targets = ids.roll(-1)
    targets[-1] = targets[20:25] = -100
    theirs.zero_grad()
    F.cross_entropy(theirs(ids[None]).logits[0], targets, ignore_index=-100, reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    model = load_model(folder).requires_grad_()
    model.loss(ids, targets, PackedDocuments.from_lengths([len(ids)]), chunk_tokens=17).loss_sum.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert float(error) <= 1e-3, name


def test_loss_equals_that_of_transformers(variant, ids):
    theirs, folder = variant
    with torch.no_grad():
        expected = theirs(ids[None], labels=ids[None]).loss
        output = load_model(folder).loss(
            ids[:-1], ids[1:], PackedDocuments.from_lengths([len(ids) - 1]), chunk_tokens=10
        )
    assert output.loss_sum.item() / (len(ids) - 1) == pytest.approx(expected.item(), rel=1e-5)
    assert output.token_losses.shape == (len(ids) - 1,)


def test_dynamic_scaling_equals_transformers_beyond_the_context_of_pretraining(write_hf, tmp_path, ids):
    """transformers keeps the scaling of the longest text it has seen, so every comparison takes a fresh model."""
    settings = {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40}
    model = None
    for length in (30, 41, 60):
        theirs = write_hf(tmp_path / str(length), **settings)
        model = load_model(tmp_path / str(length))
        with torch.no_grad():
            expected = theirs(ids[None, :length]).logits[0]
            assert float((logits_of(model, ids[:length]) - expected).abs().max()) <= 1e-4
    theirs = write_hf(tmp_path / "greedy", **settings)
    prompt = ids[:12].tolist()
    assert list(generate(model, prompt, max_new_tokens=64)) == greedy_text(theirs, prompt, 64)


def test_dynamic_scaling_looks_at_each_packed_document_alone(write_hf, tmp_path, ids):
    write_hf(tmp_path, rope={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=20)
    model = load_model(tmp_path)
    with torch.no_grad():
        packed = model(ids, PackedDocuments.from_lengths([15, 45]))
        alone = torch.cat([logits_of(model, ids[:15]), logits_of(model, ids[15:])])
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


def test_a_sliding_window_changes_the_logits_behind_it_only(write_hf, tmp_path, ids):
    write_hf(tmp_path, "mistral", sliding_window=16)
    windowed = load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    full = load_model(tmp_path)
    with torch.no_grad():
        difference = (logits_of(windowed, ids) - logits_of(full, ids)).abs().amax(-1)
    assert float(difference[:16].max()) < 1e-5
    assert float(difference[16:].min()) > 1e-3


def test_bf16_logits_differ_from_fp32_no_more_than_those_of_transformers(variant, ids):
    theirs, folder = variant
    with torch.no_grad():
        exact = theirs(ids[None]).logits[0]
        their_bf16 = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids[None]).logits[0]
        ours = logits_of(load_model(folder, dtype=torch.bfloat16), ids)
    assert ours.dtype == torch.bfloat16
    # Both round at every step; ours keeps the rotation in fp32. A wrong dtype somewhere costs a factor, not 30%.
    assert float((ours - exact).norm()) < 1.3 * float((their_bf16 - exact).norm())


def test_transformers_loads_what_save_model_wrote_with_equal_logits(variant, tmp_path, ids):
    theirs, folder = variant
    save_model(load_model(folder), tmp_path / "saved")
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(reloaded) is type(theirs)
    with torch.no_grad():
        assert torch.equal(reloaded(ids[None]).logits, theirs(ids[None]).logits)


def test_the_written_configuration_means_the_same_to_transformers(variant, tmp_path):
    theirs, folder = variant
    save_model(load_model(folder, dtype=torch.bfloat16), tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    for name in load_model(folder).config.__dataclass_fields__:
        assert getattr(config, name, None) == getattr(theirs.config, name, None), name
    assert config.rope_parameters == theirs.config.rope_parameters
    assert config.dtype == torch.bfloat16


@pytest.mark.skipif(not STORIES.exists(), reason="needs the 15M-parameter TinyStories checkpoint")
def test_a_trained_model_continues_a_story_as_in_transformers():
    prompt = [1, 9038, 2501, 263, 931, 29892]  # "Once upon a time," in the Llama 2 tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    expected = greedy_text(theirs, prompt, 40)
    assert list(generate(load_model(STORIES, dtype=torch.float32), prompt, max_new_tokens=40)) == expected
    assert len(set(expected)) > 15
