"""Journal, writer, database and schema together against a real MariaDB; no Salt daemon, no mock."""
