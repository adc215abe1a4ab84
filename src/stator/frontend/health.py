"""Whether a request could be finished now, told from the instances that discovery shows. Pure."""

from collections.abc import Iterable, Sequence

import msgspec

from stator.core.pairing import differences
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.openai import ModelCard

DECODE = "decode"
PREFILL = "prefill"


class ModelHealth(msgspec.Struct, frozen=True):
    """Ready instances of one model."""

    decode: int = 0
    prefill: int = 0


class NamespaceHealth(msgspec.Struct, frozen=True):
    """ready: a request for one of its models can be finished there."""

    ready: bool
    models: dict[str, ModelHealth]


class PairingRefusal(msgspec.Struct, frozen=True):
    """None of these decode instances takes KV blocks from any of these prefill instances.

    differences: in words, one for each key in which their pairings differ.
    """

    decode: list[InstanceId]
    prefill: list[InstanceId]
    differences: list[str]


class HealthReport(msgspec.Struct, frozen=True):
    """ready: at least one model can finish a request. reasons: why not, for the person who asks.

    pairing_refusals: they cost remote prefill, not readiness, since decode workers then prefill for themselves.
    namespaces: each by itself, if the frontend serves more than its own.
    """

    ready: bool
    reasons: list[str]
    models: dict[str, ModelHealth]
    pairing_refusals: list[PairingRefusal] = []
    namespaces: dict[str, NamespaceHealth] = {}


def health_of(instances: Iterable[InstanceInfo], required_roles: Sequence[str] = ()) -> HealthReport:
    """required_roles: roles of which an instance must be ready besides a decode worker, for instance "router"."""
    ready = [instance for instance in instances if instance.state is InstanceState.READY]
    models: dict[str, ModelHealth] = {}
    for instance in ready:
        if instance.model is None or instance.role not in (DECODE, PREFILL):
            continue
        known = models.get(instance.model, ModelHealth())
        if instance.role == DECODE:
            models[instance.model] = ModelHealth(known.decode + 1, known.prefill)
        else:
            models[instance.model] = ModelHealth(known.decode, known.prefill + 1)
    roles = {instance.role for instance in ready}
    missing = [role for role in required_roles if role not in roles]
    reasons = [f"no {role} instance is ready" for role in missing]
    if not models:
        reasons.append("no worker is ready")
    reasons += [f"no decode worker of model {model} is ready" for model, has in models.items() if not has.decode]
    can_finish = not missing and any(has.decode for has in models.values())
    return HealthReport(can_finish, reasons, models, pairing_refusals(ready))


def pairing_refusals(instances: Sequence[InstanceInfo]) -> list[PairingRefusal]:
    """Grouped by pairing, so that it is as long as there are kinds of engines, not pairs of instances.

    Between instances of one model: nobody expects those of two to work together.
    """
    decode, prefill = _by_pairing(instances, DECODE), _by_pairing(instances, PREFILL)
    found: list[PairingRefusal] = []
    for (model, here), decoders in decode.items():
        for (other, there), prefillers in prefill.items():
            words = [d.words("for decode", "for prefill") for d in differences(dict(here), dict(there))]
            if words and model == other:
                found.append(PairingRefusal(decoders, prefillers, words))
    return found


_Kind = tuple[str | None, frozenset[tuple[str, str]]]


def _by_pairing(instances: Iterable[InstanceInfo], role: str) -> dict[_Kind, list[InstanceId]]:
    found: dict[_Kind, list[InstanceId]] = {}
    for instance in instances:
        if instance.role == role and instance.engine is not None:
            kind = (instance.model, frozenset(instance.engine.pairing.items()))
            found.setdefault(kind, []).append(instance.instance_id)
    return found


def models_of(instances: Iterable[InstanceInfo], created: int) -> list[ModelCard]:
    """One card per served model that has a decode worker, and per LoRA adapter that one of its workers has, by name. A
    model comes before an adapter of the same name. created: Unix seconds, for all of them."""
    lengths: dict[str, int | None] = {}
    parents: dict[str, str] = {}
    for instance in instances:
        if instance.model is not None and instance.role == DECODE:
            length = instance.engine.max_model_len if instance.engine else None
            known = lengths.get(instance.model)
            # Workers of one model may differ; promise what each of them can do.
            lengths[instance.model] = min((n for n in (length, known) if n is not None), default=None)
            for adapter in instance.adapters:
                parents.setdefault(adapter.name, instance.model)
    return [
        ModelCard(name, created, lengths[name])
        if name in lengths
        else ModelCard(name, created, lengths[parents[name]], parent=parents[name])
        for name in sorted(lengths.keys() | parents.keys())
    ]
