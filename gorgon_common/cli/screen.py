"""Displays a run: a live tree on a terminal, a line for each change in a pipe, and the end of the run on both."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from gorgon_common.cli import tables, terminal
from gorgon_common.cli.outline import ENGINE_KINDS, FINISHED, Line, elapsed, error_text, label, outline
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.clock import SYSTEM_CLOCK, Clock

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_SYMBOLS = {
    "pending": ("·", "off"),
    "ready": ("·", "off"),
    "waiting": ("◌", "wait"),
    "in_doubt": ("?", "wait"),
    "succeeded": ("✓", "ok"),
    "failed": ("✗", "bad"),
    "skipped": ("–", "off"),
    "cancelled": ("⊘", "wait"),
    "queued": ("·", "off"),
    "finishing": ("·", "busy"),
    "paused": ("◌", "wait"),
}
_BAR = 10
_NAME = 32
"""The maximum number of characters of a step's name in the tree."""
_WORTH_SAYING = 1.0
"""Seconds that a step may wait for a worker before the tree shows it."""
# Widths do not depend on the numbers: a tree that moves while it grows is hard to read.
_COLUMNS = (
    tables.text("", least=18),
    tables.text("", least=28, room=28),
    tables.number("", drop=2, room=10),
    tables.number("", drop=1, room=7),
    tables.number("", room=6),
)
_CUT_LINES = 8
_CUT_CHARS = 800


class View(Protocol):
    """Shows a run while it is followed."""

    def update(self, run: Mapping[str, Any]) -> None:
        """Show the current state of the run; `run` has its steps."""
        ...

    def say(self, text: str) -> None:
        """Print a message beside it; a message is never removed."""
        ...

    def close(self) -> None:
        """Show the last state and release the terminal."""
        ...


class Silent:
    """Shows nothing: for --json."""

    def update(self, run: Mapping[str, Any]) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print it on stderr."""
        if text:
            terminal.note(text)

    def close(self) -> None:
        """Do nothing."""


class Plain:
    """A line for each change of a step: for pipes and logs."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}
        self._status = ""

    def update(self, run: Mapping[str, Any]) -> None:
        """Print what changed since the last time."""
        if run["status"] != self._status:
            self._status = str(run["status"])
            if self._status not in RUN_FINISHED:
                terminal.say(f"{run['run_id']}  {self._status}  {run['workflow']}")
        for step in run.get("steps") or ():
            name, status = label(step), str(step["status"])
            shown = f"{status} {step.get('reason')}"
            if self._seen.get(name) == shown or status in ("pending", "ready") or step.get("kind") in ENGINE_KINDS:
                continue
            self._seen[name] = shown
            terminal.say("  ".join((name, status, *self._details(step))))

    @staticmethod
    def _details(step: Mapping[str, Any]) -> Iterator[str]:
        took = elapsed(step, SYSTEM_CLOCK.now())
        if step["status"] in FINISHED and took is not None:
            yield terminal.seconds(took)
        if terminal.tokens_of(step):
            yield f"{terminal.number(terminal.tokens_of(step))} tokens"
        if terminal.tokens_of(step) or terminal.has_cost(step):
            yield terminal.cost(step)
        if step.get("adopted_from"):
            yield "reused"
        if step.get("reason"):
            yield " ".join(str(step["reason"]).split())
        message, hint = error_text(step.get("error"))
        if message:
            yield " ".join(f"{sentence(message)} {hint}".split())

    def say(self, text: str) -> None:
        """Print it on stderr."""
        if text:
            terminal.note(text)

    def close(self) -> None:
        """Do nothing."""


