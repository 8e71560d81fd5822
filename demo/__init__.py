"""A complete site on one machine, to see the engine work: ``make demo``."""
