"""Delivery of interrupts and exceptions."""
