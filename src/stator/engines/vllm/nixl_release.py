"""Ends a NixlConnector hold that nobody will fetch, before its lease does.

vLLM 0.32 frees the blocks of a finished prefill when the decode engine says so over NIXL, or when the lease has run
out; there is no call for a decode engine that never comes. `NixlRelease` is a `worker_extension_cls`: its method
becomes one of every worker's, and `AsyncLLM.collective_rpc("stator_release_kv", args=(request_id,))` calls it between
steps.
"""

import importlib
from typing import Any


class NixlRelease:
    def stator_release_kv(self, request_id: str) -> bool:
        """request_id: `remote_request_id` of the prefill's transfer parameters. True: its blocks are freed with the
        next step, or were before. False: its hold has not begun; ask again after a step."""
        transfer: Any = importlib.import_module("vllm.distributed.kv_transfer")
        if not transfer.has_kv_transfer_group():
            return True
        worker: Any = getattr(transfer.get_kv_transfer_group(), "connector_worker", None)
        leases: dict[str, float] | None = getattr(worker, "_reqs_to_send", None)
        if leases is None:
            return False
        if request_id in leases:
            # A lease that ended long ago, on whatever clock it is counted.
            leases[request_id] = float("-inf")
            return True
        return request_id not in getattr(worker, "_reqs_to_process", ())
