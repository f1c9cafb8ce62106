"""Fixtures of buckets."""

import pytest
from bucket_support import gcs, gcs_target, s3, s3_target

__all__ = ("gcs", "gcs_target", "s3", "s3_target")

pytest.register_assert_rewrite("cli_support")
