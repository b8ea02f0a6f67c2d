"""Filter and pack on three machines of a Ray cluster, one of which dies with work in hand."""

import json
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
from filtering_corpus import mixed_corpus, outputs
from object_stores import _s3_server, s3_environment

from redwhale.engine import packing
from redwhale.engine.packing import pack_files
from redwhale.engine.shards import TokenShards
from redwhale.filtering import FilterConfig, filter_corpus, pipeline
from redwhale.filtering.storage import file_system
from redwhale.tokenizer import Tokenizer

__all__ = ["_s3_server"]

ray = pytest.importorskip("ray", reason='the engine "ray" needs the extra scale')

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
FILES = 12
PATIENCE = 60.0


@pytest.fixture(scope="module")
def cluster(no_other_cluster, _s3_server, tmp_path_factory):
    """A head and two more nodes with a core each, to which this process is connected; they reach an S3."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        own = {"RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
        temporary = tmp_path_factory.mktemp("machines")
        for name, value in {**s3_environment(_s3_server), **own, "TMPDIR": str(temporary)}.items():
            patch.setenv(name, value)
        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(2):
            started.add_node(**node)
        ray.init(address=started.address, logging_level="ERROR", log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        started.node_arguments, started.temporary = node, temporary
        yield started
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
        started.shutdown()


class Watch:
    """Leaves a file when a machine begins an item and one when it ends.

    The victim's second item never ends; the other machines wait with theirs until it has begun.
    """

    def __init__(self, folder: Path, victim: str) -> None:
        folder.mkdir()
        self.folder, self.victim = folder, victim

    def begin(self, item: str) -> str:
        node = ray.get_runtime_context().get_node_id()
        second = list(self.folder.glob(f"{node}.*.ended"))
        mark = self.folder / f"{node}.{item}"
        mark.with_name(mark.name + ".begun").touch()
        if node == self.victim and second:
            (self.folder / "hangs").touch()
            time.sleep(2 * PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while node != self.victim and not (self.folder / "hangs").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return str(mark)

    def end(self, mark: str) -> None:
        Path(mark + ".ended").touch()

    def nodes_of_items(self, what: str) -> dict[str, set[str]]:
        found = defaultdict(set)
        for path in self.folder.glob(f"*.{what}"):
            node, item, _ = path.name.split(".")
            found[item].add(node)
        return found


class WatchedUnit:
    """`measure_unit` under watch."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.function = watch, pipeline.measure_unit

    def __call__(self, unit, **options):
        mark = self.watch.begin(str(unit.number))
        size = self.function(unit, **options)
        self.watch.end(mark)
        return size


class WatchedFiles:
    """`tokenize_files` under watch: the victim dies between two blocks of a file."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.function = watch, packing.tokenize_files

    def __call__(self, shard, **options):
        blocks = self.function(shard, **options)
        yield next(blocks)
        mark = self.watch.begin(shard.shard.name)
        yield from blocks
        self.watch.end(mark)


def while_a_node_dies(cluster, folder, run) -> Watch:
    """Call `run` with a watch, and kill a node that has done an item and hangs in another; returns the watch."""
    if len(cluster.worker_nodes) < 2:
        cluster.add_node(**cluster.node_arguments)
    node = list(cluster.worker_nodes)[-1]
    watch = Watch(folder, node.node_id)
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if (folder / "hangs").exists():
                cluster.remove_node(node, allow_graceful=False)
                killed.set()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    run(watch)
    thread.join()
    assert killed.is_set()
    return watch


def check(watch: Watch, items: int) -> None:
    """Three machines worked, the victim died with an item in hand, and another machine did that item."""
    begun, ended = watch.nodes_of_items("begun"), watch.nodes_of_items("ended")
    assert len(ended) == items
    assert len(set.union(*ended.values())) == 3
    in_hand = [item for item, nodes in begun.items() if watch.victim in nodes - ended[item]]
    assert in_hand
    assert all(ended[item] - {watch.victim} for item in in_hand)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    records = mixed_corpus(tmp_path_factory.mktemp("records"), documents=20 * FILES)
    for number in range(FILES):
        lines = (json.dumps(record, ensure_ascii=False) for record in records[20 * number : 20 * (number + 1)])
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("exchange", [None, "s3://exchange/run"])
def test_filter_gives_the_same_files_though_a_machine_dies(cluster, corpus, exchange, tmp_path, monkeypatch):
    """With a folder that all machines see, and with a folder each whose files pass through S3."""
    monkeypatch.setattr(pipeline, "MEGABYTE", 4000)  # a unit for each file, of several shards
    settings = {"inputs": [str(corpus)], "workers": 1, "shard_mb": 1, "validation_fraction": 0.2}
    filter_corpus(FilterConfig(**settings), tmp_path / "local")
    if exchange is not None:
        file_system(exchange)[0].mkdir("exchange")

    def run(watch: Watch) -> None:
        monkeypatch.setattr(pipeline, "measure_unit", WatchedUnit(watch))
        filter_corpus(FilterConfig(**settings, engine="ray", exchange=exchange), tmp_path / "ray")

    watch = while_a_node_dies(cluster, tmp_path / "watch", run)
    check(watch, FILES)
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "local")
    # Machines had folders of their own, and left none, but for the one that died; so did the run on the store.
    left = list(cluster.temporary.glob("redwhale-*"))
    assert [path.name.rpartition("-")[2] for path in left] == ([] if exchange is None else [watch.victim[:16]])
    for path in left:
        shutil.rmtree(path)
    assert exchange is None or file_system(exchange)[0].find(exchange) == []


def test_pack_gives_the_same_shards_though_a_machine_dies(cluster, corpus, tiny_root, tmp_path, monkeypatch):
    tokenizer = Tokenizer(tiny_root / "data" / "tokenizer.model")
    files = sorted(corpus.iterdir())
    (tmp_path / "empty.jsonl").touch()

    def shards(name: str) -> dict[Path, list[Path]]:
        folder = tmp_path / name
        folder.mkdir()
        single = {folder / f"train-{number:05d}": [path] for number, path in enumerate(files)}
        return {**single, folder / "heldout-00000": files[:3], folder / "none-00000": [tmp_path / "empty.jsonl"]}

    pack_files(shards("local"), tokenizer, workers=1)
    done: list[int] = []

    def run(watch: Watch) -> None:
        monkeypatch.setattr(packing, "tokenize_files", WatchedFiles(watch))
        pack_files(shards("ray"), tokenizer, engine="ray", on_bytes=done.append)

    check(while_a_node_dies(cluster, tmp_path / "watch", run), FILES + 2)
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "local")
    assert sum(done) == sum(path.stat().st_size for path in [*files, *files[:3]])
    assert TokenShards.open(tmp_path / "ray", "train", verify=True).documents > 0
