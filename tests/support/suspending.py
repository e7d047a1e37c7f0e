"""Runs `gorgon run` and suspends it at random moments, as Ctrl-Z or a closed lid does, for longer than its lease."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.churn import inputs_of, outputs_of, workflow
from tests.support.processes import GORGON
from tests.support.sandbox import Sandbox

LEASES = 4
"""The length of a suspension, as a multiple of the lease."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """How a suspended run ended: `wrong` lists the deviations, empty if there are none."""

    at: tuple[float, ...]
    wrong: str
    recovered: int


def suspended_run(
    folder: Path, sandbox: Sandbox, tag: str, chance: random.Random, *, lease: float = 1.0, times: int = 2
) -> Suspended:
    """Run the workflow of `churn` in a separate process, and stop and continue that process `times` times."""
    path = folder / f"{tag}.yaml"
    path.write_text(workflow(limits=chance.choice(["", "max_parallel: 3", "budget_usd: 1.0"])))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_")}
    environment |= {
        "GORGON_ENV_FILE": "",
        "GORGON_SANDBOX_URL": sandbox.url,
        "GORGON_HOME": str(folder / "home"),
        "GORGON_COMMANDS_ALLOW": "*",
        "GORGON_LEASE_SECONDS": str(lease),
    }
    inputs = [part for name, value in inputs_of(tag).items() for part in ("-i", f"{name}={_text(value)}")]
    process = subprocess.Popen(
        [*GORGON, "run", str(path), *inputs, "--json"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    moments = []
    until = time.monotonic() + 60
    while process.poll() is None and not sandbox.log(status=200) and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(times):
        moment = chance.uniform(0.0, 1.2)
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            moments.append(round(moment, 3))
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(LEASES * lease)
        os.killpg(process.pid, signal.SIGCONT)
    try:
        out, said = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Suspended(tuple(moments), "it did not end", 0)
    return Suspended(tuple(moments), _wrong(process.returncode, out, said, tag), out.count("step.recovered"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _wrong(code: int, out: str, said: str, tag: str) -> str:
    if code != 0:
        return f"exit {code}: {said[-2000:]} {out[-2000:]}"
    document = json.loads(out)
    if document["status"] != "succeeded" or document["outputs"] != outputs_of(tag):
        return f"{document['status']}: {document['outputs']}"
    odd = [step for step in document["steps"] if step["status"] not in ("succeeded", "skipped")]
    return f"steps ended as {odd}" if odd else ""
