"""Measurements, each runnable with one command from the project's folder: `python -m bench.NAME`. They need the `test` extra."""
