"""A fuzzer of events: see ``__main__.py``."""
