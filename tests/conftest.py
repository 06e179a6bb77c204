"""Fixtures for every test: a real S3 server for the session, a fresh prefix on it for each test."""

import os
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.s3_server import S3Server

# These machines are shared: a slow example is no failure.
settings.register_profile("cropstream", deadline=None)
settings.load_profile("cropstream")

# Nothing of the developer's own AWS set-up may reach a test.
_FOREIGN_AWS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server, with the environment (also of child processes) leading to it."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in _FOREIGN_AWS:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.make_bucket("cropstream")
        yield server


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix on the server that nobody has used: s3://cropstream/<random>."""
    return f"s3://cropstream/{uuid.uuid4().hex[:12]}"
