"""What the nodes of one engine tell each other through discovery, before vLLM connects them.

An engine that spreads over several nodes is a *group*: one process on each node, of which the first (rank 0) serves
requests. Every key is bound to the lease of the process that wrote it. The group's name is the instance id of its first
process, so that a group that forms again has another name.
"""

import msgspec

from stator.ids import InstanceId


class GroupMember(msgspec.Struct, frozen=True):
    """host: that other nodes reach this process at."""

    rank: int
    instance_id: InstanceId
    host: str


class GroupOffer(msgspec.Struct, frozen=True):
    """Under `engine-groups/SERVICE/forming`: a group that waits for its nodes; a service has at most one.

    settings: of the engine, as text by flag; they must be equal on all nodes.
    """

    first: GroupMember
    num_nodes: int
    settings: dict[str, str]

    @property
    def group(self) -> str:
        return str(self.first.instance_id)


class GroupStart(msgspec.Struct, frozen=True):
    """Under `engine-groups/SERVICE/groups/GROUP/start`: every rank is taken, and the engine starts or runs.

    members: by rank. master_address, master_port: of rank 0's node, where the engine's processes meet.
    """

    members: tuple[GroupMember, ...]
    master_address: str
    master_port: int

    @property
    def group(self) -> str:
        return str(self.members[0].instance_id)


ENGINE_GROUPS_PREFIX = "engine-groups/"


def groups_prefix(service: str) -> str:
    return f"{ENGINE_GROUPS_PREFIX}{service}/"


def offer_key(service: str) -> str:
    return f"{groups_prefix(service)}forming"


def rank_key(service: str, group: str, rank: int) -> str:
    """Its value is the GroupMember that has taken the rank."""
    return f"{groups_prefix(service)}groups/{group}/ranks/{rank}"


def start_key(service: str, group: str) -> str:
    return f"{groups_prefix(service)}groups/{group}/start"
