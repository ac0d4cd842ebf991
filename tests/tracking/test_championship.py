"""Moves of the alias `champion` on real MLflow: their records, the way back, and one process at a time."""

import getpass
import subprocess
import sys
import threading

import pytest

from shellv_core.errors import PromotionError, TrackingError
from shellv_core.tracking import lock
from shellv_core.tracking.championship import (
    PREVIOUS_TAG,
    ROLLED_BACK_TAG,
    actor,
    hand_over,
    moves,
    roll_back,
)
from shellv_core.tracking.lock import exclusive
from shellv_core.tracking.registry import CHAMPION, ModelRegistry, registered_models
from shellv_core.tracking.runs import open_client

NAME = "shellv-test"


@pytest.fixture
def registry(tracking_service):
    """Three versions, each of which took over from the one before."""
    registry = ModelRegistry(NAME)
    for number in ("1", "2", "3"):
        registry.register(f"s3://b/{number}", f"f{number}", f"c{number}", {})
        hand_over(registry, str(int(number) - 1) if number > "1" else "", number, "promotion", "passed the gate")
    yield registry
    open_client().delete_registered_model(NAME)


def champion(registry):
    return registry.find(CHAMPION).version


def servable(version):
    """Any version will do."""


def test_back_step_by_step_with_a_record_of_each(registry, monkeypatch):
    roll_back(registry, None, "it stutters", servable)
    monkeypatch.setenv("KFP_RUN_ID", "0b5c")
    move, target = roll_back(registry, None, "so does this", servable)
    assert (target.version, champion(registry)) == ("1", "1")
    assert (move.before, move.after, move.by, move.reason) == ("2", "1", "pipeline run 0b5c", "so does this")
    told = [(each.kind, each.before, each.after) for each in moves(registry)]
    assert told == [
        ("promotion", "", "1"),
        ("promotion", "1", "2"),
        ("promotion", "2", "3"),
        ("rollback", "3", "2"),
        ("rollback", "2", "1"),
    ]
    assert moves(registry)[3].by.startswith(getpass.getuser())
    assert registry.get("3").tags[ROLLED_BACK_TAG].endswith(": it stutters")
    with pytest.raises(PromotionError, match="version 1 of 'shellv-test' took over from none"):
        roll_back(registry, None, "", servable)
    # Promoted again, a version is in good standing again.
    hand_over(registry, "1", "3", "override", "fixed the prompt")
    assert ROLLED_BACK_TAG not in registry.get("3").tags
    assert registry.get("3").tags[PREVIOUS_TAG] == "1"


def test_back_to_a_named_version(registry):
    with pytest.raises(PromotionError, match="has no version '7'; it has 1, 2, 3"):
        roll_back(registry, "7", "", servable)
    with pytest.raises(PromotionError, match="version 3 of 'shellv-test' is the champion already"):
        roll_back(registry, "3", "", servable)
    assert roll_back(registry, "1", "", servable)[1].version == "1"
    # 2 may serve: it was not rolled back itself. 3 was, and 2 does not lead there.
    assert ROLLED_BACK_TAG not in registry.get("2").tags


def test_a_version_that_cannot_be_served_changes_nothing(registry):
    def gone(version):
        raise PromotionError(f"version {version.version} is gone")

    with pytest.raises(PromotionError, match="version 2 is gone"):
        roll_back(registry, None, "", gone)
    assert champion(registry) == "3"
    assert len(moves(registry)) == 3
    assert ROLLED_BACK_TAG not in registry.get("3").tags


def test_a_champion_that_changes_meanwhile_is_left_alone(registry):
    def slow_check(version):
        hand_over(registry, "3", "1", "override", "meanwhile")

    with pytest.raises(PromotionError, match="has changed from version 3 to 1 in the meantime"):
        roll_back(registry, None, "", slow_check)
    assert champion(registry) == "1"


def test_no_way_back(registry):
    hand_over(registry, "3", "2", "rollback", "bad")
    hand_over(registry, "2", "1", "override", "try this")
    registry.set_tags("1", {PREVIOUS_TAG: "3"})
    with pytest.raises(PromotionError, match=r"version 3 .* was itself rolled back \(.*: bad\)"):
        roll_back(registry, None, "", servable)
    open_client().delete_model_version(NAME, "3")
    with pytest.raises(PromotionError, match=r"version 3 .* is deleted.*Name another with --to"):
        roll_back(registry, None, "", servable)
    with pytest.raises(PromotionError, match="'nobody' has no champion"):
        roll_back(ModelRegistry("nobody"), None, "", servable)


def test_a_user_without_a_name(monkeypatch):
    monkeypatch.delenv("KFP_RUN_ID", raising=False)
    monkeypatch.setattr(getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("getpwuid(): uid not found")))
    assert actor().partition("@")[0].isdigit()


HOLD = """
import sys
from shellv_core.tracking.lock import exclusive

with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tracking_store):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_others_wait_for_the_holder(holder, caplog):
    caplog.set_level("INFO")
    waited = threading.Event()
    caplog.handler.emit = lambda record, emit=caplog.handler.emit: (emit(record), waited.set())
    thread = threading.Thread(target=lambda: (waited.wait(200), holder.stdin.close()))
    thread.start()
    with exclusive(NAME):
        assert holder.wait(200) == 0, "it has let go, and ended"
        assert registered_models() == [], "the lock is not shown"
    thread.join()
    assert "waiting for" in caplog.text
    assert open_client().search_registered_models() == []


def test_a_dead_holder_is_put_aside(holder, monkeypatch, caplog):
    holder.kill()
    holder.wait()
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    with exclusive(NAME) as still_held:
        still_held()
    assert "removing the lock of 'shellv-test'" in caplog.text
    assert open_client().search_registered_models() == []


def test_a_lock_that_was_taken_away_stops_the_write(tracking_store):
    with exclusive(NAME) as still_held:
        open_client().delete_registered_model(NAME + ".lock")
        with pytest.raises(TrackingError, match=r"was taken away.*run this again"):
            still_held()


def test_patience_ends(holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    with pytest.raises(TrackingError, match=r"is being changed by .*delete the registered model 'shellv-test.lock'"):
        exclusive(NAME).__enter__()
