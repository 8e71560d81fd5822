"""The test suite: unit, integration (a real server) and system (a real master and minions)."""
