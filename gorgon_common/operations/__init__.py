"""What integrations can do, declared once."""
