"""Commands of ``python -m tritonq`` for a user's own model and images.

A command is a file with two functions, which `tritonq.__main__` calls: ``add_arguments(parser)`` and
``main(arguments)``, which returns the exit status. The other files hold what commands share.
"""
