"""Commands, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from gorgon_common.engine.ports import CommandCall, CommandResult
from gorgon_common.errors import Cancelled, CommandFailed, OutputTooLarge, Retryable
from gorgon_worker.providers.command import LocalCommands

PYTHON = os.path.realpath(sys.executable)
PAYLOADS = [
    "$(touch {canary})",
    "`touch {canary}`",
    "; touch {canary}",
    "& touch {canary} &",
    "| touch {canary}",
    "\ntouch {canary}\n",
    "' ; touch {canary} ; '",
    '" ; touch {canary} ; "',
    "${{IFS}}touch${{IFS}}{canary}",
    "$((a[$(touch {canary})]))",
    ">{canary}",
    "-rf *",
    "é😀\t\\",
]


@pytest.fixture
def anything() -> LocalCommands:
    return LocalCommands(["*"])


def never() -> bool:
    return False


def python(program: str, **more: object) -> CommandCall:
    return CommandCall(argv=(PYTHON, "-c", textwrap.dedent(program)), **more)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        psutil.Process(pid).wait(timeout=5)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


class Flag:
    """A cancel flag that is set from another thread."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self.set = self._set.set

    def __call__(self) -> bool:
        return self._set.is_set()


# What it gives back


def test_output_and_status(anything: LocalCommands) -> None:
    result = anything.run(CommandCall(argv=("sh", "-c", "echo out; echo err >&2; exit 3")), never)
    assert result == CommandResult(exit_code=3, stdout="out\n", stderr="err\n")


def test_a_signal_is_an_exit_code_as_in_a_shell(anything: LocalCommands) -> None:
    assert anything.run(CommandCall(argv=("sh", "-c", "kill -TERM $$")), never).exit_code == 128 + signal.SIGTERM


def test_what_is_not_text_becomes_a_replacement_character(anything: LocalCommands) -> None:
    assert anything.run(CommandCall(argv=("printf", r"a\377b\000c")), never).stdout == "a\ufffdb\ufffdc"


def test_stdin_is_fed_whole_while_output_is_read(anything: LocalCommands) -> None:
    text = "0123456789" * 200_000
    assert anything.run(CommandCall(argv=("cat",), stdin=text), never).stdout == text


def test_a_command_that_reads_no_stdin(anything: LocalCommands) -> None:
    assert anything.run(CommandCall(argv=("true",), stdin="x" * 1_000_000), never).exit_code == 0


def test_a_command_that_closes_its_output_is_still_waited_for(anything: LocalCommands, tmp_path: Path) -> None:
    program = "import os, time; os.close(1); os.close(2); time.sleep(0.3); open('done', 'w').close()"
    assert anything.run(python(program, cwd=str(tmp_path)), never).exit_code == 0
    assert (tmp_path / "done").exists()


