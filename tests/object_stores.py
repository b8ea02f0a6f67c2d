"""Object stores that run on this machine and speak the real protocols: S3 by moto's server, GCS by an emulator."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from redwhale.filtering.storage import file_system


def upload(folder: Path, url: str) -> None:
    """Copy the files below a folder to an address."""
    system, root = file_system(url)
    for path in folder.rglob("*"):
        if path.is_file():
            system.put_file(str(path), f"{root}/{path.relative_to(folder)}")


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs", reason="object stores need the extra cloud")
    server_module = pytest.importorskip("moto.server", reason="the S3 of the tests is moto's server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What makes programs take the server for S3."""
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1", **credentials}


@pytest.fixture
def s3(_s3_server, monkeypatch) -> str:
    """Address of a new bucket, for this process and those that it starts."""
    import fsspec

    for name, value in s3_environment(_s3_server).items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.clear_instance_cache()
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    system.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def _gcs_server() -> Iterator[str]:
    # gcsfs asks for the kind of a bucket by gRPC, which the emulator lacks; read when gcsfs is imported.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    pytest.importorskip("gcsfs", reason="object stores need the extra cloud")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="the GCS of the tests is an emulator")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    port = server._api._httpd.socket.getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def gcs(_gcs_server, monkeypatch) -> Iterator[str]:
    """Address of a new bucket, for this process and those that it starts."""
    import fsspec

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _gcs_server)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fsspec.config.conf["gs"] = {"token": "anon"}
    system = fsspec.filesystem("gs", skip_instance_cache=True)
    system.clear_instance_cache()
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    system.mkdir(bucket)
    yield f"gs://{bucket}"
    fsspec.config.conf.pop("gs")
