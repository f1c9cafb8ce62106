"""Where backups may lie: directories, and buckets configured as other tools have it.

What a URL leaves open comes from where the command lines and libraries of the providers look for
it too. The source of the credentials is named to tensorstore's drivers: left to themselves they
try all there are, and print an error for each file that is not there.
"""

from __future__ import annotations

import configparser
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepsave.errors import BackupDirectoryError

__all__ = ("Address", "Name", "address_of")

Name = str | os.PathLike[str] | Mapping[str, Any]
"""What users name a place by: a path, a URL, or a spec of a key-value store of tensorstore."""

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<rest>.*)", re.DOTALL)
_VENDOR_FILES = ("/sys/class/dmi/id/sys_vendor", "/sys/class/dmi/id/product_name")


@dataclasses.dataclass(frozen=True, slots=True)
class Address:
    """A place in a bucket.

    Attributes:
        url: Its name, without a slash at the end.
        spec: Of tensorstore's key-value store; its `path` is empty or ends with a slash.
    """

    url: str
    spec: Mapping[str, Any]


def address_of(target: Name) -> Address | None:
    """Returns what a URL or a spec names; None for a path of a local file system.

    Raises:
        ValueError: If nothing is named.
        BackupDirectoryError: If it cannot be used, or its configuration is incomplete.
    """
    if isinstance(target, Mapping):
        return _of_spec(target)
    if not target:
        raise ValueError("Empty `directory` argument passed. Expected a path or a URL.")
    text = os.fspath(target)
    match = _URL.match(text)
    if match is None:
        return None
    scheme, rest = match["scheme"], match["rest"]
    if scheme not in _SPECS:
        raise BackupDirectoryError(
            f"{text}: expected a path, s3://bucket/prefix, gs://bucket/prefix or memory://name; "
            f"found the scheme {scheme!r}. What else tensorstore can write to is named by a spec: "
            "a dict with `driver`."
        )
    if not rest.startswith("/"):
        raise BackupDirectoryError(
            f"{text}: expected {scheme}://…, found one slash: `Path` makes one of two. Pass the "
            "URL as a text."
        )
    bucket, _, prefix = rest[1:].partition("/")
    prefix = prefix.strip("/")
    if not bucket:
        raise BackupDirectoryError(
            f"{text}: expected {scheme}://bucket/prefix, found no bucket. Name one."
        )
    url = f"{scheme}://{bucket}/{prefix}".rstrip("/")
    return Address(url, _SPECS[scheme](url, bucket, f"{prefix}/" if prefix else ""))


def _of_spec(spec: Mapping[str, Any]) -> Address:
    driver = spec.get("driver")
    if not isinstance(driver, str) or driver == "file":
        raise BackupDirectoryError(
            f"{dict(spec)}: expected a spec of a key-value store of tensorstore, such as "
            '{"driver": "s3", "bucket": "b", "path": "prefix/"}, found '
            f"{driver!r} as its driver. Name a directory by its path."
        )
    path = str(spec.get("path", "")).strip("/")
    scheme = {"gcs": "gs"}.get(driver, driver)
    names = (str(spec.get("bucket", "")), path)
    url = f"{scheme}://{'/'.join(name for name in names if name)}"
    return Address(url, {**spec, "path": f"{path}/" if path else ""})


def _memory(url: str, bucket: str, prefix: str) -> dict[str, Any]:
    del url
    return {"driver": "memory", "path": f"{bucket}/{prefix}"}


def _s3(url: str, bucket: str, prefix: str) -> dict[str, Any]:
    profile = _Profile()
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url")
    )
    region = (
        os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or profile.get("region")
        # Servers other than Amazon's rarely care, but it is part of the signature.
        or ("us-east-1" if endpoint else None)
    )
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": prefix}
    if endpoint:
        spec["endpoint"] = endpoint.rstrip("/")
    if region:
        spec["aws_region"] = region
    return spec | {"aws_credentials": _aws_credentials(url, profile)}


