"""The local APIC."""
