"""Checkpoints survive crashes and full disks at any moment, do not stop training, and keep the last and the best."""

import contextlib
import json
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from redwhale.engine import checkpoints
from redwhale.engine.checkpoints import CheckpointStore
from redwhale.engine.errors import RunError, explain_os_error


class Crash(BaseException):
    pass


def crash_at(monkeypatch, call: int) -> None:
    """Raise at the `call`-th change of the file system's names, before it happens."""
    count = 0

    def counted(original):
        def changed(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                raise Crash
            return original(*arguments, **options)

        return changed

    for name in ("rename", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int, value: float, **options) -> None:
    with CheckpointStore(folder, **options) as store:
        store.save(step, {"w": torch.full((2,), value)}, {"n": step})


def value(store: CheckpointStore, step=None) -> tuple[float, int]:
    loaded = store.load(step)
    assert loaded is not None
    tensors, state = loaded
    assert state["n"] == state["step"]
    return float(tensors["w"][0]), state["step"]


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "fp32": torch.randn(3, 5, generator=generator),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "low": torch.randint(-(2**15), 2**15, (4, 2), dtype=torch.int16, generator=generator),
        "codes": torch.randint(0, 256, (9,), dtype=torch.uint8, generator=generator),
        "fp8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.0**60 + 1, dtype=torch.float64),
        "transposed": torch.randn(4, 3, generator=generator).T,
        "rows": torch.randn(6, 2, generator=generator)[2:4],
        "empty": torch.empty(0, 4),
    }
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    with CheckpointStore(tmp_path) as store:
        store.save(5, tensors, {"loss": 0.1, "before": None})
        loaded, state = store.load() or pytest.fail("nothing was saved")
    assert state == {"loss": 0.1, "before": None, "step": 5}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        flat = [t.contiguous().view(-1).view(torch.uint8) for t in (loaded[name], tensor)]
        assert torch.equal(*flat), name


def test_tensors_may_change_while_they_are_written(tmp_path, monkeypatch):
    started, proceed = threading.Event(), threading.Event()

    def slow(*arguments):
        started.set()
        assert proceed.wait(10)
        save_file(*arguments)

    monkeypatch.setattr(checkpoints, "save_file", slow)
    weight, state = torch.ones(4), {"log": [1]}
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"w": weight}, state)
        assert started.wait(10)  # returned before a byte was written
        assert store.steps() == []
        weight.zero_()
        state["log"].append(2)
        proceed.set()
        tensors, loaded = store.load() or pytest.fail("nothing was saved")
    assert torch.equal(tensors["w"], torch.ones(4))
    assert loaded == {"log": [1], "step": 1}


def test_one_write_at_a_time_and_in_order(tmp_path, monkeypatch):
    running, most, order = 0, 0, []

    def counted(tensors, path):
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(path.parent.name)
        save_file(tensors, path)
        running -= 1

    monkeypatch.setattr(checkpoints, "save_file", counted)
    with CheckpointStore(tmp_path, keep_last=9) as store:
        for step in range(1, 6):
            store.save(step, {"w": torch.ones(50_000)}, {})
        store.save(6, {"w": torch.ones(1)}, {}, wait=True)
        assert store.steps() == [1, 2, 3, 4, 5, 6]
    assert most == 1
    assert order == [f"writing-{step:08d}" for step in range(1, 7)]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_crash_anywhere_in_saving_leaves_a_checkpoint_to_go_on_from(tmp_path, monkeypatch, keep_last):
    for call in range(1, 20):
        folder = tmp_path / str(call)
        save(folder, 2, 2.0)
        save(folder, 3, 3.0, keep_last=keep_last)
        crashed = False
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            try:
                save(folder, 6, 6.0, keep_last=keep_last)
            except Crash:
                crashed = True
        store = CheckpointStore(folder)
        assert value(store) in ((3.0, 3), (6.0, 6))
        for step in store.steps():  # whatever has a name is whole
            assert value(store, step) == (float(step), step)
        if not crashed:
            break
        # Another step comes next: what lay half written is gone, so that it cannot keep a disk full.
        save(folder, 7, 7.0)
        assert names(folder) == ["step-00000007"]
    assert call == 5  # mkdir, rename, rename, rmtree: every one was tried


def test_saving_a_step_again_never_takes_its_checkpoint_away(tmp_path, monkeypatch):
    save(tmp_path, 6, 6.0)
    for call in range(1, 10):
        with monkeypatch.context() as patch:
            crash_at(patch, call)
            with contextlib.suppress(Crash):
                save(tmp_path, 6, 0.0)
        assert value(CheckpointStore(tmp_path)) == (6.0, 6), call


