"""What a run will use, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common import lazy
from gorgon_common.bootstrap import Services, quota_book
from gorgon_common.costs.tokens import SANDBOX_FACTOR, TokenEstimator
from gorgon_common.engine.limits import LimitKey
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan


def estimate(
    services: Services,
    scope: Scope,
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    target: str = "sandbox",
    team: str | None = None,
) -> dict[str, Any]:
    """Return the predicted usage of a run: the document of `gorgon plan --json`.  Raises InputInvalid."""
    values = lazy.load("gorgon_common.workflow.compiler:check_inputs")(plan, inputs)
    estimating = lazy.load("gorgon_common.engine.estimate")
    history = lazy.load("gorgon_common.persistence.history:read_history")(
        services.database, services.knowledge.plan, workflow=plan.name, target=target
    )
    book = quota_book(services.settings, services.database)
    document: dict[str, Any] = estimating.estimate(
        plan,
        values,
        target=target,
        history=history,
        estimator=TokenEstimator(
            services.reports.ratios(target), unseen=SANDBOX_FACTOR if target == "sandbox" else 1.0
        ),
        prices=lazy.load("gorgon_common.costs.prices:make_pricer")(services.settings.prices),
        quota=lambda provider, model: book.quota(LimitKey(target, provider, "", model)),
        budgets=estimating.left(
            services.budgets.listing(scope), team=team or plan.team, workflow=plan.name, target=target
        ),
        latency=services.settings.sandbox_latency,
        slots=services.settings.slots,
    )
    return document
