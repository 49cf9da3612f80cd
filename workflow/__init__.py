"""Durable workflows on SQLite, one file for each instance. Nothing is here yet but the name; `replicator` does not depend on it."""