@contextlib.contextmanager
def files_no_larger_than(limit: int):
    """The system's own refusal in the middle of a write, as from a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("raised_by", ["save", "wait", "close", "load"])
def test_a_disk_that_refuses_is_told_at_the_next_call_and_costs_nothing(tmp_path, raised_by):
    save(tmp_path, 3, 3.0)
    store = CheckpointStore(tmp_path)
    call = {
        "save": lambda: store.save(9, {"w": torch.ones(1)}, {"n": 9}),
        "wait": store.wait,
        "close": store.close,
        "load": store.load,
    }[raised_by]
    with files_no_larger_than(4096):
        store.save(6, {"w": torch.ones(5000)}, {"n": 6})
        with pytest.raises(OSError, match="File too large") as caught:
            call()
    assert explain_os_error(caught.value) == f"File too large ({tmp_path})"
    assert names(tmp_path) == ["step-00000003"]  # and nothing half written keeps the disk full
    assert value(store) == (3.0, 3)  # told once
    if raised_by != "close":
        store.save(9, {"w": torch.full((2,), 9.0)}, {"n": 9}, wait=True)
        assert value(store) == (9.0, 9)


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_last_write(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)

    def loop():
        with CheckpointStore(tmp_path) as store:
            store.save(1, {"w": torch.ones(1)}, {})
            raise KeyError("the loop's own")

    with pytest.raises(KeyError) as caught:
        loop()
    assert "No space left" in caught.value.__notes__[0]


def test_a_block_that_ends_early_still_finishes_the_write(tmp_path):
    with contextlib.suppress(KeyError), CheckpointStore(tmp_path) as store:
        store.save(1, {"w": torch.full((2,), 1.0)}, {"n": 1})
        raise KeyError
    assert value(CheckpointStore(tmp_path)) == (1.0, 1)


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, False, [6]), (3, False, [4, 5, 6]), (1, True, [2, 6]), (2, True, [2, 5, 6]), (9, True, [1, 2, 3, 4, 5, 6])],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep_last, keep_best, kept):
    scores = {1: 3.0, 2: 1.5, 3: None, 4: float("nan"), 5: 2.0, 6: float("inf")}
    with CheckpointStore(tmp_path, keep_last=keep_last, keep_best=keep_best) as store:
        for step, score in scores.items():
            store.save(step, {"w": torch.full((2,), float(step))}, {"n": step}, score=score)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    store = CheckpointStore(tmp_path)
    if 2 in kept:
        assert value(store, "best") == (2.0, 2)
    assert value(store, 6) == (6.0, 6)
    assert value(store) == (6.0, 6)
    assert store.load(7) is None


def test_the_later_of_two_equal_scores_is_the_best(tmp_path):
    with CheckpointStore(tmp_path, keep_last=3) as store:
        for step in (1, 2, 3):
            store.save(step, {"w": torch.full((2,), float(step))}, {"n": step}, score={1: 1.0, 2: 1.0, 3: 2.0}[step])
        assert value(store, "best") == (2.0, 2)


def test_where_nothing_is_saved_nothing_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert store.load() is None
    assert store.load("best") is None
    assert store.load(1) is None
    save(tmp_path, 1, 1.0)
    assert CheckpointStore(tmp_path).load("best") is None


def test_going_on_from_an_earlier_step_leaves_the_later_ones_behind(tmp_path):
    with CheckpointStore(tmp_path, keep_last=3) as store:
        for step in (2, 4, 6):
            store.save(step, {"w": torch.full((2,), float(step))}, {"n": step})
    with CheckpointStore(tmp_path, keep_last=3) as store:
        assert value(store, 2) == (2.0, 2)
        store.save(3, {"w": torch.full((2,), 3.0)}, {"n": 3})
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["cut", "missing", "json", "no step"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, damage):
    with CheckpointStore(tmp_path, keep_last=2) as store:
        for step in (3, 6):
            store.save(step, {"w": torch.full((2,), float(step))}, {"n": step}, score=1.0)
    for step, remedy in ((6, "go on from step 3"), (3, "start this stage again")):
        path = tmp_path / f"step-{step:08d}"
        if damage == "cut":
            (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1])
        elif damage == "missing":
            (path / "state.safetensors").unlink()
        else:
            (path / "state.json").write_text("{" if damage == "json" else json.dumps({"n": 3}))
        with pytest.raises(RunError, match=rf"step-0000000{step} cannot be read .*; delete it to {remedy}"):
            CheckpointStore(tmp_path).load(step)
    # It does not stand in the way of the next one.
    save(tmp_path, 9, 9.0, keep_best=True)
    assert value(CheckpointStore(tmp_path)) == (9.0, 9)


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last = 0"):
        CheckpointStore(tmp_path, keep_last=0)
