"""The S3 server of the store's tests and the Slurm of Slurm's, for those here that need one."""

from __future__ import annotations

from tests.slurm.conftest import cluster
from tests.store.conftest import bucket, s3, s3_server

__all__ = ["bucket", "cluster", "s3", "s3_server"]
