"""Where tasks run on a cluster, with what, and how they reach its services; without effect under `kfp.local`."""

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes

from components.metadata import Kind, metadata
from pipelines.profile import Profile

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
CONFIG_MAP_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_REGION", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL")
SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108 - where data loaders and collectives look for it
SCRATCH_PATH = "/tmp"  # noqa: S108 - the one place that containers write to; their root is read-only
BACKOFF_SECONDS, BACKOFF_FACTOR, MAX_BACKOFF_SECONDS = 60, 2.0, 1800
#: The kinds whose tasks get accelerators.
ACCELERATED: tuple[Kind, ...] = ("training", "evaluation")


@dataclass(frozen=True)
class Parameter:
    """A pipeline parameter: its type, its default in a profile, and what the run form says of it."""

    type: type
    default: Any
    description: str


def parameters(profile: Profile, kinds: tuple[Kind, ...]) -> dict[str, Parameter]:
    """The pipeline parameters about placement, for a pipeline that has accelerated tasks of `kinds`."""
    common = {
        "k8s_secret": Parameter(str, profile.secret, "Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."),
        "k8s_config_map": Parameter(
            str, profile.config_map, "ConfigMap with AWS_ENDPOINT_URL, AWS_REGION and MLFLOW_TRACKING_URI."
        ),
    }
    if not kinds:
        return common
    accelerated = {
        "k8s_accelerator": Parameter(str, profile.accelerator, "Resource name of the accelerator."),
        "k8s_node_selector": Parameter(
            dict, profile.node_selector, "Labels that the nodes of accelerated tasks must have."
        ),
        "k8s_tolerations": Parameter(list, profile.toleration_values(), "Tolerations of accelerated tasks."),
        "k8s_node_affinity": Parameter(dict, profile.node_affinity, "Node affinity of accelerated tasks."),
    }
    counts = {
        f"k8s_{kind}_accelerators": Parameter(
            str, str(profile.tasks.of(kind).accelerators), f"Accelerators of each {kind} task; 0 for CPU."
        )
        for kind in kinds
    }
    job = {
        "k8s_train_job": Parameter(
            dict, profile.train_job(), "What each pod gets where training is spread over several nodes."
        )
    }
    return common | accelerated | counts | (job if "training" in kinds else {})


class Placement:
    """Gives tasks what the profile has for their kind, and the parameters what a run may change of it.

    Attributes:
        parameters: the pipeline's parameters about placement, by name.
    """

    def __init__(self, profile: Profile, parameters: dict[str, Any]) -> None:
        self.profile, self.parameters = profile, parameters

    def __call__(self, task: Any, title: str) -> Any:
        """Place `task`, which is called `title` in the UI; returns it."""
        component = metadata(task.component_spec.name.replace("-", "_"))
        settings = self.profile.tasks.of(component.kind)
        task.set_display_name(title)
        task.set_caching_options(component.cached)
        if settings.retries:
            task.set_retry(
                settings.retries,
                backoff_duration=f"{BACKOFF_SECONDS}s",
                backoff_factor=BACKOFF_FACTOR,
                backoff_max_duration=f"{MAX_BACKOFF_SECONDS}s",
            )
        task.set_cpu_request(settings.cpu).set_memory_request(settings.memory).set_memory_limit(settings.memory)
        kubernetes.set_timeout(task, round(settings.timeout_hours * 3600))
        kubernetes.empty_dir_mount(task, "scratch", SCRATCH_PATH, size_limit=settings.scratch)
        if settings.shared_memory:
            kubernetes.empty_dir_mount(
                task, "shared-memory", SHARED_MEMORY_PATH, medium="Memory", size_limit=settings.shared_memory
            )
        self._connect(task)
        self._secure(task)
        if component.kind in ACCELERATED:
            self._accelerate(task, component.kind)
        return task

    def _connect(self, task: Any) -> None:
        """Credentials and addresses; both may be missing, where nodes have an identity of their own."""
        kubernetes.use_secret_as_env(
            task,
            self.parameters["k8s_secret"],
            secret_key_to_env={name: name for name in SECRET_VARIABLES},
            optional=True,
        )
        kubernetes.use_config_map_as_env(
            task,
            self.parameters["k8s_config_map"],
            config_map_key_to_env={name: name for name in CONFIG_MAP_VARIABLES},
            optional=True,
        )
        kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")

    def _secure(self, task: Any) -> None:
        """Kubeflow Pipelines itself drops all capabilities and forbids new privileges."""
        user = self.profile.user
        kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=True)
        kubernetes.set_image_pull_policy(task, "IfNotPresent")
        if self.profile.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(self.profile.image_pull_secrets))

    def _accelerate(self, task: Any, kind: Kind) -> None:
        accelerator, count = self.parameters["k8s_accelerator"], self.parameters[f"k8s_{kind}_accelerators"]
        task.set_accelerator_type(accelerator).set_accelerator_limit(count)
        # kfp passes parameters of these two on to a task in a group only if it is told of them.
        task.register_pipeline_channels([accelerator, count])
        # Kubeflow Pipelines passes over what is empty, so that the same file runs without accelerators.
        kubernetes.add_node_selector_json(task, self.parameters["k8s_node_selector"])
        kubernetes.add_toleration_json(task, self.parameters["k8s_tolerations"])
        kubernetes.add_node_affinity_json(task, self.parameters["k8s_node_affinity"])
        if self.profile.queue:
            kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", self.profile.queue)
