"""Tools for testing the engine, and programs that rely on it. Nothing of the engine imports them."""
