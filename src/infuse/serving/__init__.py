"""Serving: every adapter of a folder over one frozen base, rows of all tasks in one batch."""
