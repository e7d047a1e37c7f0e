"""Secrets that enter in every way that there is, and replies that would steer a terminal: nothing of it is shown."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import re
import select
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg import sql
from typer.testing import CliRunner

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common.cli import build
from gorgon_common.masking import MASK
from gorgon_common.settings import get_settings, load
from tests.support.model_server import ModelServer, Say, model_server
from tests.support.processes import Process, cluster
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

GORGON = [sys.executable, "-m", "gorgon_common.cli"]
PEM_LINES = [f"MIIEvQ{letter * 58}" for letter in "ABC"]
PEM = "-----BEGIN PRIVATE KEY-----\n" + "\n".join(PEM_LINES) + "\n-----END PRIVATE KEY-----\n"

KEYS = {
    "OPENAI_API_KEY": "sk-proj-canary-openai-0001",
    "GORGON_API_KEY": "gk_canary-of-the-api-0003",
    "GITHUB_TOKEN": "ghp_canary0004github",
    "BILLING_SERVICE_TOKEN": "tok-canary-0005-billing",
    "HTTPS_PROXY": "http://me:canary0006proxy@127.0.0.1:9",
    "GORGON_REDIS_URL": "redis://:canary0007redis@127.0.0.1:9/0",
}
DECLARED = {
    "PLAIN": "canary-0008-plain",
    "ENCODED": "canary/0009+encoded==",
    "HEXED": "canary-0010-hexed",
    "QUOTED": 'canary "0011" it\'s <é>',
    "FOLDED": "canary-0012-" + "folded" * 20,
    "PRIVATE_KEY": PEM,
    "ACCOUNT": json.dumps(
        {"type": "service_account", "private_key": "canary-0014-in-json", "client_email": "me@x.org"}
    ),
    "IN_ERRORS": "canary-0015-stderr",
    "IN_FILE": "canary-0016-from-a-file",
    "LAST_WORDS": "canary-0017-last-words",
    "ECHOED": "canary-0018-by-the-model",
    "BASIC": "canary-0019-basic",
}
FROM_FILE = {"ANTHROPIC_API_KEY": "sk-ant-canary-0002-file"}
UNKNOWN = "canary0020unregistered"
CANARIES = [
    *(value for name, value in KEYS.items() if "://" not in value),
    *("canary0006proxy", "canary0007redis", "canary-0014-in-json", UNKNOWN),
    *(value for name, value in DECLARED.items() if name not in ("PRIVATE_KEY", "ACCOUNT")),
    *(*PEM_LINES, *FROM_FILE.values()),
]

PRINTS = """
name: Prints
secrets: [PLAIN, ENCODED, HEXED, QUOTED, FOLDED, PRIVATE_KEY, ACCOUNT, IN_ERRORS, IN_FILE, LAST_WORDS, ECHOED, BASIC]
steps:
  - id: prints
    env:
      PLAIN: "{{secrets.PLAIN}}"
      ENCODED: "{{secrets.ENCODED}}"
      HEXED: "{{secrets.HEXED}}"
      QUOTED: "{{secrets.QUOTED}}"
      FOLDED: "{{secrets.FOLDED}}"
      PRIVATE_KEY: "{{secrets.PRIVATE_KEY}}"
      ACCOUNT: "{{secrets.ACCOUNT}}"
      IN_ERRORS: "{{secrets.IN_ERRORS}}"
      BASIC: "{{secrets.BASIC}}"
    run: [python3, PRINTER]
  - {id: reads, depends_on: prints, run: [cat, FILE]}
  - {id: asks, provider: openai, model: gpt-5, prompt: "Say it: {{prints.output}} {{prints.stderr}} {{reads.output}}"}
  - id: ends
    depends_on: asks
    env: {LAST_WORDS: "{{secrets.LAST_WORDS}}"}
    run: [sh, -c, "printenv LAST_WORDS >&2; exit 3"]
