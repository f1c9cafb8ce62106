"""Places by URL and spec, and where the configuration of buckets comes from."""

from pathlib import Path

import pytest

import stepsave
from stepsave.store import addresses
from stepsave.store.addresses import address_of

_VARIABLES = """
AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_PROFILE AWS_REGION AWS_DEFAULT_REGION AWS_ENDPOINT_URL
AWS_ENDPOINT_URL_S3 AWS_WEB_IDENTITY_TOKEN_FILE AWS_CONTAINER_CREDENTIALS_RELATIVE_URI
AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_EC2_METADATA_DISABLED GOOGLE_APPLICATION_CREDENTIALS
STORAGE_EMULATOR_HOST TENSORSTORE_GCS_HTTP_URL GOOGLE_AUTH_TOKEN_FOR_TESTING
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """An environment without any configuration, on a machine of nobody's."""
    for name in _VARIABLES.split():
        monkeypatch.setenv(name, "x")  # so that what the code sets is undone, too
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setattr(addresses, "_VENDOR_FILES", (str(tmp_path / "vendor"),))
    return tmp_path


@pytest.mark.parametrize("path", ["backup", "/a/b", "./s3:/x", Path("a"), "C:x"])
def test_a_path_is_a_path(path):
    assert address_of(path) is None


@pytest.mark.parametrize(
    ("target", "url", "path"),
    [
        ("memory://a", "memory://a", "a/"),
        ("memory://a/b/", "memory://a/b", "a/b/"),
        ({"driver": "memory", "path": "x/y"}, "memory://x/y", "x/y/"),
        ({"driver": "memory"}, "memory://", ""),
        ({"driver": "gcs", "bucket": "b", "path": "x/"}, "gs://b/x", "x/"),
        ({"driver": "s3", "bucket": "b"}, "s3://b", ""),
    ],
)
def test_a_url_or_a_spec_is_a_bucket(target, url, path):
    address = address_of(target)
    assert (address.url, address.spec["path"]) == (url, path)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Path("s3://bucket/prefix"), r"s3:/bucket/prefix: .* found one slash: `Path` makes one"),
        ("gs:/bucket", "found one slash"),
        ("s3://", "found no bucket"),
        ("gcs://bucket", r"found the scheme 'gcs'"),
        ("https://host/x", r"found the scheme 'https'"),
        ({"bucket": "b"}, "found None as its driver"),
        ({"driver": "file", "path": "/tmp"}, "Name a directory by its path"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_hint(target, text):
    with pytest.raises(stepsave.BackupDirectoryError, match=text):
        address_of(target)
    with pytest.raises(stepsave.BackupDirectoryError, match=text):
        stepsave.Checkpointer(target)


def test_keys_in_the_environment_come_first(monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id=a\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert address_of("s3://b/p").spec == {
        "driver": "s3",
        "bucket": "b",
        "path": "p/",
        "aws_credentials": {"type": "environment"},
    }


def test_region_and_endpoint_come_from_the_environment_or_the_profile(monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id=a\naws_secret_access_key=b\n")
    (tmp_path / "config").write_text(
        "[default]\nregion=nowhere\n[profile lab]\nregion=eu-west-1\nendpoint_url=http://lab:1/\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    spec = address_of("s3://b").spec
    assert (spec["aws_region"], spec["endpoint"]) == ("eu-west-1", "http://lab:1")
    assert spec["aws_credentials"] == {
        "type": "profile",
        "profile": "lab",
        "config_file": str(tmp_path / "config"),
        "credentials_file": str(tmp_path / "credentials"),
    }
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two:2")
    spec = address_of("s3://b").spec
    assert (spec["aws_region"], spec["endpoint"]) == ("us-west-2", "http://two:2")
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_PROFILE", "default")
    (tmp_path / "config").unlink()
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id=a\n")
    assert address_of("s3://b").spec["aws_region"] == "us-east-1"  # with an endpoint of one's own


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://169.254.170.2/x", "ecs"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/token", "default"),
    ],
)
def test_roles_of_containers_are_known(monkeypatch, name, value, kind):
    monkeypatch.setenv(name, value)
    assert address_of("s3://b").spec["aws_credentials"] == {"type": kind}


def test_the_role_of_a_machine_is_asked_for_on_amazons_alone(monkeypatch, bare):
    with pytest.raises(stepsave.BackupDirectoryError, match="found no credentials for S3"):
        address_of("s3://b")
    (bare / "vendor").write_text("Amazon EC2\n")
    assert address_of("s3://b").spec["aws_credentials"] == {"type": "imds"}
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(stepsave.BackupDirectoryError, match="'anonymous'"):
        address_of("s3://b")


def test_a_profile_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_PROFILE", "lap")
    with pytest.raises(stepsave.BackupDirectoryError, match=r"profile 'lap' with a key"):
        address_of("s3://b")
    (tmp_path / "config").write_text("no section")
    with pytest.raises(stepsave.BackupDirectoryError, match="expected a file of AWS"):
        address_of("s3://b")


def test_googles_credentials_are_found_or_missed_before_anything_is_asked(monkeypatch, bare):
    with pytest.raises(stepsave.BackupDirectoryError, match="gcloud auth application-default"):
        address_of("gs://b/p")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(bare / "key.json"))
    with pytest.raises(stepsave.BackupDirectoryError, match=r"key\.json, where there is no file"):
        address_of("gs://b/p")
    (bare / "key.json").write_text("{}")
    assert address_of("gs://b/p").spec == {"driver": "gcs", "bucket": "b", "path": "p/"}
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    (bare / "vendor").write_text("Google Compute Engine")
    assert address_of("gs://b/p").spec["driver"] == "gcs"


def test_an_emulator_needs_no_credentials(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:9023")
    assert address_of("gs://b").spec["bucket"] == "b"
    import os

    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://localhost:9023"
