"""The S3 server of the store's tests, for those here that need one."""

from __future__ import annotations

from tests.store.conftest import bucket, s3, s3_server

__all__ = ["bucket", "s3", "s3_server"]
