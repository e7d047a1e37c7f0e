"""How a run looks: a live tree on a terminal, a line for each change in a pipe, and the end of it on both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gorgon_common.cli import terminal
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
_CUT_LINES = 8
_CUT_CHARS = 800


class View(Protocol):
    """Shows a run while it is followed."""

    def update(self, run: Mapping[str, Any]) -> None:
        """Show how the run stands now; `run` has its steps."""
        ...

    def say(self, text: str) -> None:
        """Say something beside it; nothing takes back what was said."""
        ...

    def close(self) -> None:
        """Show the last state and give the terminal back."""
        ...


class Silent:
    """Shows nothing: for --json."""

    def update(self, run: Mapping[str, Any]) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Say it on stderr."""
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
        """Say it on stderr."""
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
        """Draw how the run stands now."""
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
            # At most a tenth of the time goes into drawing, however many steps there are.
            self._again = now + 10 * (time.monotonic() - now)
        return self._drawing


class RunDrawing:
    """A run as rich draws it, fitted to the height of the terminal while it is under way."""

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
        lines = self._lines
        ended = self.run["status"] in RUN_FINISHED
        height = options.height or console.size.height
        room = 10_000 if self._whole else max(4, height - 7) if not ended else 80
        yield self._heading()
        shown, hidden = _fit(lines, room)
        yield _table(shown, narrow=options.max_width < 100)
        if hidden:
            yield Text(f"  … {hidden}", style="quiet")
        if not ended:
            yield self._footing(lines)
            yield Text(self._note, style="wait")

    def _heading(self) -> Text:
        parts = [str(self.run["run_id"])]
        target = str(self.run.get("target") or self._target)
        if target:
            parts.insert(0, target)
        return Text.assemble((str(self.run["workflow"]), "name"), ("  " + " · ".join(parts), "quiet"))

    def _footing(self, lines: Sequence[Line]) -> Text:
        tops = [line for line in lines if line.depth == 0]
        done = sum(line.status in FINISHED for line in tops)
        parts = [f"{done} of {len(tops)} steps", *usage_of(self.run)]
        took = elapsed(self.run, self._now)
        if took is not None:
            parts.append(terminal.seconds(took))
        return Text("  " + " · ".join(parts), style="quiet")


def _fit(lines: Sequence[Line], room: int) -> tuple[list[Line], str]:
    """Leave out what is least interesting until the rest fits; returns the rest and what was left out."""
    needed = sum(1 + bool(line.error) + bool(line.hint) for line in lines)
    left_out: dict[str, int] = {}
    shown = list(lines)
    for status in ("succeeded", "pending", "ready", "skipped", "cancelled"):
        for line in [entry for entry in shown if entry.status == status]:
            if needed <= room - 1:
                break
            shown.remove(line)
            needed -= 1
            left_out[status] = left_out.get(status, 0) + 1
    while needed > room - 1 and len(shown) > 1:
        line = shown.pop()
        needed -= 1 + bool(line.error) + bool(line.hint)
        left_out[line.status] = left_out.get(line.status, 0) + 1
    return shown, ", ".join(f"{count} more {status}" for status, count in left_out.items())


def _table(lines: Sequence[Line], *, narrow: bool) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=False)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=32)
    # Widths that do not follow the numbers: a tree that moves while it grows is hard to read.
    table.add_column(overflow="fold" if not narrow else "ellipsis", min_width=28 if narrow else 44, max_width=64)
    for width in (10, 7, 6):
        table.add_column(justify="right", no_wrap=True, min_width=width)
    for line in lines:
        table.add_row(
            _name(line),
            _about(line, narrow=narrow),
            Text(f"{terminal.number(line.tokens)} tok" if line.tokens else "", style="quiet"),
            Text(_cost(line), style="quiet"),
            Text(_took(line), style="quiet"),
        )
    return table


def _cost(line: Line) -> str:
    spent = {"cost_usd": line.cost, "known_cost_usd": line.cost, "unpriced_calls": line.unpriced}
    return terminal.cost(spent, short=True) if terminal.has_cost(spent) else ""


def _took(line: Line) -> str:
    return "" if line.elapsed is None or line.status == "skipped" else terminal.seconds(line.elapsed)


