"""A run for people and machines: one HTML page and its parts, what a notebook shows, JUnit, JSON and Markdown."""
