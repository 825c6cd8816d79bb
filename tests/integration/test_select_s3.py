"""Pools in an S3 bucket: moto's server speaks S3's protocol over HTTP on this machine, s3fs is the client that users have."""

from __future__ import annotations

import json
import re

import boto3
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from tests.integration.test_select_large_pool import run, store_files
from tests.rows import some_rows, write_jsonl

from gradsift.data import remote
from gradsift.data.opening import open_source
from gradsift.errors import DataError


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")  # another client than the one that reads: nothing is known from writing
    client.create_bucket(Bucket="bucket")
    yield client, server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_selection_from_a_bucket_is_that_of_the_file(tmp_path, navigator, bucket):
    near = run({"pool": write_jsonl(tmp_path / "a.jsonl", some_rows(12, seed=1))}, tmp_path / "near", navigator)
    bucket[0].upload_file(str(tmp_path / "a.jsonl"), "bucket", "deep/a.jsonl")
    far = run({"pool": "s3://bucket/deep/a.jsonl"}, tmp_path / "far", navigator)
    assert near.ids == far.ids
    assert store_files(tmp_path / "near") == store_files(tmp_path / "far")
    chosen = [(tmp_path / name / "selection" / "selected.jsonl").read_bytes() for name in ("near", "far")]
    assert chosen[0] == chosen[1]
    manifest = json.loads((tmp_path / "far" / "manifest.json").read_text())
    assert manifest["inputs"][0]["path"] == "s3://bucket/deep/a.jsonl"


def test_a_bucket_s_file_is_fetched_again_when_it_changed(bucket, monkeypatch):
    client, _ = bucket
    fetched = []
    real = remote._fetch
    monkeypatch.setattr(remote, "_fetch", lambda *a: fetched.append(1) or real(*a))
    for rows, times in ((5, 1), (5, 1), (6, 2), (4, 3)):
        body = "".join(json.dumps({"text": f"row {i} of {rows}"}) + "\n" for i in range(rows)).encode()
        if times != len(fetched):
            client.put_object(Bucket="bucket", Key="a.jsonl", Body=body)
        assert len(open_source("s3://bucket/a.jsonl").rows) == rows
        assert len(fetched) == times


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://bucket/absent.jsonl", "FileNotFoundError"),
        ("s3://absent/a.jsonl", "bucket does not exist"),
        ("s3://bucket/deep", "a folder, not a file"),
    ],
)
def test_what_is_not_in_the_bucket_is_refused_by_name(bucket, url, what):
    bucket[0].put_object(Bucket="bucket", Key="deep/a.jsonl", Body=b'{"text": "a"}\n')
    with pytest.raises(DataError) as raised:
        open_source(url)
    assert raised.value.where == url
    assert re.search(what, str(raised.value))


def test_a_store_that_does_not_answer_is_refused_by_name(bucket):
    bucket[1].stop()
    with pytest.raises(DataError, match="cannot be fetched") as raised:
        open_source("s3://bucket/a.jsonl")
    assert "Could not connect" in str(raised.value.got)