class _Profile:
    """The profile of AWS's configuration files that is in use."""

    def __init__(self) -> None:
        self.name = os.environ.get("AWS_PROFILE", "default")
        self.files = {
            "config_file": _path_in("AWS_CONFIG_FILE", "~/.aws/config"),
            "credentials_file": _path_in("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        }
        self._values: dict[str, str] = {}
        for name, path in self.files.items():
            of_config = name == "config_file" and self.name != "default"
            section = f"profile {self.name}" if of_config else self.name
            parser = configparser.RawConfigParser(strict=False)
            try:
                parser.read(path)
            except (configparser.Error, UnicodeDecodeError) as e:
                raise BackupDirectoryError(
                    f"{path}: expected a file of AWS, found: {e}. Mend it."
                ) from e
            if parser.has_section(section):
                self._values |= dict(parser.items(section))

    def get(self, key: str) -> str | None:
        return self._values.get(key)

    @property
    def has_credentials(self) -> bool:
        return any(map(self.get, ("aws_access_key_id", "role_arn", "credential_process")))


def _aws_credentials(url: str, profile: _Profile) -> dict[str, Any]:
    """Names the source that AWS's own tools would take, in their order."""
    environment = os.environ
    if environment.get("AWS_ACCESS_KEY_ID") and environment.get("AWS_SECRET_ACCESS_KEY"):
        return {"type": "environment"}
    if environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return {"type": "default"}  # the only one that knows of them
    if profile.has_credentials:
        # Of a file that is not there the driver would complain.
        files = {
            key: path if os.path.exists(path) else os.devnull for key, path in profile.files.items()
        }
        return {"type": "profile", "profile": profile.name, **files}
    if any(
        map(
            environment.get,
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
        )
    ):
        return {"type": "ecs"}
    if _is_machine_of("Amazon EC2") and environment.get("AWS_EC2_METADATA_DISABLED") != "true":
        return {"type": "imds"}
    looked = " and ".join(profile.files.values())
    raise BackupDirectoryError(
        f"{url}: found no credentials for S3: neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
        f"are set, nor is there a profile {profile.name!r} with a key in {looked}, nor a role of a "
        "container or of this machine. Set one of them, or pass a tensorstore spec with "
        "`aws_credentials` ({'type': 'anonymous'} for a bucket that is open to all)."
    )


def _gcs(url: str, bucket: str, prefix: str) -> dict[str, Any]:
    environment = os.environ
    emulator = environment.get("STORAGE_EMULATOR_HOST")
    if emulator:
        server = emulator if "://" in emulator else f"http://{emulator}"
        environment.setdefault("TENSORSTORE_GCS_HTTP_URL", server)
    spec = {"driver": "gcs", "bucket": bucket, "path": prefix}
    named = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
    if named and not os.path.exists(named):
        raise BackupDirectoryError(
            f"{url}: GOOGLE_APPLICATION_CREDENTIALS names {named}, where there is no file. Mend or "
            "unset it."
        )
    usual = _path_in("CLOUDSDK_CONFIG", "~/.config/gcloud")
    usual = os.path.join(usual, "application_default_credentials.json")
    if named or os.path.exists(usual) or _is_machine_of("Google"):
        return spec
    if environment.get("TENSORSTORE_GCS_HTTP_URL"):
        # Another server than Google's. The driver would look for credentials and complain.
        environment.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        return spec
    raise BackupDirectoryError(
        f"{url}: found no credentials for Google Cloud Storage: GOOGLE_APPLICATION_CREDENTIALS is "
        f"not set, there is no {usual}, and this is not a machine of Google's. Set it, or run "
        "`gcloud auth application-default login`."
    )


_SPECS = {"s3": _s3, "gs": _gcs, "memory": _memory}


def _path_in(variable: str, usual: str) -> str:
    return os.path.expanduser(os.environ.get(variable) or usual)


def _is_machine_of(vendor: str) -> bool:
    """Whether the firmware says so; asking the network where there is nobody takes seconds."""
    for path in _VENDOR_FILES:
        try:
            if vendor in Path(path).read_text():
                return True
        except OSError:
            continue  # no such machine, or not for us to read
    return False
