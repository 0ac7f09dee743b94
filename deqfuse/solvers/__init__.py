"""Forward solvers, each in one file with its options, and linear solvers, all of them per row.

``solve.py`` lists the forward solvers, ``adjoint.py`` solves for gradients, ``rows.py`` keeps the
books that they share, ``options.py`` says what an option is.
"""
