"""Compose and check the configuration."""
