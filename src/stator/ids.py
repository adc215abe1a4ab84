"""Identifier types. Ids are opaque: nothing may split one to learn what is inside."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""One client request, from the HTTP edge to the engine; unique in a deployment."""

InstanceId = NewType("InstanceId", str)
"""One running copy of a service. A process that lost its lease comes back under a new one."""

LeaseId = NewType("LeaseId", int)
"""Liveness handle granted by discovery; keys and queue deliveries end with it."""

JobId = NewType("JobId", str)
"""One prefill job, stable over its redeliveries."""

TransferId = NewType("TransferId", str)
"""Blocks that a prefill engine holds for one decode worker to fetch."""

BlockHash = NewType("BlockHash", int)
"""Chained 64-bit hash of a block and everything before it (core.hashing)."""
