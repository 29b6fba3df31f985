"""Make the forward of one module editable.

It is traced into a graph that is proven against the record, edited, and stored as plain data.
"""
