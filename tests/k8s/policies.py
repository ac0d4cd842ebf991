"""What this project asks of its manifests, beyond being valid. Each check gives its faults as sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.rendering import Manifest, of_kind, pods, strings

# What somebody else makes; docs/kubernetes.md says who and how.
EXTERNAL = {
    ("Secret", "shellv-storage"),
    ("Secret", "shellv-postgres"),
    ("Secret", "shellv-serve-users"),
    ("Secret", "shellv-serve-tls"),
    ("ClusterQueue", "shellv"),
    # The platform's own, which the training runtime's pods read in the namespace where they run.
    ("ConfigMap", "shellv-services"),
}
SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"://[^/\s:@]+:[^/\s:@]+@|AKIA[A-Z0-9]{12}|-----BEGIN|\beyJ[\w-]{10,}\.|\bsk-\w{16}|\bgh[pousr]_\w{20}"
)


def faults_of_security(objects: list[Manifest]) -> Iterator[str]:
    """Pods run as nobody in particular, change nothing of their image and have no word with the API server."""
    for owner, _, spec in pods(objects):
        name = owner["metadata"]["name"]
        pod = spec.get("securityContext", {})
        if pod.get("runAsNonRoot") is not True or not pod.get("runAsUser"):
            yield f"{name} may run as root"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name} has no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name} mounts a token of its service account"
        if spec.get("enableServiceLinks") is not False:
            yield f"{name} gets the addresses of all services as variables"
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{name} has {field}"
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{name} mounts {volume['name']} from the node"
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name}'s volume {volume['name']} has no limit"
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            own = container.get("securityContext", {})
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}/{container['name']} writes to its root"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{name}/{container['name']} may gain privileges"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}/{container['name']} keeps capabilities"


def faults_of_running(objects: list[Manifest]) -> Iterator[str]:
    """Servers are probed, all know their share of a node, and images are pinned."""
    for owner, _, spec in pods(objects):
        for container in spec["containers"]:
            name = f"{owner['metadata']['name']}/{container['name']}"
            if owner["kind"] != "ClusterTrainingRuntime":
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    if probe not in container:
                        yield f"{name} has no {probe}"
            resources = container.get("resources", {})
            for resource in ("cpu", "memory"):
                if resource not in resources.get("requests", {}):
                    yield f"{name} requests no {resource}"
            if "memory" not in resources.get("limits", {}):
                yield f"{name} has no limit of memory"
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in container["image"] and tag in ("", "latest"):
                yield f"{name}'s image {container['image']} is not pinned"


def faults_of_secrecy(objects: list[Manifest]) -> Iterator[str]:
    """Secrets are named and never there."""
    for each in of_kind(objects, "Secret"):
        yield f"Secret {each['metadata']['name']} is in the tree"
    for owner, _, spec in pods(objects):
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]) and "value" in variable:
                    yield f"{owner['metadata']['name']} has a value for {variable['name']}"
    for each in of_kind(objects, "ConfigMap"):
        for key in each.get("data", {}):
            if SECRET_NAME.search(key):
                yield f"ConfigMap {each['metadata']['name']} has a value for {key}"
    for each in objects:
        for text in strings(each):
            if SECRET_VALUE.search(text):
                yield f"{each['kind']} {each['metadata']['name']} has what looks like a secret: {text}"


def faults_of_references(objects: list[Manifest]) -> Iterator[str]:
    """Whatever is named is here, or is known to be somebody else's."""
    here = {(each["kind"], each["metadata"]["name"]) for each in objects} | EXTERNAL
    for owner, kind, name in _references(objects):
        if (kind, name) not in here:
            yield f"{owner} names the {kind} {name}, which is nowhere"


