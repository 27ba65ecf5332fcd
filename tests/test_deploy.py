from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.kustomized import Thing, built, containers, documents, merged, pod

from kvtally import __version__
from kvtally.agent import config
from kvtally.agent.health import Health
from kvtally.agent.kubernetes import LABELS_FILE, Pod, pod_of
from kvtally.agent.metrics_server import MetricsServer

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
SCHEMAS = Path(__file__).parent / "fixtures/kubernetes"
BASE = KUBERNETES / "base/kvtally.toml"
KUBECTL = shutil.which("kubectl")
PORT = 9478
ENGINES = ("sidecar", "disaggregated")
SIDECAR_COMPONENTS = ("ledger-claim", "engine-of-root", "host-pids", "pod-monitor")
# an overlay, and the components that are added to its own
WAYS = [
    ("sidecar", ()),
    ("disaggregated", ()),
    ("daemonset", ()),
    ("daemonset", ("pod-monitor",)),
    *(("sidecar", (one,)) for one in SIDECAR_COMPONENTS),
    ("sidecar", SIDECAR_COMPONENTS),
]


def laid_out(folder: Path, overlay: str, components: tuple[str, ...]) -> Path:
    """A copy of the manifests in which an overlay takes these components too."""
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    place = folder / "kubernetes/overlays" / overlay
    file = place / "kustomization.yaml"
    text = file.read_text(encoding="utf-8")
    more = "".join(f"  - ../../components/{name}\n" for name in components)
    own = "  - ../../components/sidecar\n"  # the others are merged into what it brings
    text = text.replace(own, own + more) if own in text else f"{text}\ncomponents:\n{more}" if more else text
    file.write_text(text, encoding="utf-8")
    return place


@pytest.fixture(params=WAYS, ids=lambda way: "+".join((way[0], *way[1])))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return laid_out(tmp_path, *request.param)


def overlay(name: str, *components: str, folder: Path) -> list[Thing]:
    return built(laid_out(folder, name, components))


def workloads(things: list[Thing]) -> list[Thing]:
    return [thing for thing in things if pod(thing)]


def kvtally_of(thing: Thing) -> Thing:
    """The container of kvtally in a workload."""
    (found,) = [one for one in containers(thing) if one["name"] == "kvtally"]
    return found


def in_order(value: Any) -> Any:
    """The same with what is named put in the order of the names, as no API server minds."""
    if isinstance(value, dict):
        return {key: in_order(one) for key, one in value.items()}
    if isinstance(value, list):
        return sorted((in_order(one) for one in value), key=lambda one: isinstance(one, dict) and one.get("name", ""))
    return value


def by_identity(things: list[Thing]) -> dict[tuple[str, str], Any]:
    return {(thing["kind"], thing["metadata"]["name"]): in_order(thing) for thing in things}


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_kubectl_builds_what_the_tests_look_at(place: Path) -> None:
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(place)], capture_output=True, text=True, check=True)
    assert by_identity(documents(done.stdout)) == by_identity(built(place))


def test_every_object_fits_its_schema(place: Path) -> None:
    for thing in built(place):
        for file, path in schemas_of(thing):
            schema = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
            jsonschema.Draft202012Validator({**schema, **path}).validate(thing)


def schemas_of(thing: Thing) -> list[tuple[str, dict[str, str]]]:
    """Schema files for an object, and where in them its kind is."""
    if thing["kind"] == "PodMonitor":
        return [("podmonitor-0.93.json", {})]
    group = "apps" if thing["apiVersion"] == "apps/v1" else "core"
    where = {"$ref": f"#/$defs/io.k8s.api.{group}.v1.{thing['kind']}"}
    return [("kubernetes-1.29.json", where), ("kubernetes-1.37.json", where)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "hostPid"), True),  # hostPID
        (("spec", "replicas"), "1"),
        (("spec", "template", "spec", "securityContext", "runAsUser"), "2000"),
        (("kind",), "Deploymnt"),
    ],
)
def test_a_mistake_in_a_manifest_does_not_fit_its_schema(path: tuple[str, ...], value: object, tmp_path: Path) -> None:
    (thing,) = workloads(overlay("sidecar", folder=tmp_path))
    kind_of = dict(thing)
    inside = thing
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    (file, where), _ = schemas_of(kind_of)
    schema = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator({**schema, **where}).validate(thing)


