"""Every overlay keeps this project's policies, and each policy sees it broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shellv_core import __version__
from tests.k8s.policies import POLICIES, SECRET_VALUE
from tests.k8s.rendering import K8S, OPTIONAL, OVERLAYS, ROOTS, SERVERS, Manifest, named, of_kind, pods, render


@pytest.mark.parametrize("root", [*ROOTS, *OPTIONAL])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__.removeprefix("faults_of_"))
def test_overlays_keep_the_policies(policy: Callable[[list[Manifest]], Any], root: str) -> None:
    assert not list(policy(render(root)))


def pod(objects: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = named(objects, "Deployment", "shellv-serve")["spec"]["template"]["spec"]
    return spec


def change(objects: list[Manifest], what: str, value: Any) -> None:
    """Set (or with None drop) a field, given by a dotted path from the server's pod or from KIND:NAME."""
    start, _, path = what.rpartition(" ")
    place: Any = pod(objects) if not start else named(objects, *start.split(":"))
    *way, last = [int(each) if each.isdigit() else each for each in path.split(".")]
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    elif last == "append":
        place.append(value)
    else:
        place[last] = value


@pytest.mark.parametrize(
    ("what", "value", "fault"),
    [
        ("securityContext.runAsNonRoot", False, "may run as root"),
        ("securityContext.runAsUser", 0, "may run as root"),
        ("securityContext.seccompProfile", None, "no seccomp"),
        ("automountServiceAccountToken", True, "mounts a token"),
        ("enableServiceLinks", None, "addresses of all services"),
        ("hostNetwork", True, "hostNetwork"),
        ("volumes.append", {"name": "node", "hostPath": {"path": "/"}}, "from the node"),
        ("volumes.1.emptyDir.sizeLimit", None, "no limit"),
        ("containers.0.securityContext.readOnlyRootFilesystem", None, "writes to its root"),
        ("containers.0.securityContext.allowPrivilegeEscalation", True, "may gain privileges"),
        ("containers.0.securityContext.capabilities", {"drop": ["ALL"], "add": ["NET_RAW"]}, "keeps capabilities"),
        ("containers.0.startupProbe", None, "no startupProbe"),
        ("containers.0.readinessProbe", None, "no readinessProbe"),
        ("containers.0.livenessProbe", None, "no livenessProbe"),
        ("containers.0.resources.requests.cpu", None, "requests no cpu"),
        ("containers.0.resources.limits", None, "no limit of memory"),
        ("containers.0.image", "shellv-serve", "not pinned"),
        ("containers.0.image", "registry.example.com:5000/shellv-serve:latest", "not pinned"),
        ("containers.0.env.append", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "has a value"),
        ("ConfigMap:shellv-services data.MLFLOW_TRACKING_PASSWORD", "x", "has a value"),
        ("ConfigMap:shellv-services data.MLFLOW_TRACKING_URI", "http://me:pass@mlflow:5000", "looks like a secret"),
        ("ConfigMap:shellv-services kind", "Secret", "is in the tree"),
        ("serviceAccountName", "root", "is nowhere"),
        ("containers.0.envFrom.0.configMapRef.name", "shellv-servces", "is nowhere"),
        ("containers.0.envFrom.2.secretRef.name", "storage", "is nowhere"),
        ("volumes.0", {"name": "cache", "persistentVolumeClaim": {"claimName": "none"}}, "is nowhere"),
        ("HorizontalPodAutoscaler:shellv-serve spec.scaleTargetRef.name", "serve", "is nowhere"),
        ("Ingress:shellv-serve metadata.annotations", {}, "is nowhere"),
        ("Ingress:shellv-serve spec.rules.0.http.paths.0.backend.service.name", "serve", "is nowhere"),
        ("RoleBinding:pipeline-runner subjects.0.name", "default", "is nowhere"),
        ("Deployment:shellv-serve spec.selector.matchLabels.shellv.dev/track", "x", "does not select its own"),
        ("Service:shellv-serve spec.selector.app", "x", "selects no pod"),
        ("Service:shellv-serve spec.ports.0.targetPort", "web", "do not have"),
        ("PodDisruptionBudget:shellv-serve spec.selector", {"matchLabels": {"app": "x"}}, "selects no pod"),
        ("containers.0.livenessProbe.httpGet.port", "health", "is not there"),
        ("Role:pipeline-runner rules.0.verbs", ["*"], "gives all verbs"),
        ("Role:pipeline-runner-kubeflow rules.1.resourceNames", None, "every secret"),
        ("Role:pipeline-runner kind", "ClusterRole", "beyond the namespace"),
    ],
)
def test_a_broken_policy_is_seen(what: str, value: Any, fault: str) -> None:
    objects = render("k8s/components/ingress")
    # A label's own dots and slash are no path.
    if what.endswith("shellv.dev/track"):
        named(objects, "Deployment", "shellv-serve")["spec"]["selector"]["matchLabels"]["shellv.dev/track"] = value
    else:
        change(objects, what, value)
    found = [each for policy in POLICIES for each in policy(objects)]
    assert any(fault in each for each in found), found


@pytest.mark.parametrize("root", OVERLAYS)
def test_the_pipeline_may_do_what_the_code_does_and_no_more(root: str) -> None:
    from shellv_core.cluster.permissions import PERMISSIONS

    rules = named(render(root), "Role", "pipeline-runner")["rules"]
    given = [
        (group, resource, frozenset(rule["verbs"]))
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    ]
    assert sorted(given, key=str) == sorted(((each.group, each.resource, each.verbs) for each in PERMISSIONS), key=str)


