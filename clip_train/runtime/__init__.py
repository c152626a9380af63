"""Processes, devices, precision and collectives. The one room that knows of ranks."""
