"""Ships a Salt master's job returns to MySQL or MariaDB, through a local journal.

Every Salt process imports this package to find its loader folders, so it must cost nothing:
keep this module empty but for the version.
"""

__version__ = "0.1.0"
