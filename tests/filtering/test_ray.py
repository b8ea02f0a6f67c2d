import os

import pytest
from filtering_corpus import mixed_corpus, outputs
from object_stores import _s3_server, s3, upload

from redwhale.filtering import CorpusError, FilterConfig, filter_corpus, pipeline
from redwhale.filtering.ray_workers import RayWorkers

__all__ = ["_s3_server", "s3"]

pytest.importorskip("ray", reason='the engine "ray" needs the extra scale')


@pytest.mark.slow
@pytest.mark.usefixtures("no_other_cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_ray_keeps_the_same_documents_byte_for_byte_from_the_disk_and_from_s3(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    mixed_corpus(tmp_path / "in")
    monkeypatch.setattr(pipeline, "_WORKERS_PAY_FROM_BYTES", 0)
    settings = {"inputs": [str(tmp_path / "in")], "workers": 2, "validation_fraction": 0.2, "documents_per_file": 50}
    reported: list[int] = []
    filter_corpus(FilterConfig(**settings), tmp_path / "local")
    with RayWorkers(2):  # the run takes the cluster that is there
        filter_corpus(FilterConfig(**settings, engine="ray"), tmp_path / "ray", progress=reported.append)
        assert outputs(tmp_path / "ray") == outputs(tmp_path / "local")
        upload(tmp_path / "in", f"{s3}/in")
        filter_corpus(FilterConfig(**{**settings, "inputs": [f"{s3}/in/*"]}, engine="ray"), tmp_path / "s3")
        kept = [name for name in outputs(tmp_path / "local") if name.endswith(".parquet")]
        assert [outputs(tmp_path / "s3")[name] for name in kept] == [outputs(tmp_path / "local")[name] for name in kept]
        assert sum(reported) == sum(path.stat().st_size for path in (tmp_path / "in").iterdir())

        (tmp_path / "in" / "a.jsonl.gz").write_bytes(os.urandom(100))
        with pytest.raises(CorpusError, match="a.jsonl.gz' is damaged"):
            filter_corpus(FilterConfig(**settings, engine="ray"), tmp_path / "damaged")
