"""Traces: read what recorders noted (bus/recorder.py), join it into chains, show it to people and tools.

Runs beside a machine or long after it, in processes of its own; no process of a machine imports it.
"""