class Tree:
    """The live tree of a terminal."""

    def __init__(
        self,
        screen: Console,
        *,
        target: str = "",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._target, self._clock = target, clock
        self._run: Mapping[str, Any] = {}
        self._note = ""
        self._drawing: RunDrawing | None = None
        self._again = 0.0
        self._live = Live(console=screen, get_renderable=self._renderable, refresh_per_second=12, transient=False)
        self._live.start()

    def update(self, run: Mapping[str, Any]) -> None:
        """Draw the current state of the run."""
        self._run = run

    def say(self, text: str) -> None:
        """Show a line below the tree."""
        self._note = text

    def close(self) -> None:
        """Draw the last state and stop drawing."""
        self._note, self._again = "", 0.0
        if self._live.is_started:
            self._live.stop()

    def _renderable(self) -> RenderableType:
        if not self._run:
            return Text("")
        now = time.monotonic()
        if self._drawing is None or now >= self._again:
            self._drawing = RunDrawing(self._run, self._clock.now(), target=self._target, note=self._note)
            # At most a tenth of the time is spent on drawing, however many steps there are.
            self._again = now + 10 * (time.monotonic() - now)
        return self._drawing


class RunDrawing:
    """A run as a rich renderable, fitted to the height of the terminal while it is in progress."""

    def __init__(
        self,
        run: Mapping[str, Any],
        now: datetime,
        *,
        target: str = "",
        note: str = "",
        whole: bool = False,
    ) -> None:
        self.run, self._now, self._target, self._note = run, now, target, note
        self._whole = whole
        self._lines = outline(run, now)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        ended = self.run["status"] in RUN_FINISHED
        height = options.height or console.size.height
        room = 10_000 if self._whole else max(4, height - 7) if not ended else 80
        yield self._heading(options.max_width)
        shown, hidden = _fit([_Drawn(line, console, options.max_width, self._whole) for line in self._lines], room)
        fitted = tables.layout(_COLUMNS, [entry.cells for entry in shown], options.max_width, headings=False)
        for entry in shown:
            yield fitted.line(entry.cells)
            yield from entry.below
        if hidden:
            yield Text(f"  … {hidden}", style="quiet")
        if not ended:
            yield self._footing(self._lines)
            if self._note or not self._whole:
                yield Text(self._note, style="wait")

    def _heading(self, width: int) -> Text:
        """Return the workflow's name with target and id; the id is never cut."""
        target = str(self.run.get("target") or self._target)
        facts = " · ".join(part for part in (target, str(self.run["run_id"])) if part)
        name = Text(str(self.run["workflow"]), style="name")
        name.truncate(max(8, width - len(facts) - 2), overflow="ellipsis")
        return Text.assemble(name, (f"  {facts}", "quiet"))

    def _footing(self, lines: Sequence[Line]) -> Text:
        tops = [line for line in lines if line.depth == 0]
        done = sum(line.status in FINISHED for line in tops)
        parts = [f"{done} of {terminal.counted(len(tops), 'step')}", *usage_of(self.run)]
        took = elapsed(self.run, self._now)
        if took is not None:
            parts.append(terminal.seconds(took))
        return Text("  " + " · ".join(parts), style="quiet")


class _Drawn:
    """One line of the tree: its cells, and the wrapped text below it."""

    def __init__(self, line: Line, console: Console, width: int, whole: bool) -> None:
        self.line = line
        self.cells = (
            _name(line, _NAME if console.is_terminal else width),
            _about(line, whole=whole),
            Text(f"{terminal.number(line.tokens)} tok" if line.tokens else "", style="quiet"),
            Text(_cost(line), style="quiet"),
            Text(_took(line), style="quiet"),
        )
        indent = 2 * line.depth + 4
        self.below: list[Text] = []
        for text, style in _details(line, whole=whole):
            for part in Text(text, style=style).wrap(console, max(20, width - indent)):
                part.rstrip()
                self.below.append(Text(" " * indent) + part)

    @property
    def height(self) -> int:
        return 1 + len(self.below)


def _fit(lines: Sequence[_Drawn], room: int) -> tuple[list[_Drawn], str]:
    """Leave out the least interesting lines until the rest fits; returns the rest and a summary of the omitted ones."""
    needed = sum(entry.height for entry in lines)
    left_out: dict[str, int] = {}
    shown = list(lines)
    for status in ("succeeded", "pending", "ready", "skipped", "cancelled"):
        for entry in [entry for entry in shown if entry.line.status == status]:
            if needed <= room - 1:
                break
            shown.remove(entry)
            needed -= entry.height
            left_out[status] = left_out.get(status, 0) + 1
    while needed > room - 1 and len(shown) > 1:
        entry = shown.pop()
        needed -= entry.height
        left_out[entry.line.status] = left_out.get(entry.line.status, 0) + 1
    return shown, ", ".join(f"{count} more {status.replace('_', ' ')}" for status, count in left_out.items())


def _cost(line: Line) -> str:
    spent = {"cost_usd": line.cost, "known_cost_usd": line.cost, "unpriced_calls": line.unpriced}
    return terminal.cost(spent, short=True) if terminal.has_cost(spent) else ""


def _took(line: Line) -> str:
    return "" if line.elapsed is None or line.status == "skipped" else terminal.seconds(line.elapsed)


def _name(line: Line, most: int) -> Text:
    busy = line.status == "running"
    symbol, style = (_SPINNER[int(time.monotonic() * 12) % len(_SPINNER)], "busy") if busy else _SYMBOLS[line.status]
    faint = line.status in ("pending", "ready", "skipped")
    name = Text(line.name, style="off" if faint else "")
    name.truncate(most, overflow="ellipsis")
    return Text.assemble("  " * (line.depth + 1), (symbol, style), " ", name)


def _about(line: Line, *, whole: bool) -> Text:
    text = Text()
    if line.kind == "loop" and line.total:
        text.append(f"iteration {line.total}  ")
    elif line.total:
        # Rounded down, and drawn with two characters: even without colours, it looks full only when it is.
        part = _BAR * line.done // line.total
        text.append("█" * part, style="bad" if line.failed else "ok").append("░" * (_BAR - part), style="off")
        text.append(f" {line.done}/{line.total}")
        if line.failed:
            text.append(f", {line.failed} failed", style="bad")
        text.append("  ")
    if line.status == "skipped":
        return text.append(f"skipped: {line.reason}" if line.reason and not whole else "skipped", style="off")
    if line.status == "waiting":
        waited = "" if line.waited is None else f" for {terminal.seconds(line.waited)}"
        return text.append(f"waiting{waited}", style="wait")
    if line.status == "ready" and line.waited is not None and line.waited >= _WORTH_SAYING:
        return text.append(f"waiting for a worker, {terminal.seconds(line.waited)}", style="wait")
    if line.attempts > 1:
        text.append(f"attempt {line.attempts}{'  ' if line.who else ''}", style="wait")
    if line.kind != "loop":  # a loop's steps are shown below it
        text.append(line.who.partition(" · ")[0] if line.total else line.who, style="quiet")
    return text


def _wait(line: Line) -> str:
    """Return why a step, or an item of it, waits, and when it continues."""
    facts = []
    if line.waiting:
        waited = "" if line.waited is None else f" for up to {terminal.seconds(line.waited)}"
        facts.append(f"{terminal.counted(line.waiting, 'item')} waiting{waited}")
    if line.goes_on is not None and line.goes_on > 0:
        facts.append(f"{'continues' if facts else 'Continues'} in {terminal.seconds(line.goes_on)}")
    return f"{', '.join(facts)}: {line.reason}" if facts else line.reason


def _details(line: Line, *, whole: bool) -> Iterator[tuple[str, str]]:
    """Return what does not fit beside a step: why it failed and what to do, why it waits."""
    if line.error:
        yield line.error, "bad" if line.status == "failed" else "wait"
        if line.hint:
            yield line.hint, "hint"
    elif line.reason and (line.status == "waiting" or line.waiting):
        yield _wait(line), "wait"
    elif line.reason and line.status == "skipped" and whole:
        yield line.reason, "quiet"


def usage_of(run: Mapping[str, Any]) -> list[str]:
    """Return `12,345 tokens` and `$0.0421 + 2 calls of unknown cost`, as far as they apply."""
    parts = []
    if terminal.tokens_of(run):
        parts.append(f"{terminal.number(terminal.tokens_of(run))} tokens")
    if terminal.has_cost(run):
        parts.append(terminal.cost(run))
    return parts


def ending(
    run: Mapping[str, Any], *, full: bool, now: datetime, server: str | None = None, file: str | None = None
) -> Group:
    """Return how a run ended: one sentence, the error and what to do, the outputs.

    `file`: the workflow's file, if it is known.  A resumed run does not read it unless it is named.
    """
    run_id, status = str(run["run_id"]), str(run["status"])
    named = f"{run_id} --server {server}" if server else run_id
    symbol, style = _SYMBOLS.get(status, ("·", "quiet"))
    took = elapsed(run, now)
    parts = [f"in {terminal.seconds(took)}" if took is not None else "", *usage_of(run)]
    told = " · ".join(part for part in parts if part)
    drawn: list[RenderableType] = [
        Text.assemble((f"{symbol} {run['workflow']} {status}", f"bold {_plain_style(style)}"), (f"  {told}", "quiet"))
    ]
    error = run.get("error")
    message, hint = error_text(error)
    where = error.get("step") if isinstance(error, Mapping) else None
    if where and not message.startswith(f"`{where}`"):
        message = f"{where}: {message}"
    if message:
        drawn.append(_indented(message, "bad"))
    if hint:
        drawn.append(_indented(hint, "hint"))
    if status in ("failed", "cancelled"):
        drawn.append(Text("  To continue where it ended:", style="quiet"))
        drawn.append(Text(f"    gorgon runs resume {named}", overflow="ignore", no_wrap=True))
        if not server:  # a server resumes a run only with its original workflow
            drawn.append(Text("  To continue with an edited file:", style="quiet"))
            edited = f"    gorgon runs resume {named} -f {shlex.quote(file) if file else 'FILE'}"
            drawn.append(Text(edited, overflow="ignore", no_wrap=True))
    outputs = run.get("outputs") or {}
    if outputs:
        drawn += [Text(), *_outputs(outputs, named, full=full)]
    return Group(*drawn)


def _indented(text: str, style: str = "") -> RenderableType:
    """Return a text that is wrapped within its indent on a terminal; in a pipe its lines stay as they are."""
    if terminal.interactive():
        return Padding.indent(Text(text or " ", style=style), 2)
    indented = text.replace("\n", "\n  ")
    return Text(f"  {indented}", style=style)


def sentence(text: str) -> str:
    """Return a text with a full stop at the end, so that another sentence can follow."""
    return text if not text or text[-1] in ".!?:" else f"{text}."


def _plain_style(style: str) -> str:
    return {"ok": "green", "bad": "red", "wait": "yellow", "busy": "cyan"}.get(style, "")


def _outputs(outputs: Mapping[str, Any], named: str, *, full: bool) -> Iterator[RenderableType]:
    cut = False
    for name, value in outputs.items():
        lines, more = cut_lines(value, full=full)
        cut = cut or bool(more)
        if len(lines) == 1 and not more and not isinstance(value, (Mapping, list)):
            yield Text.assemble((name, "name"), "  ", lines[0])
            continue
        yield Text(name, style="name")
        for line in lines:
            yield _indented(line)
        if more:
            yield Text(f"  … {more}", style="quiet")
    if cut:
        yield Text("\nTo see all of it:", style="quiet")
        yield Text(f"  gorgon runs show {named} --full", overflow="ignore", no_wrap=True)


def cut_lines(value: Any, *, full: bool) -> tuple[list[str], str]:
    """Return a value as lines for people, and a description of what was cut (`12 more lines`)."""
    lines = list(readable(value))
    if full:
        return lines, ""
    kept, size = [], 0
    for line in lines[:_CUT_LINES]:
        size += len(line)
        if size > _CUT_CHARS:
            kept.append(line[: max(80, _CUT_CHARS - size + len(line))] + "…")
            break
        kept.append(line)
    more = len(lines) - len(kept)
    if more:
        return kept, terminal.counted(more, "more line")
    return kept, "cut" if size > _CUT_CHARS else ""


def readable(value: Any, indent: str = "") -> Iterator[str]:
    """Write a JSON value as indented text: `name: value`, `- item`, texts as they are."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _entry(f"{indent}{name}:", entry, indent)
    elif isinstance(value, list):
        for entry in value:
            yield from _entry(f"{indent}-", entry, indent)
    else:
        yield from (f"{indent}{line}" for line in _scalar(value).splitlines() or [""])


def _entry(head: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, (Mapping, list)):
        inner = list(readable(value, indent + "  "))
        if head.endswith("-") and isinstance(value, Mapping) and inner:
            yield f"{head} {inner[0].strip()}"
            yield from inner[1:]
        else:
            yield head if inner else f"{head} {'{}' if isinstance(value, Mapping) else '[]'}"
            yield from inner
        return
    lines = _scalar(value).splitlines() or [""]
    if len(lines) == 1:
        yield f"{head} {lines[0]}"
    else:
        yield head
        yield from (f"{indent}  {line}" for line in lines)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return terminal.safe(str(value))