def _name(line: Line) -> Text:
    busy = line.status == "running"
    symbol, style = (_SPINNER[int(time.monotonic() * 12) % len(_SPINNER)], "busy") if busy else _SYMBOLS[line.status]
    faint = line.status in ("pending", "ready", "skipped")
    return Text.assemble("  " * (line.depth + 1), (symbol, style), " ", (line.name, "off" if faint else ""))


def _about(line: Line, *, narrow: bool) -> Text:
    text = Text()
    if line.kind == "loop" and line.total:
        text.append(f"iteration {line.total}  ")
    elif line.total:
        part = round(_BAR * line.done / line.total)
        text.append("━" * part, style="bad" if line.failed else "ok").append("━" * (_BAR - part), style="off")
        text.append(f" {line.done}/{line.total}")
        if line.failed:
            text.append(f", {line.failed} failed", style="bad")
        text.append("  ")
    if line.status == "skipped":
        return text.append(f"skipped: {line.reason}" if line.reason else "skipped", style="off")
    if line.error:
        text.append(line.error, style="bad" if line.status == "failed" else "wait")
        if line.hint:
            text.append(f"\n{line.hint}", style="hint")
        return text
    if line.status == "waiting" and line.reason:
        return text.append(f"waiting: {line.reason}", style="wait")
    if line.kind != "loop":  # whose steps stand below it
        text.append(line.who.partition(" · ")[0] if narrow and line.total else line.who, style="quiet")
    if line.attempts > 1:
        text.append(f"{'  ' if line.who else ''}attempt {line.attempts}", style="wait")
    return text


def usage_of(run: Mapping[str, Any]) -> list[str]:
    """Return `12,345 tokens` and `$0.0421 + 2 calls of unknown cost`, what there is of it."""
    parts = []
    if terminal.tokens_of(run):
        parts.append(f"{terminal.number(terminal.tokens_of(run))} tokens")
    if terminal.has_cost(run):
        parts.append(terminal.cost(run))
    return parts


def ending(run: Mapping[str, Any], *, full: bool, now: datetime, server: str | None = None) -> Group:
    """Return how a run ended: one sentence, the error and what to do, the outputs."""
    run_id, status = str(run["run_id"]), str(run["status"])
    named = f"{run_id} --server {server}" if server else run_id
    symbol, style = _SYMBOLS.get(status, ("·", "quiet"))
    took = elapsed(run, now)
    parts = [f"in {terminal.seconds(took)}" if took is not None else "", *usage_of(run)]
    told = " · ".join(part for part in parts if part)
    drawn: list[RenderableType] = [
        Text.assemble((f"{symbol} {run['workflow']} {status}", f"bold {_plain_style(style)}"), (f"  {told}", "quiet"))
    ]
    message, hint = error_text(run.get("error"))
    if message:
        indented = message.replace("\n", "\n  ")
        drawn.append(Text(f"  {indented}", style="bad"))
    if hint:
        indented = hint.replace("\n", "\n  ")
        drawn.append(Text(f"  {indented}", style="hint"))
    if status in ("failed", "cancelled"):
        drawn.append(Text.assemble(("  Continue where it ended:  ", "quiet"), f"gorgon runs resume {named}"))
    outputs = run.get("outputs") or {}
    if outputs:
        drawn += [Text(), *_outputs(outputs, named, full=full)]
    return Group(*drawn)


def sentence(text: str) -> str:
    """Return a text with a full stop, so that another sentence can follow it."""
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
            # A pipe gets the lines as they are; on a terminal what is too long is wrapped within its indent.
            yield Padding.indent(Text(line), 2) if terminal.interactive() else Text(f"  {line}")
        if more:
            yield Text(f"  … {more}", style="quiet")
    if cut:
        yield Text.assemble(("\nAll of it:  ", "quiet"), f"gorgon runs show {named} --full")


def cut_lines(value: Any, *, full: bool) -> tuple[list[str], str]:
    """Return a value as lines for people, and what was cut from it (`12 more lines`)."""
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
        return kept, f"{more} more {'line' if more == 1 else 'lines'}"
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
