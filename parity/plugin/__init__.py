"""What is behind the pytest plugin (``parity.pytest_plugin``): fixtures, needs, and one report of a session."""
