"""A local S3 server for tests of object storage."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

VARIABLES = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Start a server with one bucket, and set the environment so that this process and its children find it; yields the URI."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("bucket")
        yield "s3://bucket"
    server.stop()