def _references(objects: list[Manifest]) -> Iterator[tuple[str, str, str]]:
    for owner, _, spec in pods(objects):
        name = owner["metadata"]["name"]
        if "serviceAccountName" in spec:
            yield name, "ServiceAccount", spec["serviceAccountName"]
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if field in source:
                        yield name, kind, source[field]["name"]
            for variable in container.get("env", []):
                for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                    if field in variable.get("valueFrom", {}):
                        yield name, kind, variable["valueFrom"][field]["name"]
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                yield name, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
            if "configMap" in volume:
                yield name, "ConfigMap", volume["configMap"]["name"]
            if "secret" in volume:
                yield name, "Secret", volume["secret"]["secretName"]
    for each in objects:
        name, spec = each["metadata"]["name"], each.get("spec", {})
        if each["kind"] == "HorizontalPodAutoscaler":
            yield name, spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]
        elif each["kind"] == "Ingress":
            annotations = each["metadata"].get("annotations", {})
            yield name, "Secret", annotations.get("nginx.ingress.kubernetes.io/auth-secret", "of its users")
            for tls in spec.get("tls", []):
                yield name, "Secret", tls["secretName"]
            for rule in spec["rules"]:
                for path in rule["http"]["paths"]:
                    yield name, "Service", path["backend"]["service"]["name"]
        elif each["kind"] == "HTTPRoute":
            for rule in spec["rules"]:
                for backend in rule["backendRefs"]:
                    yield name, "Service", backend["name"]
        elif each["kind"] == "RoleBinding":
            yield name, each["roleRef"]["kind"], each["roleRef"]["name"]
            for subject in each["subjects"]:
                yield name, subject["kind"], subject["name"]
        elif each["kind"] == "LocalQueue":
            yield name, "ClusterQueue", spec["clusterQueue"]
        elif each["kind"] == "StatefulSet":
            yield name, "Service", spec["serviceName"]
        elif each["kind"] == "Rollout":
            canary = spec["strategy"]["canary"]
            yield name, spec["workloadRef"]["kind"], spec["workloadRef"]["name"]
            yield name, "Service", canary["stableService"]
            yield name, "Service", canary["canaryService"]
            for step in canary["steps"]:
                for template in step.get("analysis", {}).get("templates", []):
                    yield name, "AnalysisTemplate", template["templateName"]


def faults_of_selectors(objects: list[Manifest]) -> Iterator[str]:
    """Every selector finds something, and every port that is named is open."""
    running = [(labels, {port["name"] for each in spec["containers"] for port in each.get("ports", [])})
               for _, labels, spec in pods(objects)]  # fmt: skip
    for each in objects:
        name, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        if each["kind"] in ("Deployment", "StatefulSet") and not _selects(
            spec["selector"], spec["template"]["metadata"]["labels"]
        ):
            yield f"{name} does not select its own pods"
        if each["kind"] == "Service":
            found = [ports for labels, ports in running if _selects({"matchLabels": spec["selector"]}, labels)]
            if not found:
                yield f"{name} selects no pod"
            for port in spec["ports"]:
                if any(port["targetPort"] not in ports for ports in found):
                    yield f"{name} leads to the port {port['targetPort']}, which its pods do not have"
        if each["kind"] == "PodDisruptionBudget" and not any(
            _selects(spec["selector"], labels) for labels, _ in running
        ):
            yield f"{name} selects no pod"
        if each["kind"] == "ServiceMonitor":
            services = [
                service
                for service in of_kind(objects, "Service")
                if _selects(spec["selector"], service["metadata"].get("labels", {}))
            ]
            if not services:
                yield f"{name} selects no service"
            for endpoint in spec["endpoints"]:
                for service in services:
                    if endpoint["port"] not in [port["name"] for port in service["spec"]["ports"]]:
                        yield f"{name} scrapes the port {endpoint['port']}, which the service does not have"
    for owner, _, spec in pods(objects):
        for container in spec["containers"]:
            open_ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                action = container.get(probe, {})
                port = (action.get("httpGet") or action.get("tcpSocket") or {}).get("port")
                if port and port not in open_ports:
                    yield f"{owner['metadata']['name']}'s {probe} asks the port {port}, which is not there"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return bool(wanted) and all(labels.get(key) == value for key, value in wanted.items())


def faults_of_rights(objects: list[Manifest]) -> Iterator[str]:
    """Roles name what they give; secrets are given by name; nothing is given in the whole cluster."""
    for each in of_kind(objects, "ClusterRole", "ClusterRoleBinding"):
        yield f"{each['kind']} {each['metadata']['name']} reaches beyond the namespace"
    for each in of_kind(objects, "Role"):
        for rule in each["rules"]:
            for field in ("apiGroups", "resources", "verbs"):
                if "*" in rule[field]:
                    yield f"Role {each['metadata']['name']} gives all {field}"
            if "secrets" in rule["resources"] and not rule.get("resourceNames"):
                yield f"Role {each['metadata']['name']} gives every secret"


POLICIES = (
    faults_of_security,
    faults_of_running,
    faults_of_secrecy,
    faults_of_references,
    faults_of_selectors,
    faults_of_rights,
)
