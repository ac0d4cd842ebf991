"""A cluster's profile: what differs from cluster to cluster, one YAML file each in ``pipelines/profiles``.

What Kubeflow Pipelines takes when a run starts becomes the default of a pipeline parameter; the rest (times, retries,
volumes, labels) is fixed when the pipeline is compiled.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from components.metadata import Kind
from shellv_core.config import Config, merge_values, nearest, read_yaml
from shellv_core.errors import ConfigError

FOLDER = Path(__file__).parent / "profiles"
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
#: Where a pipeline deploys to; "" leaves it to the settings of the stage.
DEPLOY_TARGETS = ("", "local", "service", "kubernetes")
Size = Annotated[str, StringConstraints(pattern=r"^\d+(k|M|G|T|Ki|Mi|Gi|Ti)$")]
Cores = Annotated[str, StringConstraints(pattern=r"^\d+m?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


class Toleration(Config):
    """A taint that tasks bear, in Kubernetes' terms."""

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""

    @model_validator(mode="after")
    def _check(self) -> "Toleration":
        if self.operator == "Exists" and self.value:
            raise ValueError(f"operator Exists takes no value, but value={self.value!r} is given")
        if self.operator == "Equal" and not self.key:
            raise ValueError("operator Equal needs a key")
        return self


class TaskSettings(Config):
    """What tasks of one kind get.

    Attributes:
        timeout_hours: after which one is stopped.
        retries: after a failure or a preemption, each later than the one before; the stage then continues.
        cpu: cores that are asked for.
        memory: that is asked for, and the most that may be used.
        accelerators: of each task; the default of a pipeline parameter.
        shared_memory: size of /dev/shm, for data loaders and collectives; it counts as memory.
        scratch: size of /tmp, a volume on the node's disk that holds inputs, checkpoints and models while a task runs.
    """

    timeout_hours: float = Field(gt=0)
    retries: int = Field(default=3, ge=0)
    cpu: Cores
    memory: Size
    accelerators: int = Field(default=0, ge=0)
    shared_memory: Size | None = None
    scratch: Size


class Tasks(Config):
    """The settings of each kind of task; see ``metadata.yaml`` of the components."""

    check: TaskSettings = TaskSettings(timeout_hours=0.5, retries=0, cpu="500m", memory="4Gi", scratch="4Gi")
    control: TaskSettings = TaskSettings(timeout_hours=2, cpu="500m", memory="2Gi", scratch="10Gi")
    data: TaskSettings = TaskSettings(timeout_hours=24, cpu="2", memory="8Gi", scratch="100Gi")
    merging: TaskSettings = TaskSettings(timeout_hours=4, cpu="2", memory="16Gi", scratch="100Gi")
    training: TaskSettings = TaskSettings(
        timeout_hours=168, cpu="2", memory="16Gi", shared_memory="2Gi", scratch="100Gi"
    )
    evaluation: TaskSettings = TaskSettings(
        timeout_hours=48, cpu="2", memory="16Gi", shared_memory="2Gi", scratch="100Gi"
    )

    def of(self, kind: Kind) -> TaskSettings:
        """The settings of tasks of `kind`."""
        settings: TaskSettings = getattr(self, kind)
        return settings


class Profile(Config):
    """A cluster.

    Attributes:
        name: of the file.
        preset, overrides: settings of the stages that suit its nodes; the defaults of pipeline parameters.
        deploy_target: where champions are deployed to.
        accelerator: resource name of its accelerators.
        accelerator_gb: memory of one in 10^9 bytes, as its driver reports it; 0 for clusters that have none.
        node_selector, tolerations, node_affinity: of tasks that get accelerators, in Kubernetes' terms.
        secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
        config_map: ConfigMap with the addresses of the object store and MLflow.
        service_account: that runs are submitted with.
        image_pull_secrets: Secrets with which nodes fetch the images.
        queue: Kueue's local queue; empty for none.
        user: user and group that containers run as.
    """

    name: str
    preset: str = "nano"
    overrides: list[str] = []
    deploy_target: Literal["", "local", "service", "kubernetes"] = "kubernetes"
    accelerator: str = "nvidia.com/gpu"
    accelerator_gb: float = Field(default=0.0, ge=0.0)
    node_selector: dict[str, str] = {}
    tolerations: list[Toleration] = []
    node_affinity: dict[str, Any] = {}
    secret: Name = "shellv-storage"  # noqa: S105 - the name of a Secret
    config_map: Name = "shellv-services"
    service_account: Name = "pipeline-runner"
    image_pull_secrets: list[Name] = []
    queue: str = ""
    user: int = Field(default=10001, ge=1)
    tasks: Tasks = Tasks()

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        from shellv_core.stages.presets import PRESETS

        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; {nearest(self.preset, PRESETS)}")
        for kind in ("training", "evaluation"):
            if self.tasks.of(kind).accelerators and not self.accelerator_gb:
                raise ValueError(f"tasks.{kind}.accelerators needs accelerator_gb, the memory of one")
            if not self.tasks.of(kind).shared_memory:
                raise ValueError(f"tasks.{kind}.shared_memory is needed: data loaders and collectives use /dev/shm")
        return self

    def toleration_values(self) -> list[dict[str, str]]:
        """The tolerations as Kubernetes takes them."""
        return [{key: value for key, value in each.model_dump().items() if value} for each in self.tolerations]

    def train_job(self) -> dict[str, Any]:
        """What the pods of a training over several nodes get, as settings of `LaunchConfig`."""
        training = self.tasks.training
        values = {
            "accelerator": self.accelerator,
            "num_accelerators": training.accelerators,
            "cpu": training.cpu,
            "memory": training.memory,
            "node_selector": self.node_selector,
            "tolerations": self.toleration_values(),
            "node_affinity": self.node_affinity,
            "queue": self.queue,
            "deadline_seconds": round(training.timeout_hours * 3600),
        }
        return {name: value for name, value in values.items() if value}


def profile_names() -> list[str]:
    """The profiles that there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_profile(name: str) -> Profile:
    """The profile called `name`, or the one in a YAML file of that path.

    Raises:
        ConfigError: if there is none, with the nearest name, or it is wrong, with every wrong key.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"unknown profile {name!r}; {nearest(name, profile_names())}; or give a YAML file.")
    values = read_yaml(path)
    if "name" in values:
        raise ConfigError(f"{path}: a profile is named by its file; leave out name.")
    try:
        return merge_values(Profile(name=path.stem), values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def gigabytes(size: str) -> float:
    """A size in 10^9 bytes."""
    number = size.rstrip("kMGTi")
    return float(number) * UNITS[size[len(number) :]] / 1e9
