"""The contract of buckets, by real servers and by memory."""

import pytest
from bucket_support import gcs, gcs_target, memory, s3, s3_target

from stepsave.store.places import open_store
from stepsave.testing import BucketStoreContract

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("buckets")]

__all__ = ("gcs", "gcs_target", "memory", "s3", "s3_target")


class InABucket(BucketStoreContract):
    def make_store(self, tmp_path):  # noqa: ARG002
        return open_store(self.place)


class TestMemory(InABucket):
    @pytest.fixture(autouse=True)
    def server(self, memory):
        self.place = memory.place


class TestS3(InABucket):
    @pytest.fixture(autouse=True)
    def server(self, s3):
        self.place = s3.place


class TestGoogle(InABucket):
    @pytest.fixture(autouse=True)
    def server(self, gcs):
        self.place = gcs.place
