"""lm-evaluation-harness on this engine gives what it gives with transformers, and our KoBEST equals its own."""

import json
from pathlib import Path

import pytest
import torch
from tiny import KOBEST, english_texts, korean_texts, write_jsonl

from redwhale.engine import load_recipe, run_recipe
from redwhale.engine.choice_scoring import log_likelihoods
from redwhale.engine.errors import RecipeError
from redwhale.engine.few_shot import with_examples
from redwhale.engine.kobest import KOBEST_TASKS, read_documents, read_task, score
from redwhale.model import load_model, save_model
from redwhale.tokenizer import Tokenizer, export_hf_tokenizer, load_model_proto

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
SHARED = Path(__file__).parents[2].parent / "shared/data"

TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{text}}\\n"
doc_to_choice: ["yes", "no", "perhaps not"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answer": """
task: answer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["a"], max_gen_toks: 12, do_sample: false}
filter_list: [{name: strict, filter: [{function: take_first}]}, {name: loose, filter: [{function: take_first}]}]
metric_list: [{metric: exact_match}]
""",
    "text": """
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}


def harness(folder, batch_size=4):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size, add_bos_token=True)


def same_choices(folder, kobest, shots, limit):
    """Assert that every item of the five tasks has the harness's log-likelihoods, choice and metrics."""
    from lm_eval.tasks import TaskManager

    from redwhale.engine.lm_eval_adapter import kobest_task

    nothing = TaskManager(include_defaults=False)  # else thousands of files are read
    theirs, model, tokenizer = harness(folder), load_model(folder), Tokenizer(folder / "tokenizer.model")
    for task in KOBEST_TASKS:
        evaluated = lm_eval.simple_evaluate(
            model=theirs,
            tasks=[kobest_task(kobest, task)],
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=1,
            task_manager=nothing,
        )
        samples = sorted(evaluated["samples"][f"kobest_{task}"], key=lambda sample: sample["doc_id"])
        expected = [[float(value[0]) for value in sample["filtered_resps"]] for sample in samples]
        items = read_task(kobest, task)[:limit]
        found = log_likelihoods(model, tokenizer, with_examples(items, read_task(kobest, task, "train"), shots))
        assert len(found) == len(expected) == limit
        for ours, values in zip(found, expected, strict=True):
            assert ours == pytest.approx(values, abs=1e-3)
            assert ours.index(max(ours)) == values.index(max(values))
        metrics = {key.partition(",")[0]: value for key, value in evaluated["results"][f"kobest_{task}"].items()}
        ours = score(items, found, task=task)
        assert (ours.acc, ours.acc_stderr, ours.macro_f1) == pytest.approx(
            (metrics["acc"], metrics["acc_stderr"], metrics["f1"])
        )
        assert ours.acc_norm == (pytest.approx(metrics["acc_norm"]) if "acc_norm" in metrics else None)


@pytest.fixture(scope="module")
def kobest(tmp_path_factory):
    """The quickstart's items as jsonl, the last ten of each task as the train split."""
    folder = tmp_path_factory.mktemp("kobest")
    for task in KOBEST_TASKS:
        rows = read_documents(KOBEST, task)
        write_jsonl(folder / task / "test.jsonl", rows[:10])
        write_jsonl(folder / task / "dev.jsonl", rows[:1])
        write_jsonl(folder / task / "train.jsonl", rows[10:])
    return folder


@pytest.fixture(scope="module")
def exported(finished):
    return finished.run_dir / "export" / "model"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Three tasks, one of each kind of request, on a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": text[:length], "label": length % 3, "answer": text[length : length + 3]}
        for length, text in zip((20, 41, 90, 700), english_texts()[:2] + korean_texts()[:2], strict=True)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    data = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        more = f"dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(data)}\n"
        (folder / f"{name}.yaml").write_text(task + more, encoding="utf-8")
    return folder


@pytest.mark.parametrize("shots", [0, 2])
def test_kobest_equals_the_harness_item_by_item(exported, kobest, shots):
    same_choices(exported, kobest, shots, limit=3)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model and the KoBEST v1 files are not on this machine")
def test_kobest_of_a_real_model_equals_the_harness_item_by_item(tmp_path, shots):
    source = SHARED / "models" / "stories15m"
    export_hf_tokenizer(load_model_proto(source / "tokenizer.model"), tmp_path / "tokenizer")
    files = sorted((tmp_path / "tokenizer").iterdir())
    save_model(load_model(source, dtype=torch.float32), tmp_path / "model", extra_files=files)
    same_choices(tmp_path / "model", SHARED / "kobest_v1", shots, limit=4)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_gives_what_it_gives_with_transformers(exported, task_folder, task):
    from lm_eval.tasks import TaskManager

    from redwhale.engine.lm_eval_adapter import EngineLM

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    engine = EngineLM(load_model(exported), Tokenizer(exported / "tokenizer.model"), max_tokens=300, batch_size=3)
    theirs, ours = (
        lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
        for model in (harness(exported), engine)
    )
    assert len(ours["samples"][task]) == (8 if task == "answer" else 4)  # once for each filter
    for expected, found in zip(theirs["samples"][task], ours["samples"][task], strict=True):
        assert expected["doc_id"] == found["doc_id"]
        if task == "answer":
            assert found["resps"] == expected["resps"]
            assert found["resps"][0][0]
        else:
            flat = [torch.tensor(sample["resps"], dtype=torch.float64).flatten() for sample in (found, expected)]
            torch.testing.assert_close(*flat, atol=1e-3, rtol=1e-6)


def test_metrics_of_several_filters_keep_their_names(exported, task_folder):
    from redwhale.engine.lm_eval_adapter import EngineLM, run_tasks

    engine = EngineLM(load_model(exported), Tokenizer(exported / "tokenizer.model"))
    found = run_tasks(engine, ["answer", "text", "choice"], limit=2, include=str(task_folder))
    assert {"exact_match (strict)", "exact_match (loose)"} <= set(found["answer"])
    assert found["text"]["bits_per_byte"] > 0
    assert found["choice"]["acc_stderr"] >= 0


def test_a_recipe_runs_tasks_of_a_folder(exported, task_folder, tmp_path):
    (tmp_path / "measure.toml").write_text(
        f'name = "measure"\nruns = "{tmp_path}"\ndevice = "cpu"\nprecision = "fp32"\n'
        f'[base]\ncheckpoint = "{exported}"\n'
        f'[eval]\nlm_eval = ["choice", "text"]\nlm_eval_include = "{task_folder}"\nlm_eval_items = 3\n',
        encoding="utf-8",
    )
    (measured,) = run_recipe(load_recipe(tmp_path / "measure.toml"), say=lambda line: None)
    found = measured["summary"]["checkpoints"]["base"]["lm_eval"]
    assert set(found) == {"choice", "text"}
    page = (tmp_path / "measure" / "eval" / "results.md").read_text(encoding="utf-8")
    assert f"| base | choice | acc | {found['choice']['acc']:.4g} |" in page
    with pytest.raises(RecipeError, match="lm_eval has no task 'nothing'"):
        run_recipe(load_recipe(tmp_path / "measure.toml", ['eval.lm_eval=["nothing"]']), say=lambda line: None)