outputs: {printed: "{{prints.output}}", said: "{{asks.output}}"}
"""
PRINTER = r"""
import base64, json, os, sys, textwrap, urllib.parse
env = os.environ
print("PLAIN is", env["PLAIN"])
print(base64.b64encode(env["ENCODED"].encode()).decode(), urllib.parse.quote(env["ENCODED"], safe=""))
print(env["HEXED"].encode().hex(), env["HEXED"].encode().hex().upper())
print(json.dumps({"q": env["QUOTED"]}), json.dumps(json.dumps([env["QUOTED"]])), repr(env["QUOTED"]))
print("\n    ".join(textwrap.wrap(env["FOLDED"], 50)))
print(base64.encodebytes(env["FOLDED"].encode()).decode())
print(env["PRIVATE_KEY"], json.dumps(env["PRIVATE_KEY"]), env["PRIVATE_KEY"].splitlines()[2])
print(env["ACCOUNT"], json.loads(env["ACCOUNT"])["private_key"])
print("Authorization: Basic", base64.b64encode(("me:" + env["BASIC"]).encode()).decode())
print("> POST https://me:canary0020unregistered@example.org/?api_key=canary0020unregistered")
print("IN_ERRORS", env["IN_ERRORS"], file=sys.stderr)
pid = os.getppid()
for _ in range(3):  # the supervisor, the worker: what they were started with
    with open(f"/proc/{pid}/environ", errors="replace") as file:
        print(file.read().replace("\0", "\n"))
    with open(f"/proc/{pid}/stat") as file:
        pid = int(file.read().rpartition(")")[2].split()[1])
    if pid <= 1:
        break
"""


def shown(text: str) -> list[str]:
    """The canaries that are in a text, in any form that the printer uses."""
    flat = re.sub(r"\s|\\n", "", text)
    return [canary for canary in CANARIES if any(form in text or form in flat for form in forms(canary))]


def forms(canary: str) -> Iterator[str]:
    data = canary.encode()
    yield from (canary, data.hex(), data.hex().upper(), quote(canary, safe=""), json.dumps(canary)[1:-1])
    yield json.dumps(json.dumps(canary))[3:-3]
    for before in (b"", b"m", b"me"):
        yield base64.b64encode(before + b":" * bool(before) + data).decode()[4:-4]


def dump(path: Path) -> str:
    """Everything that is in a SQLite file: every row, and every byte of the file and of its log."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = "\n".join(connection.iterdump())
    return rows + "".join(file.read_bytes().decode("utf-8", "replace") for file in path.parent.glob("gorgon.db*"))


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ModelServer) -> Path:
    """A folder with the files of this module, and an environment with every secret."""
    (tmp_path / "printer.py").write_text(PRINTER)
    (tmp_path / "secret.txt").write_text(DECLARED["IN_FILE"])
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in FROM_FILE.items()), encoding="utf-16")
    text = PRINTS.replace("PRINTER", str(tmp_path / "printer.py")).replace("FILE]", f"{tmp_path}/secret.txt]")
    (tmp_path / "prints.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GORGON_ENV_FILE")
    for name, value in {**KEYS, **DECLARED}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "*")
    monkeypatch.setenv("GORGON_LOG_LEVEL", "debug")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    get_settings.cache_clear()
    return tmp_path


def gorgon(*arguments: str, code: int = 0) -> str:
    """What a command prints, of which a later one may take the run `last`."""
    done = CliRunner().invoke(build(), arguments, prog_name="gorgon")
    assert done.exit_code == code, done.output
    return done.output


def answers(home: Path, run_id: str) -> Iterator[str]:
    """What the API says of a run, and of everything else that it knows."""
    settings = load().model_copy(update={"redis_url": None, "broker_url": "gmem://"})
    services = build(settings)
    paths = [f"/v1/runs/{run_id}{end}" for end in ("", "?expand=steps", "/steps", "/explain", "/events?follow=false")]
    paths += ["/v1/runs", "/v1/costs", "/v1/costs/calls", "/v1/health", "/health/ready", "/openapi.json", "/v1/runs/no"]
    try:
        with TestClient(create_app(services, SingleKey("k")), headers={"X-API-Key": "k"}) as http:
            for path in paths:
                answer = http.get(path)
                yield answer.text + str(answer.headers)
            wrong = f"name: x\nsteps:\n  - {{id: a, prompt: {DECLARED['PLAIN']}, colour: 1}}\n"
            yield http.post("/v1/runs", json={"source": wrong}).text
    finally:
        services.close()


