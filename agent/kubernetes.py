"""What the downward API tells of the pod that kvtally runs in, beside its engine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvtally.collectors.bounded_file import read_bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.config_tables import Engine, Role

LABELS_FILE = "/etc/podinfo/labels"
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

_FILE_BYTES_MAX = 64 * 1024
# Line of a labels file, as the kubelet writes it; the value of a label holds nothing that would have to be escaped.
#   llm-d.ai/engine-type="vllm"
_LABEL = re.compile(r'([A-Za-z0-9._/-]{1,317})="([A-Za-z0-9._-]{0,63})"')
_NAME = re.compile(r"[A-Za-z0-9.:-]{1,253}")
# Values of llm-d.ai/role. An engine that encodes alone serves no prompt of its own.
_ROLES: Mapping[str, Role] = {
    "prefill": "prefill",
    "encode-prefill": "prefill",
    "decode": "decode",
    "both": "both",
    "prefill-decode": "both",
    "encode-prefill-decode": "both",
}


class Pod(NamedTuple):
    """One pod; "" for what is not told.

    address      its IP
    role         of its engine, by the label llm-d.ai/role
    model        by the label llm-d.ai/model
    engine_type  "vllm", "sglang", "trtllm-serve" ..., by the label llm-d.ai/engine-type
    """

    namespace: str = ""
    name: str = ""
    node: str = ""
    address: str = ""
    role: Role = ""
    model: str = ""
    engine_type: str = ""

    @property
    def labels(self) -> dict[str, str]:
        """Namespace, pod and node, as far as they are known."""
        return {key: value for key, value in zip(("namespace", "pod", "node"), self[:3], strict=True) if value}


def read_small(path: str) -> str | None:
    """The text of a file of at most 64 KiB; None where there is none, or no text."""
    try:
        return read_bounded(path, _FILE_BYTES_MAX)[1].decode()
    except (OSError, ValueError):
        return None


def pod_of(environ: Mapping[str, str], read: Callable[[str], str | None] = read_small) -> Pod | None:
    """The pod of this process, None outside of one.

    From POD_NAME, POD_NAMESPACE, NODE_NAME, POD_IP and HOST_IP, and the labels in the file that KVTALLY_POD_LABELS
    names, by default /etc/podinfo/labels. On the network of its host (POD_IP is HOST_IP) the engines found are other
    pods': then only the node is told.
    """
    name, node, address, host, namespace = (
        value if _NAME.fullmatch(value := environ.get(variable, "").strip()) else ""
        for variable in ("POD_NAME", "NODE_NAME", "POD_IP", "HOST_IP", "POD_NAMESPACE")
    )
    if address and address == host:
        return Pod(node=node, address=address)
    if not namespace:
        given = (read(NAMESPACE_FILE) or "").strip()
        namespace = given if _NAME.fullmatch(given) else ""
    labels = labels_in(read(environ.get("KVTALLY_POD_LABELS") or LABELS_FILE) or "")
    pod = Pod(
        namespace,
        name,
        node,
        address,
        role_of(labels.get("llm-d.ai/role", "")),
        labels.get("llm-d.ai/model", ""),
        labels.get("llm-d.ai/engine-type") or labels.get("inference.networking.k8s.io/engine-type", ""),
    )
    return pod if any(pod) else None


def in_pod_of_its_own(pod: Pod | None) -> bool:
    """Whether this is a pod on a network of its own: a sidecar, to which the rest of the node belongs to others."""
    return pod is not None and bool(pod.namespace or pod.name)


def labels_in(text: str) -> dict[str, str]:
    """The labels of a file of the downward API; a line of another form is passed over."""
    return {match[1]: match[2] for line in text.splitlines() if (match := _LABEL.fullmatch(line.strip()))}


def role_of(text: str) -> Role:
    """A value of llm-d.ai/role as a role; "" for one that tells none."""
    return _ROLES.get(text, "")


def in_pod(engine: Engine, pod: Pod | None) -> Engine:
    """A completed engine of this pod, its namespace and role filled in where config is silent."""
    if pod is None:
        return engine
    labels = engine.labels
    if not labels.namespace and pod.namespace:
        labels = msgspec.structs.replace(labels, namespace=pod.namespace)
    return msgspec.structs.replace(engine, labels=labels, role=engine.role or pod.role)
