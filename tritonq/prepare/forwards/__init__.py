"""The forward of one module, in a form that can be edited.

Traced, proven against the record, edited, stored as plain data.
"""
