"""What one tenant has taken of its quota. Pure; the caller holds the lock."""

from __future__ import annotations

from insitu.intake import Quota
from insitu_collector.admission.bucket import TokenBucket


class TenantUse:
    """What one tenant has taken."""

    def __init__(self, quota: Quota, now_s: float) -> None:
        self.quota = quota
        rates = (quota.bytes_per_s, quota.rows_per_s, quota.frames_per_s)
        self._buckets = [None if rate is None else TokenBucket(rate, now_s) for rate in rates]
        self.in_flight = 0
        """Bytes received and not yet written."""

    def wait_s(self, now_s: float) -> float:
        """Return how long its next frame has to wait."""
        return max((bucket.wait_s(now_s) for bucket in self._buckets if bucket is not None), default=0.0)

    def book(self, num_bytes: int, num_rows: int, now_s: float) -> None:
        """Take a frame out of its quota."""
        for bucket, amount in zip(self._buckets, (num_bytes, num_rows, 1), strict=True):
            if bucket is not None:
                bucket.book(amount, now_s)
