"""Where tasks run on a cluster and how they reach the object store; without effect under `kfp.local`.

Everything that differs from cluster to cluster is a pipeline parameter, so that one compiled file fits all of them:
no accelerator ("0"), an empty selector and empty tolerations are skipped by Kubeflow Pipelines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kfp import kubernetes

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
CONFIG_MAP_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_REGION", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL")
SHARED_MEMORY = "8Gi"
SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108 - where data loaders and collectives look for it
RETRIES = 2
TIMEOUT_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class Placement:
    """The pipeline parameters about placement.

    Attributes:
        secret: name of a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; it may be missing.
        config_map: name of a ConfigMap with the addresses of the object store and MLflow; it may be missing.
        accelerator: resource name of the accelerator.
        num_accelerators: how many each accelerated task gets.
        node_selector: labels that the nodes of accelerated tasks must have.
        tolerations: tolerations of accelerated tasks.
    """

    secret: Any
    config_map: Any
    accelerator: Any = ""
    num_accelerators: Any = "0"
    node_selector: Any = field(default_factory=dict)
    tolerations: Any = field(default_factory=list)

    def connect(self, task: Any) -> Any:
        """Give `task` the credentials and addresses of the object store and MLflow."""
        kubernetes.use_secret_as_env(
            task, self.secret, secret_key_to_env={name: name for name in SECRET_VARIABLES}, optional=True
        )
        kubernetes.use_config_map_as_env(
            task, self.config_map, config_map_key_to_env={name: name for name in CONFIG_MAP_VARIABLES}, optional=True
        )
        return task

    def retry(self, task: Any) -> Any:
        """Retry `task` after a preemption or a fault of its services; its stage then continues."""
        return task.set_retry(RETRIES, backoff_duration="60s", backoff_factor=2.0)

    def accelerate(self, task: Any) -> Any:
        """Connect `task`, place it on accelerated nodes and retry it."""
        self.connect(task)
        task.set_accelerator_type(self.accelerator).set_accelerator_limit(self.num_accelerators)
        self.retry(task)
        kubernetes.add_node_selector_json(task, self.node_selector)
        kubernetes.add_toleration_json(task, self.tolerations)
        kubernetes.empty_dir_mount(task, "shared-memory", SHARED_MEMORY_PATH, medium="Memory", size_limit=SHARED_MEMORY)
        kubernetes.set_timeout(task, TIMEOUT_SECONDS)
        return task
