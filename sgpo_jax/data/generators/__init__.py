"""Generators of problems with strategies and worked solutions."""
