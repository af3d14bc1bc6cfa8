"""Stands here so that pytest puts tests/ on the import path: every room's tests import architectures.py from it."""
