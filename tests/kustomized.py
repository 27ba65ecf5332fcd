"""Builds a kustomization as far as deploy/kubernetes uses them; a test holds it against kubectl's own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pathlib import Path

Thing = dict[str, Any]


def documents(text: str) -> list[Any]:
    """Everything in a file of YAML, in which no key is given twice: parsers silently take the last."""
    for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
        _assert_no_twins(node)
    return list(yaml.safe_load_all(text))


def _assert_no_twins(node: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key twice in {keys}"
    for below in node.value if isinstance(node, yaml.CollectionNode) else ():
        for one in below if isinstance(below, tuple) else (below,):
            _assert_no_twins(one)


def built(folder: Path) -> list[Thing]:
    """The objects of a kustomization: resources and generated ones, then components, images last."""
    top = _kustomization(folder)
    things = _resources(folder, top)
    for path in top.get("components", ()):
        component = _kustomization(folder / path)
        things = [_patched(thing, folder / path, component) for thing in things + _resources(folder / path, component)]
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in top.get("images", ())}
    for thing in things:
        for container in containers(thing):
            container["image"] = images.get(container["image"], container["image"])
    return things


def pod(thing: Thing) -> Thing:
    """The spec of a workload's pods; nothing for what has none."""
    spec: Thing = thing.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def containers(thing: Thing) -> list[Thing]:
    """All containers of a workload, those that start first before the others."""
    return [*pod(thing).get("initContainers", ()), *pod(thing).get("containers", ())]


def merged(old: Any, patch: Any) -> Any:
    """A strategic merge: what has a name is merged by it, null takes a key away, all else is replaced."""
    if isinstance(patch, dict):
        old = old if isinstance(old, dict) else {}
        both = {**old, **{key: merged(old.get(key), value) for key, value in patch.items()}}
        return {key: value for key, value in both.items() if value is not None}
    if isinstance(patch, list) and all(isinstance(one, dict) and "name" in one for one in patch):
        patches, known = {one["name"]: one for one in patch}, [one["name"] for one in old or ()]
        new = [merged({}, one) for name, one in patches.items() if name not in known]
        return [*new, *(merged(one, patches.get(one["name"], {})) for one in old or ())]
    return patch


def _kustomization(folder: Path) -> Thing:
    (thing,) = documents((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert isinstance(thing, dict)
    return thing


def _resources(folder: Path, kustomization: Thing) -> list[Thing]:
    things: list[Thing] = []
    for path in kustomization.get("resources", ()):
        place = folder / path
        things += built(place) if place.is_dir() else documents(place.read_text(encoding="utf-8"))
    for given in kustomization.get("configMapGenerator", ()):
        assert given["options"] == {"disableNameSuffixHash": True}
        files = {name: (folder / name).read_text(encoding="utf-8") for name in given["files"]}
        things.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": given["name"]}, "data": files})
    return things


def _patched(thing: Thing, folder: Path, kustomization: Thing) -> Thing:
    for patch in kustomization.get("patches", ()):
        label, value = patch["target"]["labelSelector"].split("=")
        chosen = re.fullmatch(patch["target"]["kind"], thing["kind"])
        if chosen and thing["metadata"].get("labels", {}).get(label) == value:
            (text,) = documents((folder / patch["path"]).read_text(encoding="utf-8"))
            thing = {**thing, "spec": merged(thing["spec"], text["spec"])}
    return thing
