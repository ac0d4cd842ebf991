"""What a cluster makes of the two serving Deployments: pods, their states, and who answers behind their Services."""

from __future__ import annotations

import copy
import json
from typing import Any

from shellv_core.cluster.rollout import model_of
from tests.cluster.kubernetes_api import KubernetesApi

#: Which model a pod loads whose template names none.
DEFAULT = "models:/shellv@champion"
WAITING = {
    "image": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "shellv-serve:1"'},
    "crash": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"},
    "config": {"reason": "CreateContainerConfigError", "message": 'configmap "shellv-serve" not found'},
}


def deployment(name: str, track: str, replicas: int, model: str | None = None) -> dict[str, Any]:
    """A Deployment as ``k8s/`` has it."""
    labels = {"app.kubernetes.io/name": "shellv-serve", "shellv.dev/track": track}
    env = [{"name": "SHELLV_HOME", "value": "/cache"}]
    if model:
        env.append({"name": "SHELLV_MODEL", "value": model})
    container = {
        "name": "serve",
        "image": "shellv-serve:1",
        "args": ["--model=$(SHELLV_MODEL)"],
        "env": env,
        "resources": {"limits": {"memory": "8Gi"}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": dict(labels)},
            "template": {"metadata": {"labels": dict(labels)}, "spec": {"containers": [container]}},
        },
    }


class DeploymentController:
    """Rolls the Deployments out as soon as they change.

    Attributes:
        behaviours: how pods of a model fare, by (Deployment, model) or by model: good, slow (not ready yet), image,
            crash, config, unschedulable, deadline.
        servers: where the server of a model is.
        answering: the model behind each Deployment's Service.
    """

    def __init__(self, api: KubernetesApi, servers: dict[str, str]) -> None:
        self.api, self.servers = api, servers
        self.behaviours: dict[Any, str] = {}
        self.answering: dict[str, str | None] = {}
        api.changed = self._changed
        api.services = lambda name: self.servers.get(self.answering.get(name) or "")

    def _changed(self, key: tuple[str, str]) -> None:
        if key[0] == "deployments":
            item = self.api.objects[key]
            if item.get("status", {}).get("observedGeneration") != item["metadata"]["generation"]:
                self.reconcile(key[1])

    def reconcile(self, name: str) -> None:
        """Bring the pods and the status of a Deployment up to its specification."""
        item = copy.deepcopy(self.api.objects["deployments", name])
        template, wanted = item["spec"]["template"], item["spec"].get("replicas", 1)
        model = model_of(item) or DEFAULT
        behaviour = self.behaviours.get((name, model), self.behaviours.get(model, "good"))
        number = abs(hash(json.dumps(template, sort_keys=True))) % 10**6
        old = [each for each in self._pods(name) if f"-{number}-" not in each]
        seen: dict[str, Any] = {"observedGeneration": item["metadata"]["generation"], "conditions": []}
        if wanted == 0 or behaviour == "good":
            for count in range(wanted):
                self._put_pod(f"{name}-{number}-{count}", template, {"phase": "Running"})
                counts = {"updatedReplicas": count + 1, "availableReplicas": max(len(old), count + 1)}
                self.api.set_status("deployments", name, **seen, replicas=count + 1 + len(old), **counts)
            for pod in old:
                self.api.remove("pods", pod)
            self.answering[name] = model if wanted else None
            done = {"replicas": wanted, "updatedReplicas": wanted, "availableReplicas": wanted}
            self.api.set_status("deployments", name, **seen, **done)
            return
        pod = f"{name}-{number}-0"
        self._put_pod(pod, template, self._bad_status(pod, behaviour))
        if behaviour == "deadline":
            message = f'ReplicaSet "{name}-{number}" has timed out progressing.'
            seen["conditions"] = [
                {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": message}
            ]
        counts = {"replicas": len(old) + 1, "updatedReplicas": 1, "availableReplicas": len(old)}
        self.api.set_status("deployments", name, **seen, **counts)

    def _bad_status(self, pod: str, behaviour: str) -> dict[str, Any]:
        status: dict[str, Any] = {"phase": "Pending"}
        if behaviour == "unschedulable":
            message = "0/3 nodes are available: 3 Insufficient memory."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            return {**status, "conditions": [condition]}
        container: dict[str, Any] = {"name": "serve", "state": {}}
        if behaviour in WAITING:
            container["state"] = {"waiting": WAITING[behaviour]}
        if behaviour == "crash":
            container["lastState"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
            self.api.log(pod, "serve", previous=True).add("shellv: cannot load the model")
        event = {"type": "Warning", "reason": "Failed", "message": f"{behaviour}: told by the node"}
        event |= {"metadata": {"name": f"{pod}.1"}, "involvedObject": {"name": pod}}
        self.api.put("events", event)
        return {**status, "containerStatuses": [container]}

    def _put_pod(self, name: str, template: dict[str, Any], status: dict[str, Any]) -> None:
        meta = {"name": name, "labels": dict(template["metadata"]["labels"])}
        self.api.put("pods", {"kind": "Pod", "metadata": meta, "status": status})

    def _pods(self, name: str) -> list[str]:
        """The pods that are there for a Deployment, by its selector."""
        labels = self.api.objects["deployments", name]["spec"]["selector"]["matchLabels"].items()
        pods = [(key, each) for (kind, key), each in self.api.objects.items() if kind == "pods"]
        return [key for key, each in pods if labels <= each["metadata"]["labels"].items()]