def looked_at() -> Iterable[str]:
    """Every command that shows a run to people or machines."""
    views = ["show last", "show last --full", "show last --step prints --full", "show last --step ends"]
    views += ["show last --json", "logs last", "logs last --json", "explain last", "ls", "ls --json"]
    for view in views:
        yield gorgon("runs", *view.split())
    yield gorgon("costs", "report", "--calls", "--csv")
    yield gorgon("costs", "report", "--calls", "--json")


def test_no_secret_is_shown_stored_or_sent(folder: Path, server: ModelServer, tmp_path: Path) -> None:
    said = " ".join([DECLARED["ECHOED"], KEYS["OPENAI_API_KEY"], DECLARED["QUOTED"]])
    server.say(Say(reply={"text": said, "usage": {"input": 1, "output": 1}}))
    done = subprocess.run(
        [*GORGON, "run", "prints.yaml", "--live"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "ends" in done.stdout
    run_id = json.loads(gorgon("runs", "ls", "--json"))["items"][0]["run_id"]
    steps = {step["id"]: step for step in json.loads(gorgon("runs", "show", run_id, "--json"))["steps"]}
    assert steps["prints"]["output"].startswith(f"PLAIN is {MASK}\n")
    assert f"https://me:{MASK}@example.org/?api_key={MASK}" in steps["prints"]["output"]
    assert steps["reads"]["output"] == MASK
    assert steps["asks"]["output"] == " ".join([MASK] * 3)
    assert MASK in steps["ends"]["error"]["message"]
    (asked,) = server.seen
    assert MASK in json.dumps(asked.body)
    found = {
        "run": shown(done.stdout + done.stderr),
        "prompt": shown(json.dumps(asked.body, ensure_ascii=False)),
        "database": shown(dump(tmp_path / "home" / "gorgon.db")),
        "commands": shown("\n".join(looked_at())),
        "api": shown("\n".join(answers(tmp_path / "home", run_id))),
        "doctor": shown(CliRunner().invoke(build(), ["doctor"], prog_name="gorgon").output),
    }
    assert found == {place: [] for place in found}


def test_the_search_finds_what_is_shown() -> None:
    """The negative control: each canary, as the printer writes it."""
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    environment = {**os.environ, **KEYS, **DECLARED}
    command = [sys.executable, "-c", parent, PRINTER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert {*shown(done.stdout + done.stderr)} == {*CANARIES} - {*FROM_FILE.values()}


@pytest.mark.parametrize("where", ["message", "cut"])
def test_a_key_that_a_provider_echoes(folder: Path, server: ModelServer, tmp_path: Path, where: str) -> None:
    (folder / "asks.yaml").write_text(
        "name: Asks\nsteps:\n  - {id: a, provider: openai, model: gpt-5, prompt: hello, max_retries: 0}\n"
    )
    padding = "x " * (140 if where == "cut" else 1)  # the message is cut in the middle of the key
    said = f"{padding}Incorrect API key provided: {KEYS['OPENAI_API_KEY']}. Header: Authorization: Bearer {UNKNOWN}"
    body = {"error": {"message": said, "type": "invalid_request_error", "code": "invalid_api_key"}}
    server.say(*(Say(status=401, raw=json.dumps(body).encode()) for _ in range(2)))
    text = gorgon("run", "asks.yaml", "--live", code=1)
    text += gorgon("run", "asks.yaml", "--live", "--json", code=1)
    for view in ("show last --json", "show last", "logs last", "explain last"):
        text += gorgon("runs", *view.split())
    for part in (text, dump(tmp_path / "home" / "gorgon.db")):
        assert shown(part) == []
        assert "sk-proj-canary" not in part
        assert "does not accept the API key" in part


def test_a_secret_in_an_input_or_a_workflow_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "w.yaml").write_text(
        "name: W\nsecrets: [PLAIN]\ninputs: {x: {type: string, default: a}}\n"
        "steps:\n  - {id: a, run: [echo, '{{inputs.x}}']}\n"
    )
    told = gorgon("run", "w.yaml", "-i", f"x={DECLARED['PLAIN']}", code=2)
    assert "The input `x` contains the value of the secret PLAIN." in told
    assert "secrets:" in told
    (folder / "v.yaml").write_text(f"name: V\nsteps:\n  - {{id: a, run: [echo, '{KEYS['GITHUB_TOKEN']}']}}\n")
    told += gorgon("run", "v.yaml", code=2)
    assert "The workflow contains the value of the secret GITHUB_TOKEN." in told
    assert shown(told + dump(tmp_path / "home" / "gorgon.db")) == []


def test_a_secret_too_short_to_be_masked_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN", "4711")
    (folder / "w.yaml").write_text(
        'name: W\nsecrets: [PIN]\nsteps:\n  - {id: a, env: {PIN: "{{secrets.PIN}}"}, run: [printenv, PIN]}\n'
    )
    told = gorgon("run", "w.yaml", code=1)
    assert "The secret PIN is too short" in told
    assert "4711" not in told


def test_a_traceback_shows_no_secret(folder: Path) -> None:
    code = "from gorgon_common.cli import streams; streams.prepare(); from gorgon_common.settings import load; load()\n"
    code += "import os, threading\ndef fail(): raise ValueError('\\x1b[2J' + os.environ['GITHUB_TOKEN'])\n"
    code += "thread = threading.Thread(target=fail); thread.start(); thread.join(); fail()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.count(rf"ValueError: \x1b[2J{MASK}") == 2
    assert shown(done.stderr) == []


HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x1b\\",
    "clear": "\x1b[2J\x1b[H",
    "link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "c1": "\x9b2J\x9d0;owned\x9c\x90q\x9c",
    "erase": "good\b\b\b\bevil\x7f",
    "return": "fine\rhidden",
    "bidi": "\u202eevil\u2066 \u200f\u061c",
    "invisible": "a\u200bb\ufeffc\U000e0041",
    "separator": "one\u2028two\u2029three\x85four",
    "markup": "[red]red[/red] [link=https://evil.example]click[/link] [/] [bold",
    "null": "a\x00b",
}
STEERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0041]"
)
OURS = re.compile(r"\x1b\[[0-9;?]*[mAKhlJG]|\r")
"""What rich and the live tree write: styles, cursor up, erase line."""


