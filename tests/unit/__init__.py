"""The pure parts, and those that need no more than a file or a socket; no server, no Salt daemon."""
