"""Makes the support module importable; fixtures of buckets."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.register_assert_rewrite("cli_support")

from bucket_support import gcs, gcs_target, s3, s3_target  # noqa: E402, F401  fixtures
