"""`run:` — a process on the worker's machine."""

from __future__ import annotations

from typing import Any, ClassVar

from gorgon_common.engine import rendering
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome
from gorgon_common.errors import CommandExited


class Command(StepHandler):
    """Runs an argv list, or the text of a shell step in the older format."""

    kind: ClassVar[str] = "command"

    def execute(self, context: StepContext) -> Outcome:
        """Run the command; its standard output is the step's output.  Raises CommandFailed, Malformed."""
        call = rendering.command_call(context.node.spec, context.env(), timeout=context.timeout())
        fingerprint = context.fingerprint(call.argv, call.shell, dict(call.env), call.stdin, call.cwd)
        adopted = context.adopted(fingerprint)
        if adopted is not None:
            return adopted
        ended = context.services.commands.run(call, context.cancelled)
        if ended.exit_code and not context.node.spec.get("allow_failure"):
            last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
            raise CommandExited(
                f"The command exited with status {ended.exit_code}{': ' if last else ''}{''.join(last)[:500]}",
                hint="Write `allow_failure: true` if a non-zero exit status is a result.",
            )
        detail: dict[str, Any] = {"exit_code": ended.exit_code, "stderr": ended.stderr, "fingerprint": fingerprint}
        schema = context.node.spec.get("schema")
        if schema is None or ended.exit_code:
            return context.succeeded(ended.stdout, detail)
        return context.succeeded(context.fitting(schema, ended.stdout), {**detail, "stdout": ended.stdout})
