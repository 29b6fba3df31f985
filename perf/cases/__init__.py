"""The table of cases, one module per family of operators."""
