"""Forward solvers and linear solvers, per row. ``options`` says what, the other files say how."""