# Values stay values


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_argument_stays_one_argument(anything: LocalCommands, tmp_path: Path, payload: str) -> None:
    value = payload.format(canary=tmp_path / "canary")
    call = CommandCall(argv=(PYTHON, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", value, "next"))
    assert json.loads(anything.run(call, never).stdout) == [value, "next"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_shell_command_never_reads_a_value_as_program_text(
    anything: LocalCommands, tmp_path: Path, payload: str
) -> None:
    value = payload.format(canary=tmp_path / "canary")
    program = "printf %s \"${x}\"; printf '<%s>' $x 'a '${x} >/dev/null"
    assert anything.run(CommandCall(shell=program, env={"x": value}), never).stdout == value
    assert list(tmp_path.iterdir()) == []


def test_names_the_workflow_does_not_know_stay_the_shells(anything: LocalCommands) -> None:
    call = CommandCall(shell='for f in a b; do echo "${f}-${who:-nobody}"; done', env={})
    assert anything.run(call, never).stdout == "a-nobody\nb-nobody\n"


# Environment and folder


def test_the_environment_is_clean(anything: LocalCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_WORKER", "s3cret")
    call = python("import json, os; print(json.dumps(dict(os.environ)))", env={"GREETING": "hello"})
    seen = json.loads(anything.run(call, never).stdout)
    seen.pop("LC_CTYPE", None)  # the interpreter's own
    assert set(seen) == {"PATH", "HOME", "TMPDIR", "LANG", "GREETING"}
    assert seen["GREETING"] == "hello"
    assert seen["HOME"] == seen["TMPDIR"]


@pytest.mark.parametrize(
    "name",
    ["PATH", "IFS", "LD_PRELOAD", "LD_X", "BASH_ENV", "ENV", "HOME", "BASH_FUNC_ls%%", "PYTHONSTARTUP", "a=b", ""],
)
def test_dangerous_variables_are_refused(anything: LocalCommands, name: str) -> None:
    with pytest.raises(CommandFailed, match=r"environment variable|may not be set"):
        anything.run(CommandCall(argv=("true",), env={name: "x"}), never)


def test_values_over_128_kb_are_refused(anything: LocalCommands) -> None:
    fits = "x" * (128 * 1024 - len("VALUE") - 2)
    result = anything.run(CommandCall(shell='printf %s "$VALUE" | wc -c', env={"VALUE": fits}), never)
    assert int(result.stdout) == len(fits)
    with pytest.raises(CommandFailed, match=r"VALUE is 131,066 bytes.*128 KB"):
        anything.run(CommandCall(argv=("true",), env={"VALUE": fits + "x"}), never)
    with pytest.raises(CommandFailed, match="argument 1 is"):
        anything.run(CommandCall(argv=("true", "x" * 128 * 1024)), never)


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_values_that_no_process_can_take(anything: LocalCommands, value: str) -> None:
    with pytest.raises(CommandFailed, match="argument 1"):
        anything.run(CommandCall(argv=("echo", value)), never)


def test_too_much_in_all(anything: LocalCommands) -> None:
    with pytest.raises(CommandFailed, match="could not be started: Argument list too long"):
        anything.run(CommandCall(argv=("true", *["x" * 120_000] * 100)), never)


def test_its_folder_is_its_own_and_removed(anything: LocalCommands) -> None:
    result = anything.run(CommandCall(argv=("sh", "-c", "mkdir locked; touch locked/x; chmod 000 locked; pwd")), never)
    assert not Path(result.stdout.strip()).exists()


def test_a_given_folder_is_kept_and_nothing_else_is_written_there(anything: LocalCommands, tmp_path: Path) -> None:
    result = anything.run(CommandCall(argv=("sh", "-c", "pwd; touch here $HOME/there"), cwd=str(tmp_path)), never)
    assert result.stdout.strip() == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_that_does_not_exist(anything: LocalCommands) -> None:
    with pytest.raises(CommandFailed, match="'/nowhere' does not exist"):
        anything.run(CommandCall(argv=("true",), cwd="/nowhere"), never)


# What may run


def test_commands_are_off_by_default() -> None:
    with pytest.raises(CommandFailed, match="Commands are off") as failure:
        LocalCommands([]).run(CommandCall(argv=("pytest", "-q")), never)
    assert "GORGON_COMMANDS_ALLOW=pytest" in failure.value.hint


def test_what_is_not_allowed_says_how_to_allow_it() -> None:
    with pytest.raises(CommandFailed, match=r"'rm' is not among .*\(ls,cat\)") as failure:
        LocalCommands(["ls", "cat"]).run(CommandCall(argv=("rm", "x")), never)
    assert "GORGON_COMMANDS_ALLOW=ls,cat,rm" in failure.value.hint


def test_the_shell_form_needs_sh() -> None:
    with pytest.raises(CommandFailed, match="'sh' is not among"):
        LocalCommands(["echo"]).run(CommandCall(shell="echo hello"), never)
    assert LocalCommands(["sh"]).run(CommandCall(shell="echo hello"), never).stdout == "hello\n"


def test_a_program_that_is_not_there(anything: LocalCommands) -> None:
    with pytest.raises(CommandFailed, match="There is no program 'no-such-thing'"):
        anything.run(CommandCall(argv=("no-such-thing",)), never)
    with pytest.raises(CommandFailed, match="There is no program 'no-such-thing'"):
        LocalCommands(["no-such-thing"]).run(CommandCall(argv=("no-such-thing",)), never)


def test_an_empty_command(anything: LocalCommands) -> None:
    with pytest.raises(CommandFailed, match="empty"):
        anything.run(CommandCall(), never)


@pytest.fixture
def two_tools(tmp_path: Path) -> tuple[Path, Path]:
    """Two programs of the same name: one that the operator means, one that a step wrote."""
    for folder in ("good", "evil"):
        (tmp_path / folder).mkdir()
        tool = tmp_path / folder / "tool"
        tool.write_text(f"#!/bin/sh\necho {folder}\n")
        tool.chmod(0o755)
    return tmp_path / "good", tmp_path / "evil"


def test_a_name_allows_the_file_it_resolves_to_and_no_other(two_tools: tuple[Path, Path]) -> None:
    good, evil = two_tools
    commands = LocalCommands(["tool"], path=f"{good}:/usr/bin:/bin")
    assert commands.run(CommandCall(argv=("tool",), cwd=str(evil)), never).stdout == "good\n"
    assert commands.run(CommandCall(argv=(f"{good}/tool",)), never).stdout == "good\n"
    for other in (f"{evil}/tool", "./tool"):
        with pytest.raises(CommandFailed, match="is not among"):
            commands.run(CommandCall(argv=(other,), cwd=str(evil)), never)


def test_a_path_allows_the_name_that_resolves_to_it(two_tools: tuple[Path, Path]) -> None:
    good, evil = two_tools
    assert LocalCommands([f"{good}/tool"], path=f"{good}").run(CommandCall(argv=("tool",)), never).stdout == "good\n"
    with pytest.raises(CommandFailed, match="is not among"):
        LocalCommands([f"{good}/tool"], path=f"{evil}").run(CommandCall(argv=("tool",)), never)


def test_relative_folders_of_the_path_are_not_searched(two_tools: tuple[Path, Path]) -> None:
    good, evil = two_tools
    commands = LocalCommands(["tool"], path=f".:{good}:/usr/bin:/bin")
    assert commands.run(CommandCall(argv=("tool",), cwd=str(evil)), never).stdout == "good\n"


def test_a_link_to_an_allowed_file_is_not_allowed(two_tools: tuple[Path, Path]) -> None:
    good, evil = two_tools
    (evil / "alias").symlink_to(good / "tool")
    with pytest.raises(CommandFailed, match="is not among"):
        LocalCommands(["tool"], path=str(good)).run(CommandCall(argv=(f"{evil}/alias",)), never)


def test_a_file_that_cannot_be_executed(anything: LocalCommands, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(b"\x00\x01 no format of a program")
    tool.chmod(0o755)
    with pytest.raises(CommandFailed, match="could not be started: Exec format error"):
        anything.run(CommandCall(argv=(str(tool),)), never)


# Limits


def test_a_timeout_kills_grandchildren_even_in_their_own_session(anything: LocalCommands, tmp_path: Path) -> None:
    program = """
        import os, subprocess, sys, time
        child = [sys.executable, "-c", "import time; time.sleep(60)"]
        same = subprocess.Popen(child)
        other = subprocess.Popen(child, start_new_session=True)
        with open("pids.part", "w") as out: out.write(f"{os.getpid()} {same.pid} {other.pid}")
        os.rename("pids.part", "pids")
        print("started", file=sys.stderr, flush=True)
        time.sleep(60)
    """
    with pytest.raises(Retryable, match=r"longer than 1\.5 s and was killed") as failure:
        anything.run(python(program, cwd=str(tmp_path), timeout=1.5), never)
    assert failure.value.kind == "timeout"
    assert "started" in failure.value.hint
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)


def test_a_daemon_does_not_outlive_its_command(anything: LocalCommands) -> None:
    result = anything.run(CommandCall(argv=("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!")), never)
    assert gone(int(result.stdout))


def test_a_background_process_that_holds_the_output_open_does_not_hold_the_step(anything: LocalCommands) -> None:
    assert anything.run(CommandCall(argv=("sh", "-c", "sleep 60 & echo hello"), timeout=30), never).stdout == "hello\n"


def test_the_output_cap_kills(anything: LocalCommands) -> None:
    with pytest.raises(OutputTooLarge, match="more than 1 MB and was killed"):
        anything.run(CommandCall(argv=("yes",), output_bytes=1024**2), never)


def test_stderr_counts_as_output(anything: LocalCommands) -> None:
    with pytest.raises(OutputTooLarge):
        anything.run(CommandCall(argv=("sh", "-c", "yes >&2"), output_bytes=1024**2), never)


def test_the_memory_cap(anything: LocalCommands) -> None:
    result = anything.run(python("x = bytearray(500_000_000)", memory_bytes=200_000_000), never)
    assert result.exit_code == 1
    assert "MemoryError" in result.stderr
    assert anything.run(python("x = bytearray(100_000_000)", memory_bytes=200_000_000), never).exit_code == 0


def test_the_cpu_limit(anything: LocalCommands) -> None:
    with pytest.raises(CommandFailed, match="more CPU time than it is allowed"):
        anything.run(CommandCall(argv=("sh", "-c", "while :; do :; done"), cpu_seconds=1, timeout=60), never)


def test_the_size_of_files() -> None:
    commands = LocalCommands(["*"], file_bytes=1_000_000)
    with pytest.raises(CommandFailed, match="wrote a file that is larger"):
        commands.run(CommandCall(argv=("dd", "if=/dev/zero", "of=big", "bs=1000", "count=2000")), never)


def test_the_number_of_processes_is_limited_and_no_core_is_dumped(anything: LocalCommands) -> None:
    program = "import resource as r; print(r.getrlimit(r.RLIMIT_NPROC)[0], r.getrlimit(r.RLIMIT_CORE)[0])"
    processes, core = anything.run(python(program), never).stdout.split()
    assert 512 <= int(processes) < 100_000
    assert core == "0"


def test_cancel_kills(anything: LocalCommands, tmp_path: Path) -> None:
    flag = Flag()
    os.mkfifo(tmp_path / "started")

    def cancel_when_it_runs() -> None:
        (tmp_path / "started").read_text()
        flag.set()

    watcher = threading.Thread(target=cancel_when_it_runs)
    watcher.start()
    with pytest.raises(Cancelled):
        anything.run(
            CommandCall(argv=("sh", "-c", "echo $$ > pid; echo > started; exec sleep 60"), cwd=str(tmp_path)), flag
        )
    watcher.join()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_command_that_kills_its_supervisor(anything: LocalCommands, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="killed the process that watches it"):
        anything.run(
            CommandCall(argv=("sh", "-c", "sleep 60 & echo $! > pid; kill -9 $PPID; sleep 60"), cwd=str(tmp_path)),
            never,
        )
    assert gone(int((tmp_path / "pid").read_text()))


def test_signals_are_not_ignored_by_the_command(anything: LocalCommands) -> None:
    assert anything.run(CommandCall(argv=("sh", "-c", "yes | head -n 1")), never).stdout == "y\n"
    program = "import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    assert anything.run(python(program), never).stdout == "True\n"


def test_a_worker_that_is_killed_leaves_no_command(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    program = f"""
        from gorgon_common.engine.ports import CommandCall
        from gorgon_worker.providers.command import LocalCommands
        script = "setsid sleep 60 & echo $! $$ > pids; echo > started; sleep 60"
        LocalCommands(["*"]).run(CommandCall(shell=script, cwd={str(tmp_path)!r}), lambda: False)
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=Path(__file__).parents[4])
    (tmp_path / "started").read_text()
    worker.kill()
    worker.wait()
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_many_at_once(anything: LocalCommands) -> None:
    results: list[str] = []

    def one(number: int) -> None:
        results.append(anything.run(CommandCall(argv=("echo", str(number))), never).stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, results)) == list(range(16))