def test_the_documented_rights_are_those_of_the_roles() -> None:
    import re

    document = (K8S.parent / "docs" / "kubernetes.md").read_text()
    section = document.partition("### Rights\n")[2].partition("\n#")[0]
    listed = {
        (resource, verb, name)
        for resource, verbs, names in re.findall(r"^\| `([^`]+)` \| ([^|]+?) \| ([^|]*?) \|", section, re.MULTILINE)
        for verb in verbs.split(", ")
        for name in names.replace("`", "").split(", ")
    }
    given = {
        (f"{group}/{resource}".lstrip("/"), verb, name)
        for role in of_kind(render("k8s/overlays/cpu"), "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", ["any"])
    }
    assert listed == given


def test_deploy_writes_to_what_is_here() -> None:
    from shellv_core.cluster import rollout

    objects = render("k8s/overlays/cpu")
    for name in ("shellv-serve", f"shellv-serve{rollout.CANARY_SUFFIX}"):
        [container] = named(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        assert container["name"] == rollout.CONTAINER
        assert any(f"$({rollout.MODEL_VARIABLE})" in each for each in container["args"])
        # The pipeline's value must be the only one on the container itself: the platform's is in the ConfigMap.
        assert rollout.MODEL_VARIABLE not in [each["name"] for each in container["env"]]
    assert rollout.MODEL_VARIABLE in named(objects, "ConfigMap", "shellv-serve")["data"]


def test_no_file_of_the_tree_holds_a_secret() -> None:
    for path in sorted(K8S.rglob("*.yaml")):
        assert not SECRET_VALUE.search(path.read_text()), path


@pytest.mark.parametrize("root", ROOTS)
def test_our_own_images_are_of_this_version(root: str) -> None:
    for _, _, spec in pods(render(root)):
        for container in spec["containers"]:
            if "shellv-" in container["image"]:
                assert container["image"] in (
                    f"localhost/shellv-serve:{__version__}",
                    f"localhost/shellv-train:{__version__}",
                )


@pytest.mark.parametrize("root", SERVERS)
def test_the_server_has_time_to_drain(root: str) -> None:
    from shellv_core.serving.http.server import DRAIN_SECONDS, FLUSH_SECONDS

    spec = pod(render(root))
    pause = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + DRAIN_SECONDS + FLUSH_SECONDS


def test_the_server_is_started_with_arguments_that_it_takes() -> None:
    from shellv_core.cli import _parser

    objects = render("k8s/overlays/a100-80")
    settings = named(objects, "ConfigMap", "shellv-serve")["data"]
    [container] = pod(objects)["containers"]
    assert container["command"][0] == "shellv"
    arguments: list[str] = [*container["command"][1:], *container["args"]]
    for key, value in settings.items():
        arguments = [each.replace(f"$({key})", value) for each in arguments]
    options = _parser("serve").parse_args(arguments)
    assert [options.port, options.operations_port] == [each["containerPort"] for each in container["ports"]]
    assert (options.device, options.dtype, options.model) == ("cuda", "bfloat16", "models:/shellv-7b@champion")
    assert not any("$(" in each for each in arguments)


@pytest.mark.parametrize("root", [each for each in OVERLAYS if each.split("/")[-1] in ("a100-40", "a100-80", "h100")])
def test_gpu_overlays_ask_for_the_gpu_and_may_use_its_nodes(root: str) -> None:
    for owner, _, spec in pods(render(root)):
        resources = spec["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1", owner
        assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert "nvidia.com/gpu" in next(iter(spec["nodeSelector"]))


@pytest.mark.parametrize("root", OVERLAYS)
def test_the_object_store_is_the_same_in_all_places(root: str) -> None:
    import yaml

    objects = render(root)
    services = named(objects, "ConfigMap", "shellv-services")["data"]
    launcher = named(objects, "ConfigMap", "kfp-launcher")["data"]
    store = yaml.safe_load(launcher["providers"])["s3"]["default"]
    scheme = "http" if store["disableSSL"] else "https"
    assert f"{scheme}://{store['endpoint']}" == services["AWS_ENDPOINT_URL"] == services["MLFLOW_S3_ENDPOINT_URL"]
    assert store["region"] == services["AWS_REGION"]
    assert store["credentials"]["secretRef"] == {
        "secretName": "shellv-storage",
        "accessKeyKey": "AWS_ACCESS_KEY_ID",
        "secretKeyKey": "AWS_SECRET_ACCESS_KEY",
    }


@pytest.mark.parametrize("root", [each for each in (*SERVERS, "k8s/overlays/kserve") if not each.endswith("dev")])
def test_a_drain_and_a_rollout_leave_a_replica(root: str) -> None:
    objects = render(root)
    if root.endswith("kserve"):
        assert of_kind(objects, "InferenceService")[0]["spec"]["predictor"]["minReplicas"] >= 2
        return
    assert named(objects, "HorizontalPodAutoscaler", "shellv-serve")["spec"]["minReplicas"] >= 2
    assert named(objects, "PodDisruptionBudget", "shellv-serve")["spec"]["minAvailable"] == 1
    deployment = named(objects, "Deployment", "shellv-serve")["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert deployment["template"]["spec"]["topologySpreadConstraints"]
    # The autoscaler's, so nothing that applies this file again may set it back.
    assert root.endswith("rollouts") or "replicas" not in deployment
