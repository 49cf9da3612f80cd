"""Codecs: bytes in, frozen values out, and back. No files, clock, threads or logging."""