def test_every_file_is_named_by_a_kustomization_or_by_the_page() -> None:
    named = {folder / path for folder, path in references()}
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    files = {file for file in KUBERNETES.rglob("*") if file.is_file() and file.name != "kustomization.yaml"}
    entrances = [*KUBERNETES.glob("overlays/*"), *KUBERNETES.glob("components/*")]
    assert {file.resolve() for file in named if not file.exists()} == set()
    assert {file for file in files - {one.resolve() for one in named} if file.name not in page} == set()
    assert [one.name for one in entrances if f"{one.parent.name}/{one.name}" not in page] == []


def references() -> list[tuple[Path, str]]:
    """Everything that a kustomization names, also in what is commented out, with the folder that it counts from."""
    found: list[tuple[Path, str]] = []
    for file in KUBERNETES.rglob("kustomization.yaml"):
        text = re.sub(r"^( *)# ?(- |\w+:)", r"\1\2", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        paths = re.findall(
            r"^ +- (\.\./\S+|[\w.-]+\.(?:yaml|toml))(?: #.*)?$|^ +(?:- )?path: (\S+)", text, re.MULTILINE
        )
        found += [(file.parent, path or patch) for path, patch in paths]
    return found


def test_an_overlay_replaces_the_image_and_every_image_has_a_version(place: Path) -> None:
    images = {one["image"] for thing in built(place) for one in containers(thing)}
    assert f"registry.example/kvtally:{__version__}" in images
    assert [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image)] == []


# who runs, and what it may do: (user, group, capabilities added)
ENGINE = (2000, 2000, ())
RIGHTS: dict[tuple[str, tuple[str, ...]], dict[str, tuple[int, int, tuple[str, ...]]]] = {
    ("sidecar", ()): {"kvtally": ENGINE, "vllm": ENGINE},
    ("sidecar", ("ledger-claim",)): {"kvtally": ENGINE, "vllm": ENGINE},
    ("sidecar", ("host-pids",)): {"kvtally": ENGINE, "vllm": ENGINE},
    ("sidecar", ("engine-of-root",)): {"kvtally": (0, 0, ("SYS_PTRACE",)), "vllm": ENGINE},
    ("disaggregated", ()): {"kvtally": ENGINE, "vllm": ENGINE},
    ("daemonset", ()): {"kvtally": ENGINE, "own-ledger": (0, 0, ("CHOWN",))},
}


@pytest.mark.parametrize("way", RIGHTS, ids=lambda way: "+".join((way[0], *way[1])))
def test_nobody_has_more_rights_than_the_page_explains(way: tuple[str, tuple[str, ...]], tmp_path: Path) -> None:
    for thing in workloads(overlay(way[0], *way[1], folder=tmp_path)):
        whole = pod(thing).get("securityContext", {})
        found = {}
        for one in containers(thing):
            own = {**whole, **one["securityContext"]}
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"]["drop"] == ["ALL"]
            assert own["seccompProfile"] == {"type": "RuntimeDefault"}
            assert own.get("privileged") is None
            assert own.get("runAsNonRoot", False) == (own["runAsUser"] != 0)
            assert one["name"] == "vllm" or own["readOnlyRootFilesystem"] is True
            found[one["name"]] = (own["runAsUser"], own["runAsGroup"], tuple(own["capabilities"].get("add", ())))
        assert found == RIGHTS[way]
        assert pod(thing)["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("way", "shown"),
    [
        (("sidecar", ()), {"shareProcessNamespace"}),
        (("disaggregated", ()), {"shareProcessNamespace"}),
        (("sidecar", ("host-pids",)), {"hostPID"}),
        (("daemonset", ()), {"hostPID", "hostNetwork"}),
    ],
)
def test_only_these_namespaces_are_shared(way: tuple[str, tuple[str, ...]], shown: set[str], tmp_path: Path) -> None:
    keys = ("shareProcessNamespace", "hostPID", "hostNetwork", "hostIPC", "hostUsers")
    for thing in workloads(overlay(way[0], *way[1], folder=tmp_path)):
        assert {key for key in keys if key in pod(thing)} == shown
        assert all(pod(thing)[key] is True for key in shown)
        host_paths = [one["name"] for one in pod(thing)["volumes"] if "hostPath" in one]
        assert host_paths == (["kvtally-ledger"] if way[0] == "daemonset" else [])


