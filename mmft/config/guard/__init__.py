"""Refuse configurations that would run foreign code or leak secrets."""
