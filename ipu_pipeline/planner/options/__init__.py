"""Prices: what every block costs on a machine, in seconds and bytes. No torch in here."""
