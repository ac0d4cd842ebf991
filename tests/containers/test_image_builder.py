"""The arguments that programs get, and the lock file."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.images import LockedImage, image, read_lock
from containers import build, lock
from containers.base import bootstrap_command
from containers.catalogue import IMAGES
from containers.commands import CommandError, output_of, succeeds
from containers.pip_settings import mounted, parse
from shellv_core.errors import ConfigError

DIGEST = "sha256:" + "0123456789abcdef" * 4
BUILT = {name: LockedImage(reference=f"localhost/shellv-{name}:1.2.3", digest=DIGEST) for name in IMAGES}


def test_a_build_is_one_list_of_arguments() -> None:
    mounts = ["--volume=/a:/mnt:ro"]
    command = build.build_command("podman", IMAGES["train"], "base:1", "localhost/shellv-train:1.2.3", mounts)
    assert command[:3] == ["podman", "build", "--quiet"]
    assert {"--isolation=chroot", "--layers", "--build-arg=BASE_IMAGE=base:1", *mounts} <= set(command)
    assert {"--build-arg=IMAGE=train", "--target=task", "--tag=localhost/shellv-train:1.2.3"} <= set(command)
    assert Path(command[-1]).joinpath("shellv_core").is_dir()
    # What podman's --env is given stays in the image.
    assert not [part for part in command if part.startswith("--env")]


def test_docker_gets_no_arguments_of_podman() -> None:
    command = build.build_command("docker", IMAGES["serve"], "base:1", "localhost/shellv-serve:1.2.3", [])
    assert {"--build-arg=IMAGE=serve", "--target=server"} <= set(command)
    assert not [part for part in command if part.startswith(("--isolation", "--layers", "--ignorefile", "--volume"))]


def test_a_base_is_made_of_debian_packages_without_documents() -> None:
    command = bootstrap_command(Path("/tmp/base.tar"))
    assert command[0] == "mmdebstrap"
    assert command[-2:] == ["bookworm", "/tmp/base.tar"]
    assert any("python3-venv" in part for part in command)


@pytest.mark.parametrize(
    ("registry", "reference"),
    [(None, "localhost/shellv-serve:7"), ("registry.example/team/", "registry.example/team/shellv-serve:7")],
)
def test_images_are_named_for_their_registry(
    monkeypatch: pytest.MonkeyPatch, registry: str | None, reference: str
) -> None:
    monkeypatch.setenv("SHELLV_TAG", "7")
    monkeypatch.delenv("SHELLV_REGISTRY", raising=False)
    assert build.reference_of("serve", registry) == reference


def test_settings_of_pip_are_mounted_under_other_names(tmp_path: Path) -> None:
    index, wheels = tmp_path / "mirror" / "simple", tmp_path / "wheels"
    for folder in (index, wheels):
        folder.mkdir(parents=True)
    listing = "\n".join(
        [
            f":env:.find-links='{wheels}'",
            f"global.extra-index-url='file://{index} https://wheels.example/simple'",
            "global.constraint='/etc/some/constraints.txt'",
            "global.timeout='20'",
            f"user.find-links='{wheels}'",
        ]
    )
    text, places = mounted(parse(listing))
    assert places == [wheels, index.parent]
    assert text.splitlines() == [
        "[global]",
        "find-links = /mnt/0",
        "extra-index-url = file:///mnt/1/simple https://wheels.example/simple",
        "timeout = 20",
    ]


def test_a_program_that_fails_or_is_missing_is_named() -> None:
    with pytest.raises(CommandError, match="no-such-program is not installed"):
        output_of(["no-such-program"])
    with pytest.raises(CommandError, match=r"`ls /no/such/folder` ended with code 2:\n.*No such file"):
        output_of(["ls", "/no/such/folder"])
    with pytest.raises(CommandError, match=r"was not done after 0\.1 seconds"):
        output_of(["sleep", "60"], timeout=0.1)
    assert succeeds(["true"])
    assert not succeeds(["false"])


def test_a_written_lock_names_images_by_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "images.lock.yaml"
    monkeypatch.setattr(lock, "LOCK_PATH", path)
    lock.write_lock(BUILT)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert read_lock(path).images == BUILT
    assert image("serve", path) == f"localhost/shellv-serve@{DIGEST}"
    assert "@" not in image("serve")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "run `make images`"),
        ("images: [", "not valid YAML"),
        ("- control", "a mapping of settings is expected"),
        ("images: {control: {reference: 'a:1'}}", "digest"),
        (f"images: {{control: {{reference: 'a:1', digest: '{DIGEST}'}}}}", "lacks train, serve"),
        (f"images: {{other: {{reference: 'a:1', digest: '{DIGEST}'}}}}", "other"),
        ("images: {control: {reference: 'a:1', digest: 'sha256:12'}}", "digest"),
    ],
)
def test_a_faulty_lock_is_refused_in_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "images.lock.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        image("control", path)