ONE_AFTER_ANOTHER = """
import sys
from gorgon_common.cli import build, streams
from tests.support.services import build
streams.prepare()
for command in sys.argv[1:]:
    try:
        build()(command.split(), prog_name="gorgon")
    except SystemExit:
        pass
"""


def on_a_terminal(*commands: str) -> str:
    """What commands write to a terminal of 80 columns."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"}
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, *commands],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=environment,
    )
    os.close(secondary)
    written = bytearray()
    with contextlib.closing(os.fdopen(primary, "rb", buffering=0)) as terminal:
        while select.select([terminal], [], [], 60)[0]:
            try:
                chunk = terminal.read(65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            written += chunk
    process.wait(60)
    return written.decode("utf-8", "replace")


def test_what_a_model_writes_does_not_steer_the_terminal(folder: Path, server: ModelServer) -> None:
    hostile = " | ".join(HOSTILE.values())
    (folder / "asks.yaml").write_text(
        "name: Asks\nsteps:\n"
        "  - {id: a, provider: openai, model: gpt-5, prompt: x}\n"
        '  - {id: b, env: {T: "{{truncate(a.output, 400)}}"}, run: [printenv, T], depends_on: a}\n'
        "  - {id: c, provider: openai, model: gpt-5, prompt: y, depends_on: b, max_retries: 0}\n"
        'outputs: {o: "{{a.output}}"}\n'
    )
    error = {"error": {"message": hostile, "type": "invalid_request_error"}}
    server.say(
        Say(reply={"text": hostile.replace("\0", ""), "model": "gpt-5\x1b]0;owned\x07", "usage": {"input": 1}}),
        Say(status=400, raw=json.dumps(error).encode()),
    )
    views = ["runs show last --full", "runs show last --step a", "runs logs last", "runs explain last", "runs ls"]
    screen = on_a_terminal("run asks.yaml --live", *views, "costs report --calls", "costs top")
    text = OURS.sub("", screen)
    assert "\x1b" not in text, re.findall("\x1b.{10}", text)
    assert STEERS.findall(text) == []
    for sign in (r"\x1b]52;c;", r"\x9b2J", r"\u202eevil", "[red]red[/red]", "[link=https://evil.example]"):
        assert sign in re.sub(r"\s+", "", text), sign
    document = json.loads(gorgon("runs", "show", "last", "--json"))
    step = next(step for step in document["steps"] if step["id"] == "a")
    assert step["output"] == hostile.replace("\0", "")  # exact
    assert STEERS.findall(gorgon("runs", "show", "last", "--json")) == []


def test_a_server_logs_no_secret_and_ends_when_told(folder: Path) -> None:
    environment = {name: value for name, value in KEYS.items() if name != "GORGON_REDIS_URL"}
    environment |= {"GORGON_HOME": str(folder / "home"), "GORGON_LOG_LEVEL": "debug", "GORGON_ENV_FILE": ".env"}
    process = Process("api", "--port", "0", ready="Gorgon API at", environment=environment)
    try:
        process.wait_ready()
        url = re.findall(r"http://\S+", process.line)[0]
        headers = {"X-API-Key": KEYS["GORGON_API_KEY"]}
        source = f"name: {KEYS['GITHUB_TOKEN']}\nsteps: [{{id: a, prompt: x}}]"
        with httpx2.Client(base_url=url, headers=headers, trust_env=False) as http:
            answers = [
                http.post("/v1/runs", json={"source": source}),
                http.get(f"/v1/runs/{KEYS['BILLING_SERVICE_TOKEN']}"),
                http.get("/v1/runs", params={"workflow": KEYS["GITHUB_TOKEN"], "limit": "x" + KEYS["OPENAI_API_KEY"]}),
            ]
        assert [answer.status_code for answer in answers] == [422, 404, 422]
        assert shown("".join(answer.text for answer in answers)) == []
        assert MASK in answers[1].text
    finally:
        process.terminate()
    assert process._process.returncode == 0
    assert shown("".join(process.said)) == []


def test_a_worker_process_on_postgresql_stores_and_logs_no_secret(
    folder: Path, postgres_url: str, redis_url: str, sandbox: Sandbox
) -> None:
    text = (folder / "prints.yaml").read_text()
    with cluster(postgres_url, redis_url, sandbox, folder / "home") as lab:
        worker = lab.worker()
        ran = lab.wait(lab.services.submit(lab.services.read(text)[0], {}).run_id, within=60)
        assert ran.output("prints").startswith(f"PLAIN is {MASK}\n")
        assert MASK in ran.error["message"]
        document = json.dumps([ran.document, ran.events], ensure_ascii=False)
    with psycopg.connect(postgres_url) as connection:
        names = connection.execute("select tablename from pg_tables where schemaname = 'public'").fetchall()
        rows = [
            str(row)
            for (name,) in names
            for row in connection.execute(sql.SQL("select t::text from {} t").format(sql.Identifier(name))).fetchall()
        ]
    assert len(rows) > 10
    assert shown("\n".join(rows)) == []
    assert shown(document) == []
    assert shown("".join(worker.said)) == []
