"""Run an end-to-end test on a directory and on two S3 servers."""

from __future__ import annotations

import pytest

__all__ = ["on_each_store"]

on_each_store = pytest.mark.parametrize("url", ["file", "seaweed", "moto"], indirect=True)