def test_the_patch_for_engines_of_any_user_adds_two_capabilities_and_nothing_else(tmp_path: Path) -> None:
    (thing,) = workloads(overlay("daemonset", folder=tmp_path))
    (patch,) = documents((KUBERNETES / "overlays/daemonset/engines-of-any-user.yaml").read_text(encoding="utf-8"))
    before, after = kvtally_of(thing), kvtally_of({**thing, "spec": merged(thing["spec"], patch["spec"])})
    changed = {"runAsUser": 0, "runAsGroup": 2000, "runAsNonRoot": False}
    rights = {"drop": ["ALL"], "add": ["SYS_PTRACE", "DAC_READ_SEARCH"]}
    assert (patch["kind"], patch["metadata"]["name"]) == (thing["kind"], thing["metadata"]["name"])
    assert after == {**before, "securityContext": {**before["securityContext"], **changed, "capabilities": rights}}


def test_what_is_mounted_is_a_volume_and_every_volume_is_mounted(place: Path) -> None:
    for thing in workloads(built(place)):
        mounts = [mount for one in containers(thing) for mount in one.get("volumeMounts", ())]
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod(thing)["volumes"]}
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod(thing)["volumes"]
            if "persistentVolumeClaim" in volume
        }
        made = {one["metadata"]["name"] for one in built(place) if one["kind"] == "PersistentVolumeClaim"}
        assert claims == made


def test_kvtally_can_write_where_its_root_is_read_only(place: Path) -> None:
    for thing in workloads(built(place)):
        mounts = {mount["mountPath"]: mount for mount in kvtally_of(thing)["volumeMounts"]}
        writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
        assert writable == {"/var/lib/kvtally", "/tmp"}  # the ledger, and what SQLite sorts


