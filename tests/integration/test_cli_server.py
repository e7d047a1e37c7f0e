"""The command line against a server: the real application and HTTP, services in memory."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner, Result

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common.cli import build
from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from gorgon_common.settings import get_settings
from tests.support.memory_services import MemoryServices

KEY = "gk_test"
HELLO = """
name: hello
inputs: {topic: {type: string, required: true}, times: {type: integer, default: 1}}
steps:
  - {id: plan, role: planner, prompt: "Plan {{inputs.topic}}"}
  - {id: build, role: builder, prompt: "Build {{plan.output}}"}
outputs: {code: "{{build.output}}"}
"""
Gorgon = Callable[..., Result]


class Finishing(MemoryServices):
    """Every run ends as `ends` says, as soon as somebody has looked at it once."""

    ends = "succeeded"
    looks = 0

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, object]:
        found = super().run(run_id, steps=steps)
        if steps and found["status"] == "queued":
            self.looks += 1
            outputs = {"code": "print()"} if self.ends == "succeeded" else None
            error = None if self.ends == "succeeded" else {"message": "`build` failed: no.", "hint": "Mend it."}
            self.finish(run_id, self.ends, outputs, error)
        return found


@pytest.fixture(scope="module")
def services() -> Finishing:
    return Finishing()


@pytest.fixture(scope="module")
def url(services: Finishing) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(services, SingleKey(KEY)), log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(autouse=True)
def fresh(services: Finishing, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    services.ends = "succeeded"
    monkeypatch.setenv("GORGON_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hello.yaml").write_text(HELLO)
    get_settings.cache_clear()


@pytest.fixture
def gorgon(url: str) -> Gorgon:
    def call(*arguments: str) -> Result:
        return CliRunner().invoke(build(), [*arguments, "--server", url])

    return call


def test_run_to_its_end(gorgon: Gorgon) -> None:
    result = gorgon("run", "hello.yaml", "-i", "topic=tea", "-i", "times=3")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith("queued  hello")
    assert any(line.startswith("build  succeeded") for line in lines)
    assert "✓ hello succeeded" in result.stdout
    assert "code  print()" in result.stdout


def test_json_is_one_document_of_the_published_shape(gorgon: Gorgon) -> None:
    result = gorgon("run", "hello.yaml", "-i", "topic=tea", "--json")
    assert result.exit_code == 0, result.output
    run = schemas.Run.model_validate_json(result.stdout)
    assert run.status == "succeeded"
    assert [step.id for step in run.steps or ()] == ["plan", "build"]
    assert result.stderr == ""


def test_a_failed_run_is_1_and_says_how_to_resume(gorgon: Gorgon, services: Finishing, url: str) -> None:
    services.ends = "failed"
    result = gorgon("run", "hello.yaml", "-i", "topic=tea")
    assert result.exit_code == 1
    assert "✗ hello failed" in result.stdout
    assert "`build` failed: no." in result.stdout
    assert "Mend it." in result.stdout
    assert f"--server {url}" in result.stdout


def test_detach_is_0_and_prints_the_id(gorgon: Gorgon) -> None:
    result = gorgon("run", "hello.yaml", "-i", "topic=tea", "--detach")
    assert result.exit_code == 0
    assert result.stdout.strip().startswith("run_")
    assert "gorgon runs watch" in result.stderr


def test_a_bundled_workflow_by_name(gorgon: Gorgon) -> None:
    assert gorgon("run", "feature-build", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hello.yaml"], "`topic` is missing"),
        (["hello.yaml", "-i", "topic=a", "-i", "times=many"], "must be an integer"),
        (["hello.yaml", "-i", "topic=a", "-i", "tpic=b"], "tpic"),
        (["gone.yaml"], "There is no file gone.yaml"),
        (["goone"], "There is no bundled workflow"),
    ],
)
def test_bad_input_is_2_and_starts_nothing(
    gorgon: Gorgon, services: Finishing, arguments: list[str], told: str
) -> None:
    before = len(services.runs(limit=200)["items"])
    result = gorgon("run", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert len(services.runs(limit=200)["items"]) == before


def test_an_invalid_file_is_told_with_its_lines(gorgon: Gorgon, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(HELLO.replace("plan.output", "plam.output"))
    result = gorgon("run", "bad.yaml", "-i", "topic=a")
    assert result.exit_code == 2
    assert "6:" in result.stderr
    assert "did you mean `plan`" in result.stderr.lower()


def test_runs_ls_show_watch_logs_cancel_resume(gorgon: Gorgon, services: Finishing) -> None:
    run_id = json.loads(gorgon("run", "hello.yaml", "-i", "topic=tea", "--json").stdout)["run_id"]
    listed = schemas.RunPage.model_validate_json(gorgon("runs", "ls", "--json").stdout)
    assert listed.items[0].run_id == run_id
    assert run_id in gorgon("runs", "ls").stdout
    assert json.loads(gorgon("runs", "show", run_id, "--json").stdout)["run_id"] == run_id
    assert "✓ build" in gorgon("runs", "show", "last").stdout
    assert json.loads(gorgon("runs", "show", run_id, "--step", "plan", "--json").stdout)["id"] == "plan"
    assert "plan  succeeded" in gorgon("runs", "show", run_id, "--step", "plan").stdout
    missing = gorgon("runs", "show", run_id, "--step", "plam")
    assert (missing.exit_code, "plan, build" in missing.stderr) == (2, True)
    assert gorgon("runs", "watch", run_id).exit_code == 0
    kinds = [event["kind"] for event in json.loads(gorgon("runs", "logs", run_id, "--json").stdout)]
    assert (kinds[0], kinds[-1]) == ("run.queued", "run.succeeded")
    assert "run.succeeded" in gorgon("runs", "logs", run_id, "--follow").stdout
    assert gorgon("runs", "cancel", run_id).exit_code == 2
    resumed = gorgon("runs", "resume", run_id, "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["run_id"] != run_id


def test_an_unknown_run(gorgon: Gorgon) -> None:
    result = gorgon("runs", "show", "run_nope")
    assert result.exit_code == 2
    assert "There is no run" in result.stderr


def test_a_wrong_key_names_the_variable(gorgon: Gorgon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GORGON_API_KEY", "wrong")
    get_settings.cache_clear()
    result = gorgon("runs", "ls")
    assert result.exit_code == 2
    assert "refused the API key" in result.stderr
    assert "GORGON_API_KEY" in result.stderr


def test_an_unreachable_server_and_one_that_is_no_url() -> None:
    result = CliRunner().invoke(build(), ["runs", "ls", "--server", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "cannot be reached" in result.stderr
    result = CliRunner().invoke(build(), ["runs", "ls", "--server", "localhost:8000"])
    assert result.exit_code == 2
    assert "not a URL" in result.stderr


def test_the_stream_of_events_wakes_and_ends(url: str, services: Finishing) -> None:
    with Client(url, api_key=KEY) as client:
        run_id = client.submit(source=HELLO, inputs={"topic": "tea"})["run_id"]
        timer = threading.Timer(0.1, services.finish, (run_id,))
        timer.start()
        kinds = [event["kind"] for event in client.events(run_id)]
        timer.join()
    assert kinds[-1] == "run.succeeded"
