"""Settings of the sources of rows, one class a format.

Every address is a local path, a ``file://`` or an ``s3://`` URI. Annotations may end in ``.gz``. Images lie in a
folder, below an ``s3://`` prefix, or in a ``.zip`` or uncompressed ``.tar`` on either (``photos.zip/train`` is its
folder ``train``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shellv_core.config import Config

Prefix = Annotated[str, Field(pattern="^[A-Za-z_]+$")]  # begins the keys of a source's samples


class LlavaSource(Config):
    """LLaVA's rows (pretrain and instruct), HACL's, or rows of this project: a JSON list, or JSON objects in a row.

    Beside LLaVA's ``id, image, conversations`` a row may have a ``caption`` (HACL: ``text``) and
    ``hallucinated_captions`` (HACL: ``Hallucination caption``). A row with a caption and no conversation gets one.
    """

    format: Literal["llava"] = "llava"
    prefix: Prefix = "row"
    annotations: str
    images: str
    answers_are_captions: bool = False  # the answer of a row's only exchange is its caption (LLaVA's pretraining lists)


class HalEvalSource(Config):
    """Hal-Eval's list: a caption and four lies an image, named ``image`` (a path) or ``image_path`` (file name counts).

    ``image_path`` names a place on its authors' disk, so only its last part is looked up in `images`.
    """

    format: Literal["hal_eval"] = "hal_eval"
    prefix: Prefix = "hal_eval"
    annotations: str
    images: str


class CocoSource(Config):
    """COCO: one sample an image, a conversation each caption, and the objects where `instances` is given."""

    format: Literal["coco"] = "coco"
    prefix: Prefix = "coco"
    captions: str  # captions_train2017.json or the like
    instances: str | None = None  # instances_train2017.json or the like
    images: str


class TsvSource(Config):
    """Tab-separated lines of a caption and an image's path, as CC3M's tools write them; no quoting."""

    format: Literal["tsv"] = "tsv"
    prefix: Prefix = "tsv"
    annotations: str
    images: str
    header: bool = False  # whether the first line names the columns
    caption_column: int | str = 0  # position from 0, or name where there is a header
    image_column: int | str = 1


class FolderSource(Config):
    """A folder of images, at any depth, each beside a file of the same stem that describes it.

    ``.json`` holds a row as in `LlavaSource`; ``.txt`` and ``.caption`` hold a caption. Names that begin with a dot
    are passed over, and links to folders are not followed.
    """

    format: Literal["folder"] = "folder"
    prefix: Prefix = "folder"
    folder: str


class ParquetSource(Config):
    """A Parquet or Arrow file, a folder of them, or a Hugging Face data set's (``save_to_disk``, a download, a cache).

    An image is the struct ``{bytes, path}`` of Hugging Face, or plain bytes. With `images` set its path counts instead,
    the struct's or a column of paths.
    """

    format: Literal["parquet"] = "parquet"
    prefix: Prefix = "parquet"
    files: str
    pattern: str = "*"  # which files of the folder, for example train-*; matched with the path and with the name
    images: str | None = None  # what the rows' image paths are relative to; None where the table holds the bytes
    id_column: str = "id"
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("caption", "text")  # the first that is there; a text or a list of texts
    conversations_column: str = "conversations"


class WebDatasetSource(Config):
    """WebDataset tars: those of img2dataset (``jpg, txt, json``) and this project's own shards.

    A ``json`` member with conversations counts as a row of `LlavaSource`; else ``txt``, or the caption in ``json``.
    """

    format: Literal["webdataset"] = "webdataset"
    prefix: Prefix = "web"
    tars: str  # one tar, or a folder or prefix with tars at any depth
    pattern: str = "*.tar"


SourceConfig = Annotated[
    LlavaSource | HalEvalSource | CocoSource | TsvSource | FolderSource | ParquetSource | WebDatasetSource,
    Field(discriminator="format"),
]
