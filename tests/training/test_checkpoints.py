"""Checkpoints: what is kept, what is passed over, and that faults of the writer come to light."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading

import pytest
import torch

from shellv_core.errors import DiskFullError, StorageUnreachableError, TrainingError
from shellv_core.storage import download, join, list_uris, read_bytes, write_bytes
from shellv_core.training.checkpoints import Checkpoints, read_checkpoint
from shellv_core.training.preemption import stop_requests


def state(step, size=8):
    return {"weights.a": torch.full((size,), float(step)), "queue.b": torch.arange(step)}


def opened(directory, address=None, identity="me", keep=2):
    return Checkpoints(directory, address, identity, keep)


def test_what_is_saved_is_found_again_and_only_the_newest_are_kept(tmp_path, store_uri):
    address = f"{store_uri}/checkpoints"
    with opened(tmp_path / "a", address) as checkpoints:
        assert checkpoints.latest() is None
        for step in (5, 10, 15):
            checkpoints.save(step, state(step), {"position": {"epoch": step}})
    expected = {f"step-{step}/{name}" for step in (10, 15) for name in ("manifest.json", "meta.json")}
    expected |= {"step-10/state.safetensors", "step-15/state.safetensors", "latest.json"}
    found = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert found == expected
    assert {uri.removeprefix(f"{address}/") for uri in list_uris(address)} == expected
    pointer = {"step": 15, "directory": "step-15"}
    assert json.loads((tmp_path / "a" / "latest.json").read_bytes()) == pointer
    assert json.loads(read_bytes(f"{address}/latest.json")) == pointer
    for directory in (tmp_path / "a", tmp_path / "elsewhere"):
        with opened(directory, address) as checkpoints:
            latest = checkpoints.latest()
            assert (latest.step, latest.meta) == (15, {"position": {"epoch": 15}})
            assert all(torch.equal(each, state(15)[name]) for name, each in latest.tensors().items())
            assert set(latest.tensors()) == set(state(15))


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    weights = torch.zeros(3_000_000)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, {"weights.a": weights}, {})
        weights.fill_(7)
    assert not read_checkpoint(tmp_path / "step-1").tensors()["weights.a"].any()


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_goes(tmp_path, caplog, name, damage):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, state(5), {})
        checkpoints.save(10, state(10), {})
    path = tmp_path / "step-10" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flip" else b""
        path.write_bytes(content[:middle] + changed)
    with opened(tmp_path) as checkpoints, caplog.at_level("WARNING"):
        assert checkpoints.latest().step == 5
        assert "passing over a damaged checkpoint" in caplog.text
        assert "step-10" in caplog.text
        checkpoints.save(7, state(7), {})
    assert {path.name for path in tmp_path.iterdir()} == {"step-5", "step-7", "latest.json"}


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, state(5), {})
    (tmp_path / "step-5" / "meta.json").write_text("{}")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(5, state(5), {})
        checkpoints.save(6, state(6), {})
    assert read_checkpoint(tmp_path / "step-5").step == 5


def test_the_copy_stands_in_for_a_damaged_one(tmp_path, store_uri):
    address = join(store_uri, "checkpoints")
    with opened(tmp_path / "a", address) as checkpoints:
        checkpoints.save(5, state(5), {})
        checkpoints.save(10, state(10), {})
    (tmp_path / "a" / "step-10" / "state.safetensors").write_bytes(b"junk")
    with opened(tmp_path / "a", address) as checkpoints:
        assert checkpoints.latest().step == 10
    assert read_checkpoint(tmp_path / "a" / "step-10").step == 10
    write_bytes(f"{address}/step-10/state.safetensors", b"junk")
    shutil.rmtree(tmp_path / "a" / "step-10")
    with opened(tmp_path / "a", address) as checkpoints:
        assert checkpoints.latest().step == 5
        checkpoints.save(8, state(8), {})
    assert {uri.removeprefix(address).split("/")[1] for uri in list_uris(address)} == {
        "step-5",
        "step-8",
        "latest.json",
    }


def test_a_copy_without_its_manifest_does_not_count(tmp_path, store_uri):
    """What a kill in the middle of an upload leaves."""
    address = join(store_uri, "checkpoints")
    with opened(tmp_path / "a", address) as checkpoints:
        checkpoints.save(5, state(5), {})
    for name in ("meta.json", "state.safetensors"):
        download(f"{address}/step-5/{name}", tmp_path / name)
        write_bytes(f"{address}/step-9/{name}", (tmp_path / name).read_bytes())
    with opened(tmp_path / "b", address) as checkpoints:
        assert checkpoints.latest().step == 5
        checkpoints.save(7, state(7), {})
    assert not [uri for uri in list_uris(address) if "step-9" in uri]


def test_the_checkpoint_of_another_run_is_refused(tmp_path, store_uri):
    with opened(tmp_path / "a", store_uri) as checkpoints:
        checkpoints.save(5, state(5), {})
    for directory in (tmp_path / "a", tmp_path / "b"):
        with (
            pytest.raises(TrainingError, match="other data or settings"),
            opened(directory, store_uri, "other") as checkpoints,
        ):
            checkpoints.latest()


def test_engines_write_their_own_files(tmp_path, store_uri):
    address = join(store_uri, "checkpoints")

    def write(directory):
        (directory / "global_step3").mkdir()
        (directory / "global_step3" / "rank_0.pt").write_bytes(b"zero")
        (directory / "tag").write_text("global_step3")

    with opened(tmp_path / "a", address) as checkpoints:
        checkpoints.save_files(3, write, {"position": None})
    with opened(tmp_path / "b", address) as checkpoints:
        found = checkpoints.latest()
    assert found.directory == tmp_path / "b" / "step-3"
    assert (found.directory / "global_step3" / "rank_0.pt").read_bytes() == b"zero"


def test_files_that_could_not_be_written_leave_nothing(tmp_path):
    def write(directory):
        (directory / "half").write_text("x")
        raise KeyError("an engine's fault")

    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        with pytest.raises(KeyError):
            checkpoints.save_files(2, write, {})
        assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest.json"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_told_at_the_next_save_and_the_one_before_stays(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        with opened(small) as checkpoints:
            checkpoints.save(1, state(1), {})
            checkpoints.save(2, state(2, size=1_000_000), {})
            with pytest.raises(DiskFullError, match="Free some"):
                checkpoints.save(3, state(3), {})
            assert "step 1" in checkpoints.describe_last()
            assert {path.name for path in small.iterdir()} == {"step-1", "latest.json"}
            checkpoints.save(4, state(4), {})
        assert read_checkpoint(small / "step-4").step == 4
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_store_that_is_gone_is_told_when_waited_for(tmp_path, bucket_uri, monkeypatch):
    checkpoints = opened(tmp_path, bucket_uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    checkpoints.save(1, state(1), {})
    with pytest.raises(StorageUnreachableError), checkpoints:
        pass
    assert read_checkpoint(tmp_path / "step-1").step == 1


def test_a_fault_of_the_writer_does_not_hide_the_run_s_own(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    def run():
        with opened(tmp_path / "a", (tmp_path / "file" / "below").as_uri()) as checkpoints:
            checkpoints.save(1, state(1), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert "a checkpoint could not be written" in caplog.text


def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect():
    taken = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    try:
        with stop_requests() as request:
            assert request.signal == ""
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal == "SIGTERM"
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (request.signal, taken) == ("SIGUSR1", [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert taken == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_thread_takes_no_signals():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with stop_requests() as request:
            seen.append((signal.getsignal(signal.SIGTERM), request.signal))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, "")]
