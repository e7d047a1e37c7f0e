"""`python -m gorgon_api.sandbox`: serve until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from gorgon_api.sandbox.app import App, objects
from gorgon_api.sandbox.faults import Fault, Faults, parse_duration
from gorgon_api.sandbox.http import Server
from gorgon_api.sandbox.limits import Limit, Limits
from gorgon_api.sandbox.log import Log
from gorgon_api.sandbox.model_service import ModelService

PARENT_CHECK = 0.25
"""Seconds between two checks whether the parent is still alive."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; exits with 2 if it is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m gorgon_api.sandbox", description="Simulated model providers on loopback; see docs/sandbox.md."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=int, default=8900, help="0 takes a free port (default: 8900)")
    parser.add_argument(
        "--seed", type=int, default=None, help="the same seed gives the same replies (GORGON_SANDBOX_SEED)"
    )
    parser.add_argument("--latency", default=None, help="total time of a reply, such as 500ms (GORGON_SANDBOX_LATENCY)")
    parser.add_argument("--limits", default=None, help="limits as JSON, or @FILE; what POST /_limits takes")
    parser.add_argument("--faults", default=None, help="faults as JSON, or @FILE; what POST /_faults takes")
    parser.add_argument("--ready-fd", type=int, default=None, help="write the URL to this file descriptor when ready")
    parser.add_argument("--ready-file", type=Path, default=None, help="write the URL to this file when ready")
    parser.add_argument(
        "--exit-with-parent",
        type=int,
        nargs="?",
        const=os.getppid(),
        default=None,
        metavar="PID",
        help="end when the process that started this one (PID where given) has ended",
    )
    parser.add_argument(
        "--watch-stdin", action="store_true", help="end when standard input, a pipe from the parent, closes"
    )
    options = parser.parse_args(argv)
    try:
        options.seed = int(os.environ.get("GORGON_SANDBOX_SEED") or 0) if options.seed is None else options.seed
        text = options.latency or os.environ.get("GORGON_SANDBOX_LATENCY")
        options.latency = parse_duration(text) if text else None
        options.limits = [Limit.parse(item) for item in objects(given(options.limits))]
        options.faults = [Fault.parse(item) for item in objects(given(options.faults))]
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return options


def given(text: str | None) -> bytes:
    """Return JSON from the command line or, after an @, from a file."""
    if text is None:
        return b"[]"
    return Path(text[1:]).read_bytes() if text.startswith("@") else text.encode()


def tell_ready(url: str, options: argparse.Namespace) -> None:
    """Report the URL of the sandbox."""
    if options.ready_fd is not None:
        os.write(options.ready_fd, f"{url}\n".encode())
        os.close(options.ready_fd)
    if options.ready_file is not None:
        unfinished = options.ready_file.with_name(options.ready_file.name + ".part")
        unfinished.write_text(f"{url}\n")
        unfinished.replace(options.ready_file)
    print(url, flush=True)


async def watch_parent(pid: int, done: asyncio.Event) -> None:
    """Set `done` when the parent is no longer `pid`.

    prctl(PR_SET_PDEATHSIG) would be simpler on Linux, but it fires when the *thread* that started this process ends.
    """
    while os.getppid() == pid:
        await asyncio.sleep(PARENT_CHECK)
    done.set()


def read_stdin(loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
    """Discard standard input; set `done` at its end."""
    if not os.read(0, 4096):
        loop.remove_reader(0)
        done.set()


async def serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or the parent's end; return the exit code."""
    service = ModelService(options.seed, options.latency, Faults(options.seed), Limits(), Log())
    for limit in options.limits:
        service.limits.add(limit)
    for fault in options.faults:
        service.faults.add(fault)
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, done.set)
    server = Server(App(service))
    try:
        port = await server.start(options.host, options.port)
    except OSError as error:
        print(f"the sandbox cannot listen on {options.host}:{options.port}: {error.strerror}", file=sys.stderr)
        print("Is another one running?  --port 0 takes a free port.", file=sys.stderr)
        return 2
    host = f"[{options.host}]" if ":" in options.host else options.host
    watcher = asyncio.create_task(watch_parent(options.exit_with_parent, done)) if options.exit_with_parent else None
    if options.watch_stdin:
        try:
            loop.add_reader(0, read_stdin, loop, done)
        except OSError:
            print("--watch-stdin needs a pipe as standard input", file=sys.stderr)
            return 2
    tell_ready(f"http://{host}:{port}", options)
    await done.wait()
    if watcher is not None:
        watcher.cancel()
    server.stop()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sandbox; return the exit code."""
    options = arguments(sys.argv[1:] if argv is None else argv)
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return asyncio.run(serve(options))


if __name__ == "__main__":
    sys.exit(main())
