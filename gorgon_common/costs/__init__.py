"""Usage, prices, budgets and forecasts of model calls."""
