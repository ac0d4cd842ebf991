"""The error tree. Every fault that a user can cause or mend raises one of these.

    ShellVError
    |- ConfigError                  a setting is unknown, missing or out of range
    |- DataError                    input rows, images or shards are not usable
    |- StorageError                 an object store or file system refused
    |  |- StorageUnreachableError   nothing answers at the endpoint
    |  |- StorageAccessError        the credentials are missing, wrong or too weak
    |  |- BucketNotFoundError
    |  |- ObjectNotFoundError
    |  |- DiskFullError
    |  `- IntegrityError            bytes differ from what the manifest recorded
    |- OutputNotEmptyError          the output location holds something else
    |- ModelError                   a model directory or its weights are not usable
    |- TrainingError                training cannot go on
    |- EvaluationError              questions or answers cannot be scored
    |- TrackingError                MLflow refused or does not answer
    |- PromotionError               a promotion cannot be decided
    |- ServingError                 the endpoint cannot start or answer
    `- ClusterError                 the Kubernetes API refused or does not answer

`Preempted` stands beside the tree: nothing is wrong, and the same command goes on.

A message says what is wrong, the value received, what is allowed and what to do.
"""

from __future__ import annotations

import re


def without_passwords(text: str) -> str:
    """`text` whose addresses have lost the user and password that they may hold."""
    return re.sub(r"://[^/@\s]+@", "://", text)


class ShellVError(Exception):
    """Base of all faults that are reported to the user as one paragraph, without a traceback."""


class ConfigError(ShellVError):
    """A setting is unknown, missing or out of range."""


class DataError(ShellVError):
    """Input rows, images or shards are not usable."""


class StorageError(ShellVError):
    """An object store or a file system refused."""


class StorageUnreachableError(StorageError):
    """Nothing answers at the endpoint."""


class StorageAccessError(StorageError):
    """The credentials are missing, wrong or too weak."""


class BucketNotFoundError(StorageError):
    """The bucket does not exist."""


class ObjectNotFoundError(StorageError):
    """The object, or the committed output that it belongs to, does not exist."""


class DiskFullError(StorageError):
    """No space is left where the output goes."""


class IntegrityError(StorageError):
    """Bytes differ from what the manifest recorded."""


class OutputNotEmptyError(ShellVError):
    """The output location holds something that this run did not write."""


class ModelError(ShellVError):
    """A model directory or its weights are not usable."""


class TrainingError(ShellVError):
    """Training cannot go on."""


class EvaluationError(ShellVError):
    """Questions or answers cannot be scored."""


class TrackingError(ShellVError):
    """MLflow refused or does not answer."""

    def __init__(self, message: str) -> None:
        super().__init__(without_passwords(message))


class PromotionError(ShellVError):
    """A promotion cannot be decided."""


class ServingError(ShellVError):
    """The endpoint cannot start or answer."""


class ClusterError(ShellVError):
    """The Kubernetes API refused or does not answer."""


class Preempted(SystemExit):
    """A signal asked a run to stop, and it can go on later; uncaught, it ends the program with `CODE`."""

    #: Means "run me again"; what a shell reports of a program that SIGTERM ended.
    CODE = 143

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = self.CODE
