"""The forward of one module as a graph: traced, proven against the record, edited, stored as plain data."""
