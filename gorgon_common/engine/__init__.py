"""What happens when a plan runs.  No broker, no database, no network in here: those are ports."""
