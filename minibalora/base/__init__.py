"""Shared basics: errors, files, ranks, progress, command lines."""
