"""Rows of the field's data formats, read one by one: `open_source` opens one by its settings."""
