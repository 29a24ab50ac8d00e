"""Recommending: from constraints, and data if there is any, to a method, its settings and the reasons."""