def test_the_config_is_where_kvtally_looks_for_it_and_is_taken(place: Path) -> None:
    things = built(place)
    (made,) = [thing for thing in things if thing["kind"] == "ConfigMap"]
    assert made["data"] == {"kvtally.toml": BASE.read_text(encoding="utf-8")}
    for thing in workloads(things):
        volumes = {volume["name"]: volume for volume in pod(thing)["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in kvtally_of(thing)["volumeMounts"]}
        assert volumes[mounts["/etc/kvtally"]]["configMap"]["name"] == made["metadata"]["name"]
        assert "/etc/kvtally/kvtally.toml" in config.SEARCHED
    taken = config.load(str(BASE), {})
    assert taken.log.format == "json"
    assert taken.ledger.retention_days == 30


def test_what_the_config_shows_as_comments_is_understood_too(tmp_path: Path) -> None:
    text = BASE.read_text(encoding="utf-8")
    shown = re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE)
    file = tmp_path / "kvtally.toml"
    file.write_text(shown, encoding="utf-8")
    taken = config.load(str(file), {})
    assert len(tomllib.loads(shown)) == len(tomllib.loads(text)) + 3
    assert taken.labels == config.Labels(cluster="fra1", tenant="search")
    assert taken.rates.card == str(tmp_path / "rates.toml")
    assert [page.url for page in taken.pages] == ["http://dcgm-exporter.gpu-operator:9400/metrics"]


def test_one_port_is_listened_on_named_asked_and_scraped(place: Path) -> None:
    things = built(place)
    assert config.load(str(BASE), {}).export.prometheus.listen == f"0.0.0.0:{PORT}"
    for thing in workloads(things):
        own = kvtally_of(thing)
        (port,) = own["ports"]
        assert (port["name"], port["containerPort"], port.get("hostPort", PORT)) == ("metrics", PORT, PORT)
        assert "hostPort" not in port or pod(thing)["hostNetwork"]
        probes = {key: own[key]["httpGet"] for key in own if key.endswith("Probe")}
        assert {probe["port"] for probe in probes.values()} == {"metrics"}
        taken = [one["containerPort"] for each in containers(thing) for one in each.get("ports", ())]
        assert len(taken) == len(set(taken))
    for monitor in (thing for thing in things if thing["kind"] == "PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        (expression,) = monitor["spec"]["selector"]["matchExpressions"]
        assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
        assert expression == {"key": "kvtally", "operator": "Exists"}
        assert all("kvtally" in thing["spec"]["template"]["metadata"]["labels"] for thing in workloads(things))


def test_the_addresses_that_probes_and_prometheus_ask_are_served(tmp_path: Path) -> None:
    health = Health("ledger.db")
    server = MetricsServer("127.0.0.1", 0, health)
    try:
        (thing,) = workloads(overlay("daemonset", folder=tmp_path))
        own = kvtally_of(thing)
        live, ready = (own[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness"))
        answers = [status(server.port, path) for path in (live, ready, "/metrics")]
        health.is_ready = True
        assert [*answers, status(server.port, ready)] == [200, 503, 200, 200]
    finally:
        server.close()


def status(port: int, path: str) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("name", ENGINES)
def test_trouble_of_the_sidecar_takes_no_engine_out_of_service(name: str, tmp_path: Path) -> None:
    for thing in workloads(overlay(name, folder=tmp_path)):
        own = kvtally_of(thing)
        assert own["livenessProbe"]["httpGet"]["path"] == "/-/healthy"
        assert "readinessProbe" not in own
        assert "startupProbe" not in own
        assert own["restartPolicy"] == "Always"
        assert own in pod(thing)["initContainers"]


@pytest.mark.parametrize("name", ENGINES)
def test_a_guaranteed_pod_stays_one(name: str, tmp_path: Path) -> None:
    for thing in workloads(overlay(name, folder=tmp_path)):
        for one in containers(thing):
            assert one["resources"]["requests"] == one["resources"]["limits"]


def test_memory_is_what_was_measured_and_no_gpu_is_taken(place: Path) -> None:
    for thing in workloads(built(place)):
        resources = kvtally_of(thing)["resources"]
        # the daemon with NVIDIA's library, and at once a child that exports and one that settles
        assert int(resources["requests"]["memory"].removesuffix("Mi")) >= 58 + 91 + 60
        assert set(resources["limits"]) == {"cpu", "memory"}
        own = {one["name"]: one.get("value") for one in kvtally_of(thing)["env"]}
        assert (own["NVIDIA_VISIBLE_DEVICES"], own["NVIDIA_DRIVER_CAPABILITIES"]) == ("all", "utility")


FIELDS = {
    "metadata.name": "vllm-7d9c-x2",
    "metadata.namespace": "chat",
    "spec.nodeName": "gpu-3",
    "status.podIP": "10.0.0.7",
    "status.hostIP": "10.1.0.3",
}


def variables(container: Thing, fields: dict[str, str] = FIELDS) -> dict[str, str]:
    """The environment that the kubelet makes of a container's `env`."""
    return {
        one["name"]: fields[one["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in one else one["value"]
        for one in container["env"]
    }


def labels_file(thing: Thing) -> str:
    """The file of labels that the kubelet writes for a pod."""
    return "\n".join(
        f'{key}="{value}"' for key, value in sorted(thing["spec"]["template"]["metadata"]["labels"].items())
    )


@pytest.mark.parametrize(("name", "role"), [("vllm-prefill", "prefill"), ("vllm-decode", "decode")])
def test_the_downward_api_tells_kvtally_its_pod_and_role(name: str, role: str, tmp_path: Path) -> None:
    things = {thing["metadata"]["name"]: thing for thing in overlay("disaggregated", folder=tmp_path)}
    own = kvtally_of(things[name])
    volumes = {volume["name"]: volume for volume in pod(things[name])["volumes"]}
    folders = {mount["mountPath"]: volumes[mount["name"]] for mount in own["volumeMounts"]}
    files = {
        f"{folder}/{item['path']}": labels_file(things[name])
        for folder, volume in folders.items()
        for item in volume.get("downwardAPI", {"items": ()})["items"]
        if item["fieldRef"]["fieldPath"] == "metadata.labels"
    }
    assert list(files) == [LABELS_FILE]
    told = pod_of(variables(own), files.get)
    assert told == Pod("chat", "vllm-7d9c-x2", "gpu-3", "10.0.0.7", role, "qwen3-8b", "vllm")  # type: ignore[arg-type]


def test_on_the_network_of_the_host_only_the_node_is_told(tmp_path: Path) -> None:
    (thing,) = workloads(overlay("daemonset", folder=tmp_path))
    told = pod_of(variables(kvtally_of(thing), {**FIELDS, "status.podIP": "10.1.0.3"}), lambda _: None)
    assert told == Pod(node="gpu-3", address="10.1.0.3")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_on_a_port_that_is_looked_at_and_its_log_has_no_line_for_a_scrape(
    name: str, tmp_path: Path
) -> None:
    for thing in workloads(overlay(name, folder=tmp_path)):
        (engine,) = [one for one in containers(thing) if one["name"] == "vllm"]
        ports = {one["name"]: one["containerPort"] for one in engine["ports"]}
        given = next((int(one.partition("=")[2]) for one in engine["args"] if one.startswith("--port=")), 8000)
        assert ports["http"] == given
        assert given in config.Config().scrape.ports
        assert "--disable-access-log-for-endpoints=/health,/metrics,/metrics/" in engine["args"]


def test_a_workload_without_the_label_is_left_alone(tmp_path: Path) -> None:
    place = laid_out(tmp_path, "sidecar", SIDECAR_COMPONENTS)
    (plain,) = documents((place / "vllm.yaml").read_text(encoding="utf-8"))
    del plain["metadata"]["labels"]["kvtally"]
    (place / "vllm.yaml").write_text(json.dumps(plain), encoding="utf-8")
    (found,) = workloads(built(place))
    assert found == plain


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_the_ledgers_folder_is_given_to_its_user_once(tmp_path: Path) -> None:
    (thing,) = workloads(overlay("daemonset", folder=tmp_path))
    (own,) = [one for one in containers(thing) if one["name"] == "own-ledger"]
    folder = tmp_path / "ledger"
    folder.mkdir(mode=0o755)
    program = own["command"][2].replace("/var/lib/kvtally", str(folder))
    modes = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True)
        modes.append((folder.stat().st_uid, folder.stat().st_gid, folder.stat().st_mode & 0o777))
        folder.chmod(0o700)  # what the operator has set stays
    assert modes == [(2000, 2000, 0o770), (2000, 2000, 0o700)]


def test_a_key_that_is_given_twice_is_seen() -> None:
    with pytest.raises(AssertionError, match="a key twice"):
        documents("spec:\n  - image: a\n    name: b\n    image: c\n")
