"""kfp's own client, used as its documentation says, finds in the stand-in what it would find in a server."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from kfp import Client
from kfp_server_api.exceptions import ApiException

from tests.pipelines.kfp_api_server import KfpServer, Snapshot
from tests.submit.conftest import TOKEN, pushed


@pytest.fixture
def client(kfp: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setattr(Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    return Client(host=kfp.url, existing_token=TOKEN)


def test_the_way_from_an_upload_to_the_end_of_a_run(kfp: KfpServer, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(pushed("shellv"))
    experiment = client.create_experiment("shellv")
    assert client.create_experiment("shellv").experiment_id == experiment.experiment_id
    created = client.pipelines.pipeline_service_create_pipeline({"display_name": "shellv"})
    assert client.get_pipeline_id("shellv") == created.pipeline_id
    version = client.upload_pipeline_version(str(file), "one", pipeline_name="shellv")
    with pytest.raises(ApiException, match="already exist"):
        client.upload_pipeline_version(str(file), "one", pipeline_name="shellv")
    (listed,) = client.list_pipeline_versions(created.pipeline_id).pipeline_versions
    assert listed.pipeline_version_id == version.pipeline_version_id
    found = client.get_pipeline_version(created.pipeline_id, version.pipeline_version_id)
    assert set(found.pipeline_spec) == {"pipeline_spec", "platform_spec"}

    kfp.script = [
        Snapshot("RUNNING", {"deploy": "RUNNING"}),
        Snapshot("FAILED", {"deploy": "FAILED"}, {"deploy": "no route"}),
    ]
    pinned = {"pipeline_id": created.pipeline_id, "version_id": version.pipeline_version_id}
    run = client.run_pipeline(experiment.experiment_id, "try", params={"root_uri": "s3://b"}, **pinned)
    with pytest.raises(ApiException, match="root_uri is required"):
        client.run_pipeline(experiment.experiment_id, "try", **pinned)
    end = client.wait_for_run_completion(run.run_id, timedelta(minutes=1), sleep_duration=0)
    assert end.state == "FAILED"
    assert [each.state for each in end.state_history] == ["PENDING", "RUNNING", "FAILED"]
    details = {each.display_name: each for each in end.run_details.task_details}
    assert details["deploy"].error.message == "no route"
    assert details["deploy"].end_time > details["deploy"].start_time
    assert details["deploy-driver"].state == "SUCCEEDED"

    recurring = client.create_recurring_run(
        experiment.experiment_id,
        "nightly",
        cron_expression="0 0 2 * * *",
        no_catchup=True,
        params={"root_uri": "s3://b"},
        **pinned,
    )
    assert [each.display_name for each in client.list_recurring_runs().recurring_runs] == ["nightly"]
    client.delete_recurring_run(recurring.recurring_run_id)
    assert client.list_recurring_runs().recurring_runs is None


def test_listings_come_in_pages(kfp: KfpServer, client: Client) -> None:
    for number in range(25):
        client.create_experiment(f"experiment {number}")
    names, token = [], ""
    while True:
        page = client.list_experiments(page_token=token, page_size=10)
        names += [each.display_name for each in page.experiments]
        token = page.next_page_token
        if not token:
            break
    assert names == [f"experiment {number}" for number in range(25)]
    assert client.get_experiment(experiment_name="experiment 7").display_name == "experiment 7"
