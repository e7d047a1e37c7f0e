"""Checks budgets before a call: the most that the call can cost must fit every budget that applies to it.

Nothing is reserved where no budget applies.  A reservation is held until the transaction that stores the step's
outcome; see `persistence.budgets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from gorgon_common.costs.budgets import Account, Balance, Shortage, dollars
from gorgon_common.costs.estimate import Price, clamp, input_bound, least_output, worst_cost
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.agent import Earlier
from gorgon_common.engine.budget_accounts import agents, caps, own_accounts
from gorgon_common.engine.budget_store import BudgetStore, Held
from gorgon_common.engine.context import Run
from gorgon_common.engine.ports import AgentCall, Pricer
from gorgon_common.engine.records import BudgetRequest, Claimed
from gorgon_common.errors import BudgetExceeded, ExpressionError, GorgonError, Unavailable, Unpriced
from gorgon_common.lazy import load
from gorgon_common.logs import get_logger
from gorgon_common.masking import SECRETS
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.expressions import parse_template
from gorgon_common.workflow.plan import Node

log = get_logger(__name__)

UNSENT = "unsent"
"""Outcome of a call that was reserved but not made: it is not in the ledger, and its reservation is released."""
RECHECK_SECONDS = 30.0
"""A step that waits for room is notified; this is the fallback if no process is left to notify it."""


class BudgetWait(GorgonError):
    """A budget has no room now; it may have later.  Not a failure: the step waits `seconds` at most."""

    def __init__(self, message: str, room: BudgetRequest, seconds: float) -> None:
        super().__init__(message)
        self.room = room
        self.seconds = seconds


class StepBudget:
    """Makes the reservations for the calls of one attempt at a step."""

    def __init__(self, vault: BudgetStore | None, pricer: Pricer, run: Run, step: Claimed) -> None:
        self._vault = vault
        self._pricer = pricer
        self._run = run
        self._step = step
        self._own: list[Account] | None = None
        self.held: list[int] = []
        """Ordinals of the calls with a reservation."""
        self._bounds: dict[int, Callable[[], tuple[int, int, int]]] = {}
        """Ordinal of a call without a reservation → the most it can cost."""
        self._said: dict[str, Any] | None = None
        """The current conversation, as stored."""

    @property
    def own(self) -> list[Account]:
        """The limits in the file that apply to this step's calls."""
        if self._own is None:
            self._own = own_accounts(self._run, self._step)
        return self._own

    def reserve(self, provider: str, call: AgentCall, ordinal: int) -> tuple[AgentCall, bool]:
        """Reserve the most a call can cost.  Returns the call, with a lower `max_tokens` if it needs that to fit, and
        whether anything was reserved.

        `ordinal` counts the calls of this claim from 1.  Raises BudgetExceeded, Unpriced, Short, Unavailable.
        """
        info = self._run.info
        limits = self._limits()
        price = self._price(provider, call.model)
        vault = self._vault
        key = (self._step.id, self._step.token, ordinal)

        def bytes_sent() -> int:
            return input_bound([message.content for message in call.messages], system=call.system, schema=call.schema)

        if not limits:
            self._priced(provider, call.model, price)
            if vault is not None:
                self._bounds[ordinal] = lambda: _bound(price, bytes_sent(), call.max_tokens)
                vault.note(key, info, self._bounds[ordinal])
            return call, False
        assert vault is not None
        size = bytes_sent()
        in_money = any(usd is not None for usd, _ in limits)
        if in_money:
            self._priced(provider, call.model, price, limited=True)
        asked = call.max_tokens
        while True:
            cost = worst_cost(price, size, asked) or 0
            got = vault.reserve(key, info, self.own, usd=cost, tokens=size + asked, max_tokens=asked)
            if isinstance(got, Held):
                return self._holding(call, got, price, size), True
            usd_room, token_room = got.balance.room()
            least = least_output(call.max_tokens)
            fewer = clamp(price, size, asked, least=least, usd=usd_room, tokens=token_room)
            if fewer is None or fewer >= asked:  # terminates: each iteration asks for less
                raise self.short(got, worst_cost(price, size, least) or 0, size + least)
            asked = fewer

    def over(self, ordinal: int) -> bool:
        """End a call.  Returns whether a budget that was set in the meantime holds a reservation for it."""
        if (
            self._vault is None
            or ordinal in self.held
            or not self._vault.over((self._step.id, self._step.token, ordinal))
        ):
            return False
        self.held.append(ordinal)
        return True

    def recorded(self, call: CallRecord) -> None:
        """Handle the record of a finished call.

        If its cost is unknown and nothing is reserved for it, its bound is kept: a budget set later counts it in full.
        """
        bound = self._bounds.pop(call.ordinal, None)
        if self._vault is None or bound is None or call.reserved or call.cost_micro is not None:
            return
        try:
            self._vault.unknown((self._step.id, self._step.token, call.ordinal), bound())
        except Unavailable as error:
            log.warning("the bound of a call of unknown cost was not kept", step=self._step.id, error=error.message)

    # Partly paid conversations

    def earlier(self, fingerprint: str) -> Earlier | None:
        """Return where to resume this step's conversation with that fingerprint after a wait or the death of its
        worker.  Conversations of another attempt or another model are not resumed.

        Raises Unavailable, because starting over would pay twice.
        """
        if self._vault is None or self._step.token <= 1:
            return None
        body = self._vault.kept(self._step)
        said = json.loads(body) if body else {}
        if said.get("fingerprint") != fingerprint or said.get("attempt") != self._step.attempt:
            return None
        self._said = said
        return Earlier(said["rounds"], said["text"], tuple(said["violations"]))

    def keep(self, fingerprint: str, earlier: Earlier, calls: Sequence[CallRecord]) -> bool:
        """Store a conversation before its next round, and post its cost, so that a wait does not pay for it again.

        If storing fails, the conversation continues; returns whether it was stored.
        """
        known = self._said or {}
        said = {
            "fingerprint": fingerprint,
            "attempt": self._step.attempt,
            "rounds": earlier.rounds,
            "text": earlier.text,
            "violations": list(earlier.violations),
            "before": known.get("before", known.get("calls", 0)),
            "before_usd": known.get("before_usd", known.get("usd", 0)),
            "before_unknown": known.get("before_unknown", known.get("unknown", 0)),
        }
        said["calls"] = said["before"] + len(calls)
        said["usd"] = said["before_usd"] + sum(call.cost_micro or 0 for call in calls)
        said["unknown"] = said["before_unknown"] + sum(call.cost_micro is None for call in calls)
        return self._store(said, calls)

    def record(self, calls: Sequence[CallRecord]) -> None:
        """Store the calls made so far before another model is asked, so that a worker's death cannot lose them."""
        if self._vault is None or not calls:
            return
        try:
            self._vault.record(self._step, calls)
        except Unavailable as error:
            log.warning("calls are stored when the step ends", step=self._step.id, error=error.message)

    def try_again(self) -> None:
        """After a failed call, let the next attempt resume the conversation where it was."""
        if self._said is not None:
            self._store({**self._said, "attempt": self._step.attempt + 1}, ())

    def _store(self, said: dict[str, Any], calls: Sequence[CallRecord]) -> bool:
        if self._vault is None:
            return False
        try:
            self._vault.keep(self._step, calls, SECRETS.mask_json(json.dumps(said)))
        except Unavailable as error:
            log.warning("a conversation was not stored", step=self._step.id, error=error.message)
            return False
        self._said = said
        return True

    def _holding(self, call: AgentCall, held: Held, price: Price, size: int) -> AgentCall:
        """Continue with a reservation, which may date from before a short wait in place."""
        self.held.append(held.key[2])
        cost = worst_cost(price, size, held.max_tokens) or 0
        if not held.is_open or held.usd < cost or held.tokens < size + held.max_tokens:
            raise BudgetWait("the reservation for this call is gone; it is reserved again", BudgetRequest(0, 0, 0), 0.5)
        return replace(call, max_tokens=min(call.max_tokens, held.max_tokens))

    def _limits(self) -> list[tuple[int | None, int | None]]:
        if self._vault is None:
            return []
        found = [(account.usd, account.tokens) for account in self.own]
        return found + [(budget.usd, budget.tokens) for budget in self._vault.applying(self._run.info)]

    def _price(self, provider: str, model: str) -> Price:
        return lambda usage: self._pricer.price(provider, model, usage)

    def _priced(self, provider: str, model: str, price: Price, *, limited: bool = False) -> None:
        """Raise Unpriced if a model without a price would spend real or budgeted money."""
        if not limited and self._run.info.target != "live":
            return
        if price(Usage(input_tokens=1000, output_tokens=1000)) is None:
            why = "a budget in dollars applies to this call" if limited else "the cost of the call would be unknown"
            hint = load("gorgon_common.costs.prices:how_to_price")(provider, model)
            raise Unpriced(f"The model {provider}:{model} has no price, and {why}.", hint=hint)

    def short(self, shortage: Shortage, usd: int, tokens: int, what: str = "The next call") -> GorgonError:
        """Return the error for an account without enough room: Short if waiting may help, else BudgetExceeded.

        `what`: the subject of the message, capitalized as the start of a sentence.
        """
        told = shortage.explain(usd, tokens, what)
        open_to_come = shortage.balance.fits(usd, tokens, released=True)
        way = self._on_budget()
        if open_to_come:
            return BudgetWait(f"budget: {told}", BudgetRequest(shortage.period, usd, tokens), RECHECK_SECONDS)
        if way == "wait" and shortage.account.ends is not None and _empty_fits(shortage.balance, usd, tokens):
            seconds = max(1.0, (shortage.account.ends - self._time()).total_seconds() + 0.5)
            room = BudgetRequest(shortage.period, usd, tokens, patient=True)
            return BudgetWait(
                f"budget: {told} It waits until {shortage.account.ends:%Y-%m-%d %H:%M} UTC.", room, seconds
            )
        hint = "Raise it, lower `max_tokens:`, or ask for less."
        if shortage.account.budget is not None:
            hint = "Raise it with `gorgon budgets set`, or lower `max_tokens:`."
        if shortage.account.ends is not None:
            hint += f" The next period begins {shortage.account.ends:%Y-%m-%d %H:%M} UTC."
        if way == "approve":
            hint = f"`on_budget: approve` acts as `deny`; approvals are not built yet. {hint}"
        if self._said is not None:
            paid, unknown = dollars(self._said["usd"]), self._said.get("unknown", 0)
            more = f" + {unknown} of unknown cost" if unknown else ""
            hint += f" Calls of this step that are already paid for: {self._said['calls']}, {paid}{more}."
        balance = shortage.balance
        return BudgetExceeded(
            told,
            hint=hint,
            budget=shortage.account.label,
            limit_usd=balance.usd_limit,
            spent_usd=balance.usd_spent,
            reserved_usd=balance.usd_reserved,
            limit_tokens=balance.token_limit,
            spent_tokens=balance.token_spent,
            reserved_tokens=balance.token_reserved,
            missing_usd=_missing(balance.room()[0], usd),
            missing_tokens=_missing(balance.room()[1], tokens),
        )

    def _time(self) -> datetime:
        assert self._vault is not None
        return self._vault.now()

    def _on_budget(self) -> str:
        for _, number, _ in self._run.ancestry(self._step):
            way = self._run.plan.nodes[number].spec.get("on_budget")
            if way:
                return str(way)
        return str(self._run.plan.limits.get("on_budget") or "deny")

    # Maps

    def afford(self, node: Node, items: Sequence[Any]) -> None:
        """Check before a map's items start that together they fit every budget.

        Each item is counted with one call per step of its body, without repairs and retries.  Values that the body's
        steps pass to each other are not known yet and not counted.  Raises BudgetExceeded, Unpriced, Short.
        """
        if self._vault is None:
            return
        (template,) = node.bodies["item"]
        depth = len(self._run.ancestry(self._step)) + 1
        own = [*self.own, *caps(self._run, self._run.plan.nodes[template], self._run.path(self._step), depth)]
        if not own and not self._vault.applying(self._run.info):
            return
        accounts = self._vault.look(self._run.info, own)
        in_money = any(entry.balance.usd_limit is not None for entry in accounts)
        usd, tokens = self._whole(node, template, items, in_money=in_money)
        for entry in accounts:
            if not entry.balance.fits(usd, tokens):
                count = "item" if len(items) == 1 else f"{len(items)} items"
                raise self.short(entry, usd, tokens, f"The {count} of `{node.name}`")

    def _whole(self, node: Node, template: int, items: Sequence[Any], *, in_money: bool) -> tuple[int, int]:
        usd = tokens = 0
        for position, item in enumerate(items):
            for inner in agents(self._run, template):
                for_one = self._item_bound(node, inner, item, position, in_money=in_money)
                usd, tokens = usd + for_one[0], tokens + for_one[1]
        return usd, tokens

    def _item_bound(self, node: Node, inner: Node, item: Any, position: int, *, in_money: bool) -> tuple[int, int]:
        spec = inner.spec
        names: dict[str, Any] = {}
        for name, ref in inner.refs.items():
            if ref.kind in ("item", "index") and self._run.plan.nodes[ref.node or 0] is node:
                names[name] = item if ref.kind == "item" else position
        env = self._run.env(self._step, inner.refs, names)

        def text(template: Any) -> str:
            try:
                return str(parse_template(template, env.lenient).render(env)) if isinstance(template, str) else ""
            except (ExpressionError, KeyError, IndexError, TypeError):
                return str(template)  # it depends on the output of another step of the body

        prompt = spec.get("prompt")
        body = text(prompt) if prompt is not None else f"{spec.get('standing') or ''}{json.dumps(item, default=str)}"
        size = input_bound([body], system=text(spec.get("system")), schema=spec.get("schema"))
        asked = spec.get("max_tokens") or 4096
        if self._run.plan.lenient:
            asked = least_output(asked)  # older files have a token budget that nobody chose deliberately
        if not in_money:
            return 0, size + asked
        first = (spec.get("models") or [f"{spec['provider']}:{spec.get('model') or ''}"])[0]
        provider, _, model = str(first).partition(":")
        model = resolve_model(provider, model or spec.get("tier") or "standard")
        price = self._price(provider, model)
        self._priced(provider, model, price, limited=True)
        return worst_cost(price, size, asked) or 0, size + asked


def unsent(ordinal: int) -> CallRecord:
    """Return the record of a call that was reserved but not made."""
    return CallRecord("none", "", None, ordinal, Usage(), 0, "", 0, UNSENT, reserved=True)


def _bound(price: Price, size: int, longest: int) -> tuple[int, int, int]:
    return worst_cost(price, size, longest) or 0, size + longest, longest


def _missing(room: int | None, needed: int) -> int | None:
    return None if room is None else max(0, needed - room)


def _empty_fits(balance: Balance, usd: int, tokens: int) -> bool:
    """Tell whether the amount would fit an account with nothing spent, so that the next period can help."""
    return replace(balance, usd_spent=0, usd_reserved=0, token_spent=0, token_reserved=0).fits(usd, tokens)
