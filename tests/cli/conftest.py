"""Trials of these tests run on hosts that are kept."""

from tests.support.hosts import kept_hosts

__all__ = ["kept_hosts"]
