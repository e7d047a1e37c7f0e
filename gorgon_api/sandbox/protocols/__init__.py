"""One file for each provider: its paths, shapes, headers and errors."""
